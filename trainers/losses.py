"""What losses are measured against."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def total_variance(x: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Σ ‖x − mean‖² over the batch."""
    return (x - x.mean(0)).square().sum().clamp_min(1e-12)
