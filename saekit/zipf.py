"""The Zipf-Mandelbrot law of firing densities: its fit, and the budgets of feature choice that follow it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from saekit.errors import SaekitError

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class ZipfLaw(NamedTuple):
    """density ≈ scale · (rank + shift)^(-exponent), rank 1 the densest.

    Attributes:
        exponent: s.
        shift: q.
        scale: c.
        r2: share of the variance of log density that the law explains at the ranks it was fitted to.
    """

    exponent: float
    shift: float
    scale: float
    r2: float

    def curve(self, n_features: int) -> Float[Tensor, "F"]:
        """The density at each rank, densest first, in float64."""
        ranks = torch.arange(1, n_features + 1, dtype=torch.float64)
        return self.scale * (ranks + self.shift) ** -self.exponent


def ranks_of(density: Float[Tensor, "F"]) -> Int[Tensor, "F"]:
    """Rank of each feature from 0, the densest, to F − 1; among equals the smaller index comes first."""
    ranks = torch.empty(len(density), dtype=torch.long, device=density.device)
    ranks[density.sort(descending=True, stable=True).indices] = torch.arange(len(density), device=density.device)
    return ranks


def fit_zipf(
    density: Float[Tensor, "F"],
    low_end: float = 0.2,
    exponent: float | None = None,
    shift: float | None = None,
) -> ZipfLaw | None:
    """The Zipf-Mandelbrot law of these firing densities, by least squares in log-log.

    That densities follow a Zipf law except at the low end is the paper's (arXiv 2411.02124). The rest is our reading:
    the sparsest fifth of the features that fire is left out, ranks are thinned out to equal steps in log rank so that
    the many sparse features do not outvote the few dense ones, and the shift is the best of a grid from 0 to the number
    of ranks.

    Args:
        density: [F] firing rates, in any order.
        low_end: share of the features that fire to leave out.
        exponent: s, where it is given and only the rest is fitted.
        shift: q, likewise.

    Returns:
        The law, or None where fewer than ten features are left to fit.
    """
    firing = density[density > 0].cpu().double().sort(descending=True).values
    kept = int(len(firing) * (1 - low_end))
    if kept < 10:
        return None
    ranks = torch.logspace(0, math.log10(kept), 200, dtype=torch.float64).round()
    ranks = ranks[torch.diff(ranks, prepend=ranks.new_zeros(1)) > 0]  # small ranks come up several times
    y = firing[ranks.long() - 1].log()
    shifts = torch.cat(
        [torch.zeros(1, dtype=torch.float64), torch.logspace(-1, math.log10(kept), 64, dtype=torch.float64)]
    )
    if shift is not None:
        shifts = torch.tensor([shift], dtype=torch.float64)
    x = (ranks[None] + shifts[:, None]).log()
    x_centred, y_centred = x - x.mean(1, keepdim=True), y - y.mean()
    slope = (x_centred * y_centred).sum(1) / x_centred.square().sum(1)
    # budgets never rise with rank
    slope = slope.clamp(max=0) if exponent is None else torch.full_like(slope, -exponent)
    residual = (y_centred - slope[:, None] * x_centred).square().sum(1)
    best = int(residual.argmin())
    variance = float(y_centred.square().sum())
    return ZipfLaw(
        exponent=-float(slope[best]),
        shift=float(shifts[best]),
        scale=float((y.mean() - slope[best] * x[best].mean()).exp()),
        r2=1 - float(residual[best]) / variance if variance > 1e-12 else 1.0,
    )


def zipf_budgets(
    total: int, n_features: int, n_tokens: int, exponent: float = 1.0, shift: float = 3.0
) -> Int[Tensor, "F"]:
    """Whole-number budgets m_j by a Zipf-Mandelbrot law, densest feature first.

    m_j ∝ (r_j + shift)^(-exponent) for the ranks r_j = 1 ... F, kept between 1 and n_tokens: what a bound takes from or
    adds to some features is shared among the others in proportion. Rounded by largest remainders. That a Zipf law sets
    the budgets is the paper's (arXiv 2411.02124); shift, bounds and rounding are our reading.

    Args:
        total: M, the matches in a batch; the budgets sum to it exactly.
        n_features: F.
        n_tokens: n, tokens in a batch.
        exponent: s, at least 0; 0 gives uniform budgets.
        shift: q, more than -1.

    Raises:
        SaekitError: total is not between F and F·n, or a parameter is out of bounds.
    """
    if n_features < 1 or n_tokens < 1:
        raise SaekitError(f"there are no budgets for {n_features} features and {n_tokens} tokens")
    if not n_features <= total <= n_features * n_tokens:
        raise SaekitError(
            f"{total} matches cannot be shared among {n_features} features with 1 to {n_tokens} tokens each; "
            f"choose {n_features} to {n_features * n_tokens} (a larger batch or k gives more)"
        )
    if not exponent >= 0 or not shift > -1:
        raise SaekitError(f"exponent = {exponent} must be at least 0 and shift = {shift} more than -1")
    ranks = torch.arange(1, n_features + 1, dtype=torch.float64)
    log_weights = -exponent * (ranks + shift).log()
    shares = _bounded_shares(total, log_weights - log_weights.max(), n_tokens)
    budgets = shares.floor().long()
    missing = total - int(budgets.sum())
    remainders = torch.where(budgets < n_tokens, shares - budgets, -1.0)
    budgets[remainders.sort(descending=True, stable=True).indices[:missing]] += 1
    return budgets


def _bounded_shares(total: int, log_weights: Tensor, most: int) -> Tensor:
    """clamp(c·w, 1, most) with the c for which they sum to ``total``, found by bisection on log c."""
    low = torch.tensor(-1.0, dtype=torch.float64) - log_weights.max()
    high = torch.tensor(float(most), dtype=torch.float64).log() + 1 - log_weights.min()
    for _ in range(200):
        middle = (low + high) / 2
        if float((log_weights + middle).exp().clamp(1, most).sum()) > total:
            high = middle
        else:
            low = middle
    return (log_weights + low).exp().clamp(1, most)
