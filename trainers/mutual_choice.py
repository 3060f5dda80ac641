"""Mutual choice: the k·n best matches of the whole batch (arXiv 2411.02124); saved with one threshold (our reading)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saekit.trainers.variant import Batch, BatchSettings, Variant

if TYPE_CHECKING:
    from saekit.code import SparseCode
    from saekit.sae import Architecture, SparseAutoencoder
    from saekit.trainers.calibration import Heldout


class MutualChoice(Variant):
    """Mutual choice over each batch; saved as ``jumprelu`` with the same threshold for every feature."""

    Config = BatchSettings
    architecture: Architecture = "jumprelu"
    compares_tokens = True

    def allocate(self, batch: Batch) -> SparseCode:
        """The k·n largest of the whole batch."""
        return batch.select.mutual_choice(self.k * batch.n_tokens)

    def calibrate(self, sae: SparseAutoencoder, heldout: Heldout) -> None:
        """Set the threshold that gives a mean of k matches a token on held-out activations."""
        assert sae.threshold is not None
        sae.threshold.fill_(heldout.global_threshold(sae, self.k))
