"""Gated: one affine map decides which features are active, another how strongly (arXiv 2404.16014).

Both share W_enc. With π = (x − b_dec) W_enc + b_enc, the gate, z = relu(e^r π + b) where π > 0; r and b are learned
(the paper writes the same function with a bias of its own in each map). The losses are the paper's: reconstruction, an
L1 penalty of relu(π), and the reconstruction from relu(π) by a frozen decoder.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from saekit.trainers.relu import ReLU
from saekit.trainers.variant import Batch

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.code import SparseCode
    from saekit.sae import Architecture, SparseAutoencoder
    from saekit.trainers.calibration import Heldout
    from saekit.trainers.gated_terms import Gate
    from saekit.trainers.statistics import Statistics
    from saekit.trainers.terms import Term


class Gated(ReLU):
    """A gate and a magnitude; saved as the ``jumprelu`` dictionary that it is."""

    architecture: Architecture = "jumprelu"
    gate: Gate

    def begin(self, sae: SparseAutoencoder) -> None:
        """Make scale and shift of the magnitudes, which begin as the gate's values."""
        from saekit.trainers.gated_terms import Gate

        super().begin(sae)
        zeros = sae.b_enc.detach().clone().zero_()
        self.gate = Gate(zeros.clone().requires_grad_(), zeros.requires_grad_())

    def parameters(self) -> dict[str, Tensor]:
        """r and b, [F] each."""
        return {"log_scale": self.gate.log_scale, "shift": self.gate.shift}

    def allocate(self, batch: Batch) -> SparseCode:
        """All pairs with a positive gate and a positive magnitude."""
        pairs = self.gate.pairs = super().allocate(batch)
        scale, shift = self.gate.log_scale.detach().exp(), self.gate.shift.detach()
        z = pairs.values * scale[pairs.features] + shift[pairs.features]
        return pairs.with_values(z).where(z > 0)

    def terms(self) -> Iterable[Term]:
        """The paper's three."""
        from saekit.trainers.gated_terms import GatedL1, GatedReconstruction, GateReconstruction

        return [GatedReconstruction(self.gate), GatedL1(self.control, self.gate), GateReconstruction(self.gate)]

    def running_rule(self, statistics: Statistics) -> dict[str, Tensor]:
        """What ``calibrate`` folds in."""
        shift = self.gate.shift.detach()
        return {"gain": self.gate.log_scale.detach().exp(), "shift": shift, "threshold": shift.clamp(min=0)}

    def calibrate(self, sae: SparseAutoencoder, heldout: Heldout) -> None:
        """Fold the scale into the encoder: z = π' = e^r π + b, and π > 0 is π' > b."""
        assert sae.threshold is not None
        scale, shift = self.gate.log_scale.detach().exp(), self.gate.shift.detach()
        sae.W_enc.mul_(scale)
        sae.b_enc.mul_(scale).add_(shift)
        sae.threshold.copy_(shift.clamp(min=0))
