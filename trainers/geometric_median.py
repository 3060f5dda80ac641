"""The geometric median, where b_dec starts: the point of least mean distance, which a few huge tokens do not move."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def geometric_median(x: Float[Tensor, "n d"], iterations: int = 100, tolerance: float = 1e-6) -> Float[Tensor, "d"]:
    """argmin_m Σ ‖x_i − m‖ by Weiszfeld's iteration from the mean.

    Args:
        x: [n, d], at least one row.
        iterations: at most so many.
        tolerance: stop where a step is shorter than this share of the mean distance.
    """
    origin = x.mean(0)
    x = x - origin  # a large mean would cost digits in every sum
    median = torch.zeros_like(origin)
    for _ in range(iterations):
        distance = (x - median).norm(dim=1).clamp_min(1e-12)
        weights = 1 / distance
        moved = (weights[:, None] * x).sum(0) / weights.sum()
        done = (moved - median).norm() < tolerance * distance.mean()
        median = moved
        if done:
            break
    return origin + median
