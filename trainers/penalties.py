"""Penalties of dictionaries that are made sparse by their loss rather than by a count."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.code import SparseCode
from saekit.kernels.pairs import pair_products
from saekit.trainers.backward import gradient_of
from saekit.trainers.sparsity_control import SparsityControl
from saekit.trainers.terms import AutogradTerm, Step, Term

_ENTRIES = 1 << 22  # pre-activations held at a time


class L1(AutogradTerm):
    """Σ z ‖W_dec row‖ over the tokens' summed norms: its weight means the same for every model (our reading)."""

    name = "l1"

    def __init__(self, control: SparsityControl) -> None:
        self.control = control

    @property
    def weight(self) -> float:  # type: ignore[override]
        """What the control says."""
        return self.control.weight

    def loss(
        self, step: Step, code: SparseCode, W_dec: Float[Tensor, "F d"], b_dec: Float[Tensor, "d"]
    ) -> Float[Tensor, ""]:
        """The weighted sum of the activations."""
        norms = W_dec.norm(dim=1)[code.features]
        penalty: Tensor = (code.values * norms).sum() / step.centred.norm(dim=1).sum()
        return penalty


class L0(Term):
    """λ (L0 / k − 1)², and the gradients of thresholds θ by straight-through estimates (arXiv 2407.14435).

    With a rectangle of width ε about θ for the slope of the step: ∂z/∂θ = −(θ/ε) rect((pre − θ)/ε) and ∂[pre > θ]/∂θ =
    −(1/ε) rect((pre − θ)/ε). So pairs just below their threshold count too. Through [pre > θ] no gradient reaches pre.
    """

    name = "l0_penalty"

    def __init__(self, threshold: Float[Tensor, "F"], k: int, bandwidth: float, weight: float) -> None:
        self.threshold, self.k, self.bandwidth, self.weight = threshold, k, bandwidth, weight
        self.window: SparseCode | None = None  # pairs above θ − ε/2, set by the variant at each step

    @torch.no_grad()
    def add(self, step: Step) -> Float[Tensor, ""]:
        """Add the gradients at the thresholds, of this penalty and of the reconstruction."""
        assert self.window is not None
        theta = self.threshold.detach()
        near = self.window.where(self.window.values < theta[self.window.features] + self.bandwidth / 2)
        off = step.code.l0 / self.k - 1
        at_l0 = 2 * self.weight * off / (self.k * len(step.x))  # of each pair's [pre > θ]
        at_z = (-2 / step.variance) * pair_products(step.error, step.sae.W_dec.detach(), near)
        slope = -(at_z * theta[near.features] + at_l0) / self.bandwidth
        gradient_of(self.threshold).index_add_(0, near.features, slope)
        return step.variance.new_tensor(off * off)


class Revival(Term):
    """Σ relu(θ − pre) of dead features a token: it draws their pre-activations up and their thresholds down.

    The pre-activation loss of Transformer Circuits (January 2025), there times the norm of the decoder row, which is 1
    here.
    """

    name = "pre_act"

    def __init__(self, threshold: Float[Tensor, "F"], dead_after: int, weight: float) -> None:
        self.threshold, self.dead_after, self.weight = threshold, dead_after, weight

    @torch.no_grad()
    def add(self, step: Step) -> Float[Tensor, ""]:
        """Add the gradients of the dead features' encoder, of b_dec and of their thresholds."""
        sae = step.sae
        ids = step.statistics.dead(self.dead_after).nonzero()[:, 0]
        total = step.variance.new_zeros(())
        if not len(ids):
            return total
        W_enc, b_enc, theta = sae.W_enc.T[ids], sae.b_enc[ids], self.threshold.detach()[ids]
        to_W_enc, below = torch.zeros_like(W_enc), torch.zeros_like(b_enc)
        for x in torch.split(step.centred, max(1, _ENTRIES // len(ids))):
            short = theta - torch.addmm(b_enc, x, W_enc.T)
            under = (short > 0).to(x.dtype)
            total += (short * under).sum()
            to_W_enc += under.T @ x
            below += under.sum(0)
        scale = self.weight / len(step.x)
        gradient_of(sae.W_enc).T.index_add_(0, ids, -scale * to_W_enc)
        gradient_of(sae.b_enc).index_add_(0, ids, -scale * below)
        gradient_of(sae.b_dec).add_(scale * (below @ W_enc))
        gradient_of(self.threshold).index_add_(0, ids, scale * below)
        return total / len(step.x)
