"""TopK: each token matches its k best features, in training and at inference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saekit.trainers.variant import Batch, Variant

if TYPE_CHECKING:
    from saekit.code import SparseCode


class TopK(Variant):
    """Token choice; saved as ``topk``."""

    architecture = "topk"

    def allocate(self, batch: Batch) -> SparseCode:
        """The k largest of each row."""
        return batch.select.token_choice(self.k)
