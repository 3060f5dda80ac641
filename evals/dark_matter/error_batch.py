"""Activations beside what a dictionary made of them."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor


class ErrorBatch(NamedTuple):
    """m tokens and what a dictionary made of them.

    Attributes:
        x: [m, d] activations.
        x_hat: [m, d] their reconstructions, by any means.
        documents: [m] numbers of their documents; if not known, each token is a document of its own.
        tokens: [m] token ids, for the baseline of the token's mean.
        l0: [m] active features of each token, for a baseline.
        losses: [m] the model's nats of the next token, for a baseline.
    """

    x: Float[Tensor, "m d"]
    x_hat: Float[Tensor, "m d"]
    documents: Int[Tensor, "m"] | None = None
    tokens: Int[Tensor, "m"] | None = None
    l0: Float[Tensor, "m"] | None = None
    losses: Float[Tensor, "m"] | None = None
