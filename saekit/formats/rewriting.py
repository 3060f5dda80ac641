"""The same dictionary in other weights: what packages compute in other ways, in the formulas of saekit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def upcast(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In float32 at least, as packages compute that load whatever is stored into float32."""
    return {name: value.to(torch.promote_types(value.dtype, torch.float32)) for name, value in weights.items()}


def scaled_rows(weights: Mapping[str, Tensor], norms: Tensor) -> dict[str, Tensor]:
    """Decoder rows divided by ``norms`` [d_sae] and features multiplied by them, in float32 at least.

    Where a norm is 0 the row stays, and the feature is silent.
    """
    w = upcast(weights)
    w |= {name: w[name] * norms for name in w.keys() & {"W_enc", "b_enc", "threshold"}}
    return {**w, "W_dec": w["W_dec"] / torch.where(norms > 0, norms, 1)[:, None]}


def with_b_dec(weights: Mapping[str, Tensor], sign: int) -> dict[str, Tensor]:
    """For a rule that subtracts b_dec from the input (``sign`` = 1), or that ceases to (−1); summed in float64."""
    shift = weights["b_dec"].double() @ weights["W_enc"].double()
    return {**weights, "b_enc": (weights["b_enc"].double() + sign * shift).to(weights["b_enc"].dtype)}


def gated(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A gated dictionary with one encoder matrix as the JumpReLU dictionary that it is, in float32 at least.

    With p = x W_enc, its features are relu(eʳ p + b_mag) where p + b_gate > 0, that is where eʳ p + b_mag exceeds
    b_mag − eʳ b_gate.
    """
    w = upcast(weights)
    scale = w["r_mag"].exp()
    threshold = w["b_mag"] - scale * w["b_gate"]
    kept = {"W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    return {**kept, "W_enc": w["W_enc"] * scale, "b_enc": w["b_mag"], "threshold": threshold}


def fold_units(weights: Mapping[str, Tensor], centre: Tensor, scale: float, *, thresholds: bool) -> None:
    """Change in place a dictionary of (x − centre) · scale into one of x, reconstructions too.

    With x' = s·(x − m): relu((x' − b)W + c)/s = relu((x − m − b/s)W + c/s), so biases and thresholds are divided by s
    and m joins b_dec, while both matrices stay and decoder rows keep unit norm.

    Args:
        weights: of a rule that subtracts b_dec from the input.
        centre: [d_in].
        scale: a positive number.
        thresholds: whether they are in units of x'; one in units of the token's norm stays.
    """
    weights["b_enc"].div_(scale)
    weights["b_dec"].div_(scale).add_(centre)
    if thresholds:
        weights["threshold"].div_(scale)
