"""The gradients of the reconstruction loss, by hand: every sum touches the matches of the batch alone.

With z = relu((x − b_dec) W_enc + b_enc) at the matches, x̂ = z W_dec + b_dec, loss = ‖x − x̂‖² / V, V the batch's total
variance, and G = ∂loss/∂x̂ = c (x − x̂) with c = −2 / V:

    ∂z = ⟨G, W_dec⟩ at each match     ∂W_dec = Σ z G     ∂W_enc = Σ ∂z (x − b_dec)     ∂b_enc = Σ ∂z
    ∂b_dec = Σ G − W_enc ∂b_enc, since b_dec enters every match through x − b_dec

The sums of the first line go over each feature's matches. The slope of relu is 1 there: every match is positive.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.code import SparseCode
from saekit.kernels.pairs import pair_products, sum_by_feature
from saekit.sae import SparseAutoencoder


@torch.no_grad()
def reconstruction_gradients(
    sae: SparseAutoencoder,
    centred: Float[Tensor, "n d"],
    code: SparseCode,
    error: Float[Tensor, "n d"],
    c: Float[Tensor, ""],
) -> None:
    """Write the loss's gradients into every parameter's ``grad``, a buffer that is made once.

    Args:
        sae: the dictionary.
        centred: [n, d] x − b_dec.
        code: the matches of the batch, with their values.
        error: [n, d] x − x̂.
        c: ∂loss/∂x̂ = c · error.
    """
    W_enc, b_enc, W_dec, b_dec = (gradient_of(p) for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))
    at_values = c * pair_products(error, sae.W_dec, code)
    sum_by_feature(error, c * code.values, code, out=W_dec)
    sum_by_feature(centred, at_values, code, out=W_enc.T)
    b_enc.zero_().index_add_(0, code.features, at_values)
    torch.sub(c * error.sum(0), sae.W_enc @ b_enc, out=b_dec)


@torch.no_grad()
def add_through_encoder(
    sae: SparseAutoencoder, centred: Float[Tensor, "n d"], code: SparseCode, at_values: Float[Tensor, "m"]
) -> None:
    """Add what gradients at the pre-activations of some pairs mean for W_enc, b_enc and b_dec.

    Args:
        sae: the dictionary.
        centred: [n, d] x − b_dec.
        code: the pairs.
        at_values: [m] ∂loss/∂((x − b_dec) W_enc + b_enc) at each.
    """
    at_b_enc = torch.zeros_like(sae.b_enc).index_add_(0, code.features, at_values)
    gradient_of(sae.W_enc).T.add_(sum_by_feature(centred, at_values, code))
    gradient_of(sae.b_enc).add_(at_b_enc)
    gradient_of(sae.b_dec).sub_(sae.W_enc @ at_b_enc)


def gradient_of(parameter: Tensor) -> Tensor:
    """The buffer of a parameter's gradient, made where there is none."""
    if parameter.grad is None:
        parameter.grad = torch.empty_like(parameter)
    return parameter.grad
