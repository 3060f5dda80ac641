"""Budgets of feature choice: how many tokens of a batch each feature may match."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saekit.errors import SaekitError

if TYPE_CHECKING:
    from jaxtyping import Int


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
