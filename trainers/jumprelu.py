"""JumpReLU: each feature is active above a threshold that it learns (arXiv 2407.14435).

Thresholds are learned as they are, not by their logarithm, and the penalty aims at k: λ (L0 / k − 1)², as in the
paper's appendix. Our reading: they begin where the first batch's k·n best pairs end, so that a run starts at its L0.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from saekit.settings import setting
from saekit.trainers.variant import Batch, KSettings, Variant

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.code import SparseCode
    from saekit.sae import Architecture, SparseAutoencoder
    from saekit.trainers.calibration import Heldout
    from saekit.trainers.statistics import Statistics
    from saekit.trainers.terms import Term


class JumpReLU(Variant):
    """Learned thresholds, held at a mean of k by a penalty; saved as ``jumprelu``."""

    class Config(KSettings):
        """The penalty and the estimate of its slope; activations have a mean norm of √d."""

        l0_weight: float = setting(1.0, ge=0, description="weight of the penalty (L0/k - 1)²")
        bandwidth: float = setting(2.0, gt=0, description="width of the rectangle that estimates a threshold's slope")
        pre_act_weight: float = setting(3e-6, ge=0, description="weight of the loss that revives dead features")

    architecture: Architecture = "jumprelu"
    threshold: Tensor

    def begin(self, sae: SparseAutoencoder) -> None:
        """Make the thresholds, those of the dictionary that the run starts from; below 0 they have not begun."""
        first = (sae.b_enc * 0 if sae.threshold is None else sae.threshold).detach().clone()
        self.threshold = (first if bool((first > 0).any()) else first - 1).requires_grad_()

    def parameters(self) -> dict[str, Tensor]:
        """The thresholds [F], in the run's units."""
        return {"threshold": self.threshold}

    def allocate(self, batch: Batch) -> SparseCode:
        """All pairs above their threshold."""
        theta = self.threshold.detach()
        if bool((theta == -1).all()):
            first = batch.select.mutual_choice(self.k * batch.n_tokens)
            theta.fill_(float(first.values.min()) if first.values.numel() else 0.0)
        theta.clamp_(min=0)
        window = batch.select.threshold_choice(theta - self.config.bandwidth / 2)
        self.penalty.window = window
        return window.where(window.values > theta[window.features])

    def terms(self) -> Iterable[Term]:
        """Reconstruction, the penalty of L0, and what revives dead features."""
        from saekit.trainers.penalties import L0, Revival
        from saekit.trainers.terms import Reconstruction

        config, dead_after = self.config, self.config.dead_after
        self.penalty = L0(self.threshold, self.k, config.bandwidth, config.l0_weight)
        return [Reconstruction(), self.penalty, Revival(self.threshold, dead_after, config.pre_act_weight)]

    def running_rule(self, statistics: Statistics) -> dict[str, Tensor]:
        """The thresholds learned so far."""
        return {"threshold": self.threshold.detach().clamp(min=0)}

    def calibrate(self, sae: SparseAutoencoder, heldout: Heldout) -> None:
        """The thresholds are those that were learned."""
        assert sae.threshold is not None
        sae.threshold.copy_(self.threshold.detach().clamp(min=0))
