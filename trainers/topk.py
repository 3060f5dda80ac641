"""TopK: each token matches its k best features, in training and at inference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saekit.settings import MANY, setting
from saekit.trainers.variant import Batch, KSettings, Variant

if TYPE_CHECKING:
    from saekit.code import SparseCode


class TopK(Variant):
    """Token choice; saved as ``topk``."""

    class Config(KSettings):
        """k, and how it is come to."""

        k_start: int | None = setting(
            None, gt=0, lt=MANY, within_width=True, description="k at the first step; k from the start if not given"
        )
        k_anneal: float = setting(0.5, gt=0, le=1, description="share of the steps in which k_start becomes k")

    architecture = "topk"

    def allocate(self, batch: Batch) -> SparseCode:
        """The k largest of each row."""
        k, start = self.k, self.config.k_start
        if start is not None and batch.done < self.config.k_anneal:
            k = round(start + (k - start) * batch.done / self.config.k_anneal)
        return batch.select.token_choice(k)
