"""Allocation rules: which tokens may match which features, under one budget of matches a batch.

Each rule is a pure function of pre-activations and a budget, and knows nothing of training. relu is applied after the
selection (our reading; the paper, arXiv 2411.02124, is silent), so a selected entry that is not positive is dropped and
the realised L0 is at most the budget. Ties go to the smaller index. Values carry the gradients of ``pre``.

Rules that compare pairs of different tokens take ``token_norms`` [n], the ‖x − b_dec‖ of each token, optionally: then
they select by pre / norm, so that a token with a large norm does not draw the budget of others, while the values stay
relu(pre) (our reading).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saekit.code import SparseCode
from saekit.errors import SaekitError
from saekit.kernels.select import largest_in_all, largest_in_columns, largest_in_rows
from saekit.zipf import zipf_budgets

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = [
    "feature_choice",
    "gradient_choice",
    "influence_of",
    "mutual_choice",
    "threshold_choice",
    "token_choice",
    "zipf_budgets",
]


def check_k(k: int, width: int, beta: float = 0.0) -> None:
    """Raise SaekitError where k features a token, weighed by beta, cannot be chosen of ``width``."""
    if not 1 <= k <= width:
        raise SaekitError(f"k = {k} is not between 1 and the {width} features of the dictionary")
    if not beta >= 0:
        raise SaekitError(f"beta = {beta} is negative; it is 0 (plain TopK) or more")


def check_total(total: int, n: int, width: int) -> None:
    """Raise SaekitError where a batch of n tokens has no ``total`` pairs."""
    if not 1 <= total <= n * width:
        raise SaekitError(f"{total} matches are not between 1 and the {n} × {width} pairs of the batch")


def check_budgets(budgets: Int[Tensor, "F"], n: int, width: int) -> None:
    """Raise SaekitError where the budgets are not ``width`` whole numbers between 0 and n."""
    if budgets.shape != (width,) or budgets.is_floating_point():
        raise SaekitError(
            f"budgets are {width} whole numbers, one a feature, not {list(budgets.shape)} {budgets.dtype}"
        )
    if int(budgets.min()) < 0 or int(budgets.max()) > n:
        raise SaekitError(
            f"budgets from {int(budgets.min())} to {int(budgets.max())} are impossible for a batch of {n} tokens"
        )


def _matches(pre: Float[Tensor, "n F"], tokens: Int[Tensor, "m"], features: Int[Tensor, "m"]) -> SparseCode:
    """The code of the given pairs, those not positive left out."""
    values = pre[tokens, features]
    positive = values > 0
    return SparseCode(tokens[positive], features[positive], values[positive], *pre.shape)


def _comparable(pre: Float[Tensor, "n F"], token_norms: Float[Tensor, "n"] | None) -> Float[Tensor, "n F"]:
    """What pairs are compared by."""
    return pre.detach() if token_norms is None else pre.detach() / token_norms.detach().clamp_min(1e-12)[:, None]


def token_choice(pre: Float[Tensor, "n F"], k: int) -> SparseCode:
    """Each token matches the k features of its largest pre-activations (TopK).

    Args:
        pre: [n, F] pre-activations.
        k: matches a token, 1 to F.

    Raises:
        SaekitError: k is out of bounds.
    """
    n, width = pre.shape
    check_k(k, width)
    features = largest_in_rows(pre.detach(), k)
    tokens = torch.arange(n, device=pre.device).repeat_interleave(k)
    return _matches(pre, tokens, features.flatten())


def mutual_choice(pre: Float[Tensor, "n F"], total: int, token_norms: Float[Tensor, "n"] | None = None) -> SparseCode:
    """The ``total`` largest pre-activations of the whole batch match, whichever tokens and features they belong to.

    Args:
        pre: [n, F] pre-activations.
        total: matches in the whole batch (M = k·n for a mean of k a token), 1 to n·F.
        token_norms: [n], to select by pre / norm.

    Raises:
        SaekitError: the total is out of bounds.
    """
    n, width = pre.shape
    check_total(total, n, width)
    pairs = largest_in_all(_comparable(pre, token_norms).contiguous(), total)
    return _matches(pre, pairs.div(width, rounding_mode="floor"), pairs % width)


def feature_choice(
    pre: Float[Tensor, "n F"], budgets: Int[Tensor, "F"], token_norms: Float[Tensor, "n"] | None = None
) -> SparseCode:
    """Each feature j matches the ``budgets[j]`` tokens of its largest pre-activations.

    Args:
        pre: [n, F] pre-activations.
        budgets: [F] whole numbers, 0 to n each.
        token_norms: [n], to select by pre / norm.

    Raises:
        SaekitError: the budgets are not F whole numbers between 0 and n.
    """
    n, width = pre.shape
    check_budgets(budgets, n, width)
    tokens, features = largest_in_columns(_comparable(pre, token_norms), budgets.to(pre.device))
    return _matches(pre, tokens, features)


def influence_of(gradients: Float[Tensor, "n d"], W_dec: Float[Tensor, "F d"]) -> Float[Tensor, "n F"]:
    """|g W_decᵀ| / s_g: how strongly each feature's direction moves the loss, without gradients.

    s_g is the root mean square of |g W_decᵀ| over the batch, so that β means the same for every model (our reading).

    Args:
        gradients: [n, d] of the model's loss at the activations.
        W_dec: [F, d] decoder.
    """
    influence = (gradients.detach() @ W_dec.detach().T).abs_()
    rms = influence.norm() / influence.numel() ** 0.5
    return influence.div_(rms.clamp_min(torch.finfo(influence.dtype).tiny))


def gradient_choice(pre: Float[Tensor, "n F"], influence: Float[Tensor, "n F"], k: int, beta: float) -> SparseCode:
    """Each token matches the k features of largest score A ∘ (1 + β·influence), A = relu(pre); the values are plain A.

    The score is that of gradient TopK (arXiv 2411.10397: z + β·z∘|W_decᵀ∇L|); the scale of ``influence`` and taking A
    for z are our reading. β = 0 is ``token_choice``, bit for bit.

    Args:
        pre: [n, F] pre-activations.
        influence: [n, F] not negative, as ``influence_of`` gives it.
        k: matches a token, 1 to F.
        beta: weight of the influence, at least 0.

    Raises:
        SaekitError: k or beta is out of bounds, or the shapes differ.
    """
    n, width = pre.shape
    check_k(k, width, beta)
    if influence.shape != pre.shape:
        raise SaekitError(f"influence of shape {list(influence.shape)} does not fit {list(pre.shape)} pre-activations")
    if beta == 0:
        return token_choice(pre, k)
    score = torch.relu(pre.detach())
    score.addcmul_(score, influence.detach(), value=beta)
    features = largest_in_rows(score, k)
    tokens = torch.arange(n, device=pre.device).repeat_interleave(k)
    return _matches(pre, tokens, features.flatten())


def threshold_choice(
    pre: Float[Tensor, "n F"], threshold: Float[Tensor, "#F"], token_norms: Float[Tensor, "n"] | None = None
) -> SparseCode:
    """Every pair whose pre-activation is positive and above its feature's threshold matches (jumprelu inference).

    Args:
        pre: [n, F] pre-activations.
        threshold: [F], or [1] for one threshold for all features. The comparison is strict.
        token_norms: [n], to compare pre / norm with the threshold.
    """
    chosen = (_comparable(pre, token_norms) > threshold.clamp(min=0)).nonzero()
    return _matches(pre, chosen[:, 0], chosen[:, 1])
