"""Codes found by search instead of by the encoder: what the dictionary could do at the same number of features."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from saekit.code import SparseCode
from saekit.errors import SaekitError
from saekit.sae import SparseAutoencoder

_CHUNK = 1 << 24  # inner products of tokens and features held at a time


@torch.no_grad()
def encode_by_pursuit(
    sae: SparseAutoencoder, x: Float[Tensor, "*batch d_in"], l0: Int[Tensor, "n"] | int | None = None
) -> SparseCode:
    """The code of the tokens of x by gradient pursuit with the decoder fixed; the encoder gives at most the L0.

    Each token starts from nothing, with the residual r = x − b_dec. As often as its L0 says, the feature whose decoder
    row has the largest signed inner product with r joins the token's support. Then the coefficients take one step along
    their gradient g, the inner products of the support's rows D with r. Its length is ⟨c, r⟩ / ⟨c, c⟩ with c = g D (an
    exact line search), and coefficients that it makes negative are set to 0.

    After 'Decomposing the dark matter of sparse autoencoders' (arXiv 2410.14670). Our reading: a feature that was set
    to 0 stays in the support and may grow again, so every step adds another one, even where no product is positive.

    Args:
        sae: a dictionary of any architecture; its decoder's rows may have any norm.
        x: [..., d_in], its leading dimensions flattened to n tokens.
        l0: [n] features of each token, or one number for all; those of ``sae.encode_sparse(x)`` if not given.

    Returns:
        The code, in the dictionary's dtype: at most ``l0`` features a token, since coefficients of 0 are left out.

    Raises:
        SaekitError: the last dimension of x is not d_in, or l0 is not n whole numbers between 0 and d_sae.
    """
    if l0 is None or x.shape[-1] != sae.cfg.d_in:  # encode_sparse names a wrong width
        l0 = sae.encode_sparse(x).matches_per_token()
    width, W_dec = sae.cfg.d_sae, sae.W_dec
    encoded, scale = sae.normalised(x.to(W_dec).reshape(-1, sae.cfg.d_in))
    signal = encoded - sae.b_dec
    counts = _checked(l0, len(signal), width).to(W_dec.device, torch.long)
    order = counts.argsort(descending=True, stable=True)  # those still searching are a chunk's first
    rows = max(1, _CHUNK // width)
    buffer = signal.new_empty(min(rows, len(signal)), width)
    tokens, features, values = [], [], []
    for part in torch.split(order, rows):
        support, coefficients = _pursue(signal[part], counts[part], W_dec, buffer)
        row, place = (coefficients > 0).nonzero().unbind(1)
        tokens.append(part[row])
        features.append(support[row, place])
        values.append(coefficients[row, place])
    token, by_token = torch.cat(tokens).sort(stable=True)
    return SparseCode(token, torch.cat(features)[by_token], torch.cat(values)[by_token], len(signal), width, scale)


def _checked(l0: Int[Tensor, "n"] | int, n: int, width: int) -> Int[Tensor, "n"]:
    """One whole number between 0 and ``width`` for each token."""
    counts = torch.full((n,), l0) if isinstance(l0, int) else l0
    if counts.shape != (n,) or counts.is_floating_point():
        raise SaekitError(f"l0 is {n} whole numbers, one a token, not {list(counts.shape)} {counts.dtype}")
    if n and not 0 <= int(counts.min()) <= int(counts.max()) <= width:
        raise SaekitError(
            f"l0 from {int(counts.min())} to {int(counts.max())} is not between 0 and the {width} features"
        )
    return counts


def _pursue(
    signal: Float[Tensor, "n d"], counts: Int[Tensor, "n"], W_dec: Float[Tensor, "F d"], buffer: Float[Tensor, "r F"]
) -> tuple[Int[Tensor, "n t"], Float[Tensor, "n t"]]:
    """The features found for tokens whose ``counts`` descend, and their coefficients, 0 beyond a token's count."""
    steps = int(counts[0]) if len(counts) else 0
    residual = signal.clone()
    features = counts.new_zeros(len(signal), steps)
    coefficients = signal.new_zeros(len(signal), steps)
    tiny = torch.finfo(signal.dtype).tiny
    for step in range(steps):
        n = int((counts > step).sum())
        products = torch.mm(residual[:n], W_dec.T, out=buffer[:n])
        gradient = products.gather(1, features[:n, :step])
        best = products.scatter_(1, features[:n, :step], -torch.inf).max(1)
        features[:n, step] = best.indices
        gradient = torch.cat([gradient, best.values[:, None]], 1)
        support, weights = features[:n, : step + 1], coefficients[:n, : step + 1]
        c = F.embedding_bag(support, W_dec, mode="sum", per_sample_weights=gradient)
        length = (c * residual[:n]).sum(1) / c.square().sum(1).clamp_min(tiny)  # c = 0 makes no step
        weights.addcmul_(gradient, length[:, None]).clamp_min_(0)
        torch.sub(signal[:n], F.embedding_bag(support, W_dec, mode="sum", per_sample_weights=weights), out=residual[:n])
    return features, coefficients
