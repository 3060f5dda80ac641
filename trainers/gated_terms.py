"""The losses of gated dictionaries, on the pairs with a positive gate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.code import SparseCode
from saekit.kernels.decode import decode
from saekit.trainers.penalties import L1
from saekit.trainers.terms import AutogradTerm, Step

if TYPE_CHECKING:
    from saekit.trainers.gated import Gated


class _OnTheGate(AutogradTerm):
    def __init__(self, variant: Gated) -> None:
        self.variant = variant

    def code(self, step: Step) -> SparseCode:
        """Pairs with a positive gate, and its value."""
        return self.variant.gate


class GatedReconstruction(_OnTheGate):
    """‖x − x̂‖² over the variance, x̂ from the magnitudes."""

    name = "fvu"

    def loss(
        self, step: Step, code: SparseCode, W_dec: Float[Tensor, "F d"], b_dec: Float[Tensor, "d"]
    ) -> Float[Tensor, ""]:
        """Through scale and shift."""
        scale, shift = self.variant.log_scale.exp()[code.features], self.variant.shift[code.features]
        z = torch.relu(code.values * scale + shift)
        return (step.x - decode(code.with_values(z), W_dec, b_dec)).square().sum() / step.variance


class GateReconstruction(_OnTheGate):
    """‖x − x̂‖² over the variance, x̂ from the gate by a frozen decoder: what keeps the gate informative."""

    name = "gate_fvu"

    def loss(
        self, step: Step, code: SparseCode, W_dec: Float[Tensor, "F d"], b_dec: Float[Tensor, "d"]
    ) -> Float[Tensor, ""]:
        """Gradients reach the gate alone."""
        return (step.x - decode(code, W_dec.detach(), b_dec.detach())).square().sum() / step.variance


class GatedL1(L1):
    """The L1 penalty of the gate."""

    def __init__(self, variant: Gated) -> None:
        super().__init__(variant.control)
        self.variant = variant

    def code(self, step: Step) -> SparseCode:
        """Pairs with a positive gate, and its value."""
        return self.variant.gate
