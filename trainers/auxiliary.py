"""The auxiliary loss: features that are of no use are trained to explain what the others leave over.

``saekit.trainers.auxiliary_losses`` says which features those are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saekit.kernels.workspace import Workspace
from saekit.sae import SparseAutoencoder
from saekit.trainers.backward import gradient_of
from saekit.trainers.losses import total_variance
from saekit.trainers.statistics import Statistics
from saekit.trainers.terms import Step, Term

_ENTRIES = 1 << 22  # pre-activations of the pool held at a time


class Auxiliary(Term):
    """The auxiliary loss of one run; 0 where its pool is empty."""

    name = "aux"

    def __init__(self, pool: Callable[[Statistics], Bool[Tensor, "F"]], k_aux: int, weight: float) -> None:
        self.pool, self.k_aux, self.weight = pool, k_aux, weight
        self.size = 0

    def add(self, step: Step) -> Float[Tensor, ""]:
        """Explain the step's error by the pool's features."""
        pool = self.pool(step.statistics)
        self.size = int(pool.sum())
        if not self.size:
            return step.error.new_zeros(())
        return auxiliary_step(step.sae, step.centred, step.error, pool, self.k_aux, self.weight, step.workspace)

    def figures(self) -> dict[str, float]:
        """The size of the pool."""
        return {"aux_pool": self.size}


@torch.no_grad()
def auxiliary_step(
    sae: SparseAutoencoder,
    centred: Float[Tensor, "n d"],
    error: Float[Tensor, "n d"],
    pool: Bool[Tensor, "F"],
    k_aux: int,
    weight: float,
    workspace: Workspace,
) -> Float[Tensor, ""]:
    """The loss ‖e − ê‖² / ‖e − mean(e)‖², ê what the pool's features make of x; its gradients are added to ``grad``.

    For each token, the ``k_aux`` largest pre-activations of the pool (relu'd) are decoded, without b_dec. The pool's
    encoder and decoder and b_dec receive gradient; the products are dense, but over the pool's columns only, which are
    copied, and a few tokens at a time. The loss and its gradients are 0 where there is no error to explain.

    Args:
        sae: the dictionary in training, whose parameters have a ``grad`` already.
        centred: [n, d] x − b_dec.
        error: [n, d] what is to be explained, x − x̂; no gradient flows into it.
        pool: [F] the features that take part, at least one.
        k_aux: features a token, where the pool has as many.
        weight: of the loss in the gradients.
        workspace: for buffers.
    """
    variance = total_variance(error)
    if variance <= 1e-12:
        return variance.new_zeros(())
    ids = pool.nonzero()[:, 0]
    W_enc, b_enc, W_dec = sae.W_enc.T[ids], sae.b_enc[ids], sae.W_dec[ids]
    to_W_enc, to_b_enc, to_W_dec = (torch.zeros_like(W) for W in (W_enc, b_enc, W_dec))
    residual = variance.new_zeros(())
    rows = 1 << max(0, (_ENTRIES // len(ids)).bit_length() - 1)
    for x, e in zip(torch.split(centred, rows), torch.split(error, rows), strict=True):
        shape = (len(x), len(ids))
        f, at_f = (workspace(name, shape, x.dtype, x.device) for name in ("auxiliary", "at auxiliary"))
        torch.addmm(b_enc, x, W_enc.T, out=f)
        if k_aux < len(ids):
            f.mul_(_largest(f, k_aux))
        f.relu_()
        rest = torch.addmm(e, f, W_dec, alpha=-1)
        residual += rest.square().sum()
        rest.mul_(-2 * weight / variance)  # the gradient at ê
        to_W_dec.addmm_(f.T, rest)
        torch.mm(rest, W_dec.T, out=at_f).mul_(f > 0)
        to_W_enc.addmm_(at_f.T, x)
        to_b_enc += at_f.sum(0)
    gradient_of(sae.W_enc).T.index_add_(0, ids, to_W_enc)
    gradient_of(sae.b_enc).index_add_(0, ids, to_b_enc)
    gradient_of(sae.W_dec).index_add_(0, ids, to_W_dec)
    gradient_of(sae.b_dec).sub_(to_b_enc @ W_enc)  # b_dec enters through x − b_dec alone
    return residual / variance


def _largest(pre: Float[Tensor, "n p"], k: int) -> Bool[Tensor, "n p"]:
    """Which entries are among the k largest of their row; among equals the first."""
    smallest = pre.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    largest = pre >= smallest
    tied = ((largest.sum(1) > k) & (smallest[:, 0] > 0)).nonzero()[:, 0]
    if tied.numel():
        first = pre[tied].sort(descending=True, stable=True).indices[:, :k]
        largest[tied] = torch.zeros_like(largest[tied]).scatter_(1, first, True)
    return largest
