"""A control with planted errors: which estimates of the linear and nonlinear error recover what was put in?"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.code import SparseCode
from saekit.errors import SaekitError
from saekit.evals.dark_matter.least_squares import Moments, fit_linear
from saekit.evals.dark_matter.splits import in_test_half
from saekit.sae import SparseAutoencoder


@torch.no_grad()
def synthetic_control(
    sae: SparseAutoencoder,
    x: Float[Tensor, "n d"],
    *,
    activation_noise: float = 0.0,
    reconstruction_noise: float = 0.0,
    removed: float = 0.0,
    documents: Int[Tensor, "n"] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Take apart an error whose parts are known, made of a dictionary's own output (arXiv 2410.14670).

    Activations are x' = SAE(x) + noise, reconstructions x̂' = SAE(x) without each token's weakest matches + other noise.
    So e' = x' − x̂' has three planted parts: matches that are *absent*, noise of the *activations* (linear in x' as far
    as it stands out of it), and noise *introduced* into the reconstructions, of which x' knows nothing. Units of noise
    and which matches are weakest (of each token) are our reading.

    Args:
        sae: the dictionary.
        x: [n, d] activations.
        activation_noise, reconstruction_noise: standard deviations of the Gaussian noise, in units of the root mean
            square of an entry of the dictionary's real error.
        removed: share of each token's matches that is left out of x̂', the weakest first.
        documents: [n] to split by; by token if not given.
        seed: of noise and split.

    Returns:
        tokens; planted_absent, planted_activation, planted_introduced: mean squared norms a token; linear, nonlinear:
        the estimates' mean squared norms, on the half that nothing was fitted on; r2_pooled; and
        nonlinear_over_introduced: 1 where the nonlinear error is just what was introduced, None where nothing was.

    Raises:
        SaekitError: there are fewer than 4·d tokens, or the split leaves one half empty.
    """
    generator = torch.Generator().manual_seed(seed)
    code = sae.encode_sparse(x)
    clean = sae.decode(code).cpu()
    unit = float((x.cpu() - clean).square().mean().sqrt())
    noise = [
        size * unit * torch.randn(clean.shape, generator=generator) for size in (activation_noise, reconstruction_noise)
    ]
    kept = sae.decode(without_weakest(code, removed)).cpu()
    x_new, x_hat = clean + noise[0], kept + noise[1]
    numbers = torch.arange(len(x)) if documents is None else documents
    test = in_test_half(numbers, seed)
    halves = [Moments.zeros(x.shape[1], x.shape[1]) for _ in range(2)]
    for moments, rows in zip(halves, (~test, test), strict=True):
        moments.update(x_new[rows], (x_new - x_hat)[rows])
    if not (halves[0].n and halves[1].n) or len(x) < 4 * x.shape[1]:
        raise SaekitError(
            f"{len(x):,} tokens, {halves[1].n:,} of them to test on, are too few for a control at width {x.shape[1]}"
        )
    b = fit_linear(halves[0], intercept=False)
    planted = [float(part[test].square().sum(1).double().mean()) for part in (clean - kept, *noise)]
    nonlinear = float(halves[1].residuals(b).sum()) / halves[1].n
    linear = float((b.weight * (halves[1].xx @ b.weight)).sum()) / halves[1].n
    share = nonlinear / planted[2] if planted[2] else math.nan
    return {
        "tokens": halves[1].n,
        "planted_absent": planted[0],
        "planted_activation": planted[1],
        "planted_introduced": planted[2],
        "linear": linear,
        "nonlinear": nonlinear,
        "r2_pooled": halves[1].r2(b).pooled,
        "nonlinear_over_introduced": share if math.isfinite(share) else None,
    }


def without_weakest(code: SparseCode, share: float) -> SparseCode:
    """The code without this share of each token's matches (rounded to whole ones), the smallest values first."""
    by_value = code.values.argsort(stable=True)
    order = by_value[code.tokens[by_value].argsort(stable=True)]  # within each token ascending
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - code.offsets[code.tokens[order]]
    drop = (share * code.matches_per_token()).round().long()
    return code.where(rank >= drop[code.tokens])
