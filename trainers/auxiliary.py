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

from saekit.allocation import token_choice
from saekit.sae import SparseAutoencoder
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


def auxiliary_loss(
    sae: SparseAutoencoder, x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"], pool: Bool[Tensor, "F"], k_aux: int
) -> Float[Tensor, ""]:
    """‖e − ê‖² / ‖e − mean(e)‖² with e = x − x̂, detached, and ê what the pool's features make of x, without b_dec.

    For each token, the ``k_aux`` largest pre-activations of the pool (relu'd) are decoded. The pool's encoder and
    decoder receive gradient; the products are dense, but over the pool's columns only.

    Args:
        sae: the dictionary in training.
        x, x_hat: [n, d] activations and their reconstructions.
        pool: [F] the features that take part, at least one.
        k_aux: features a token, where the pool has as many.
    """
    error = (x - x_hat).detach()
    columns = pool.nonzero()[:, 0]
    pre = (x - sae.b_dec) @ sae.W_enc[:, columns] + sae.b_enc[columns]
    f = torch.relu(pre)
    if k_aux < len(columns):
        f = token_choice(pre, k_aux).to_dense()
    residual = (error - f @ sae.W_dec[columns]).square().sum()
    variance = (error - error.mean(0)).square().sum()
    # 0 where there is no error to explain, with gradients of 0 and not NaN
    return torch.where(variance > 0, residual / variance.clamp_min(torch.finfo(variance.dtype).tiny), 0.0)
