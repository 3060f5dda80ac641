"""Scores of gradient TopK: pre-activations weighed by how strongly each feature moves the model's loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saekit.kernels.scores import Scores

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, eq=False)
class InfluencedScores(Scores):
    """relu(pre) · (1 + β·|g W_decᵀ| / s_g), with s_g the root mean square of g W_decᵀ over the whole batch.

    ``at`` gives the pre-activations themselves, which are what is decoded.

    Attributes:
        gradients: [n, d] of the model's loss.
        W_dec: [F, d].
        beta: at least 0.
    """

    gradients: Float[Tensor, "n d"] = field(kw_only=True)
    W_dec: Float[Tensor, "F d"] = field(kw_only=True)
    beta: float = field(kw_only=True)

    @cached_property
    def _weight(self) -> Tensor:
        """β / s_g: the squares of a product of two matrices sum up to the entrywise product of their Gram matrices."""
        squares = ((self.gradients.T @ self.gradients) * (self.W_dec.T @ self.W_dec)).sum()
        rms = (squares.clamp_min(0) / (len(self.gradients) * len(self.W_dec))).sqrt()
        return self.beta / rms.clamp_min(1e-30)  # no gradient, no influence

    def rows(self, start: int, stop: int) -> Float[Tensor, "m p"]:
        """Scores of some rows, columns filled up with -inf; the next call overwrites them."""
        return self._weigh(super().rows(start, stop), self.gradients[start:stop])

    def exact_rows(self, ids: Tensor) -> Float[Tensor, "m c"]:
        """Scores of the rows of these numbers."""
        return self._weigh(super().exact_rows(ids), self.gradients[ids])

    def _weigh(self, pre: Tensor, gradients: Tensor) -> Tensor:
        shape = (len(gradients), len(self.W_dec))
        influence = self.workspace("influence", shape, pre.dtype, pre.device)
        torch.mm(gradients, self.W_dec.T, out=influence)
        scores = pre[:, : shape[1]].relu_()
        scores.addcmul_(scores, influence.abs_().mul_(self._weight))
        return pre
