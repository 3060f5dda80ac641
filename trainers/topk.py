"""TopK: each token matches its k best features, in training and at inference."""

from __future__ import annotations

from saekit.code import SparseCode
from saekit.trainers.variant import Batch, Variant


class TopK(Variant):
    """Token choice; saved as ``topk``."""

    architecture = "topk"

    def allocate(self, batch: Batch) -> SparseCode:
        """The k largest of each row."""
        return batch.select.token_choice(self.k)
