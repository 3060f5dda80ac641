"""Training losses, each a plain function."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def reconstruction_loss(x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """‖x − x̂‖² over the total variance of x about its mean, both summed over the batch: the batch's FVU."""
    variance = (x - x.mean(0)).square().sum()
    return (x - x_hat).square().sum() / variance.clamp_min(1e-12)
