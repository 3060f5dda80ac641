"""Auxiliary losses: features that are of no use are trained to explain what the others leave over.

One loss, and a pool of features for each of its names: ``aux_k`` (of OpenAI's TopK, on which arXiv 2411.02124 builds)
revives the dead ones, ``aux_zipf`` (arXiv 2411.02124) the dead and the underutilised ones. Who is underutilised is our
reading: whose running density lies below τ times the fitted Zipf curve at its rank. With τ = 0 both pools are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saekit.sae import SparseAutoencoder
from saekit.trainers.backward import gradient_of
from saekit.trainers.losses import total_variance
from saekit.trainers.statistics import Statistics

if TYPE_CHECKING:
    from saekit.trainers.config import TrainConfig

Pool = Callable[[Statistics, "TrainConfig"], Bool[Tensor, "F"]]


def dead(statistics: Statistics, config: TrainConfig) -> Bool[Tensor, "F"]:
    """Features that have not fired for ``dead_after`` tokens."""
    assert config.dead_after is not None
    return statistics.dead(config.dead_after)


def dead_or_underutilised(statistics: Statistics, config: TrainConfig) -> Bool[Tensor, "F"]:
    """The dead ones and those below τ times the Zipf curve."""
    return dead(statistics, config) | statistics.underutilised(config.tau)


POOLS: dict[str, Pool | None] = {"none": None, "aux_k": dead, "aux_zipf": dead_or_underutilised}


def auxiliary_step(
    sae: SparseAutoencoder,
    centred: Float[Tensor, "n d"],
    error: Float[Tensor, "n d"],
    pool: Bool[Tensor, "F"],
    k_aux: int,
    weight: float = 1.0,
) -> Float[Tensor, ""]:
    """The loss ‖e − ê‖² / ‖e − mean(e)‖², ê what the pool's features make of x; its gradients are added to ``grad``.

    For each token, the ``k_aux`` largest pre-activations of the pool (relu'd) are decoded, without b_dec. The pool's
    encoder and decoder and b_dec receive gradient; the products are dense, but over the pool's columns only.

    Args:
        sae: the dictionary in training, whose parameters have a ``grad`` already.
        centred: [n, d] x − b_dec.
        error: [n, d] what is to be explained, x − x̂; no gradient flows into it.
        pool: [F] the features that take part, at least one.
        k_aux: features a token, where the pool has as many.
        weight: of the loss in the gradients.
    """
    ids = pool.nonzero()[:, 0]
    W_enc, b_enc, W_dec = (p.detach()[ids].requires_grad_() for p in (sae.W_enc.T, sae.b_enc, sae.W_dec))
    pre = torch.addmm(b_enc, centred, W_enc.T)
    f = torch.relu(pre)
    if k_aux < len(ids):
        f = f * _largest(pre.detach(), k_aux)
    variance = total_variance(error)
    residual = (error - f @ W_dec).square().sum()
    # 0 where there is no error to explain, with gradients of 0 and not NaN
    loss = torch.where(variance > 1e-12, residual / variance, 0.0)
    grads = torch.autograd.grad(weight * loss, (W_enc, b_enc, W_dec))
    with torch.no_grad():
        gradient_of(sae.W_enc).T.index_add_(0, ids, grads[0])
        gradient_of(sae.b_enc).index_add_(0, ids, grads[1])
        gradient_of(sae.W_dec).index_add_(0, ids, grads[2])
        gradient_of(sae.b_dec).sub_(grads[1] @ W_enc)  # b_dec enters through x − b_dec alone
    return loss.detach()


def _largest(pre: Float[Tensor, "n p"], k: int) -> Bool[Tensor, "n p"]:
    """Which entries are among the k largest of their row; among equals the first."""
    smallest = pre.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    largest = pre >= smallest
    tied = ((largest.sum(1) > k) & (smallest[:, 0] > 0)).nonzero()[:, 0]
    if tied.numel():
        first = pre[tied].sort(descending=True, stable=True).indices[:, :k]
        largest[tied] = torch.zeros_like(largest[tied]).scatter_(1, first, True)
    return largest
