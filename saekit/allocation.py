"""Allocation rules: which tokens may match which features, under one budget of matches a batch.

Each rule is a pure function of pre-activations and a budget, and knows nothing of training. relu is applied after the
selection (our reading; the paper, arXiv 2411.02124, is silent), so a selected entry that is not positive is dropped and
the realised L0 is at most the budget. Ties go to the smaller index. Values carry the gradients of ``pre``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saekit.code import SparseCode
from saekit.errors import SaekitError
from saekit.kernels.select import largest_in_all, largest_in_rows

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def _matches(pre: Float[Tensor, "n F"], tokens: Int[Tensor, "m"], features: Int[Tensor, "m"]) -> SparseCode:
    """The code of the given pairs, those not positive left out."""
    values = pre[tokens, features]
    positive = values > 0
    return SparseCode(tokens[positive], features[positive], values[positive], *pre.shape)


def token_choice(pre: Float[Tensor, "n F"], k: int) -> SparseCode:
    """Each token matches the k features of its largest pre-activations (TopK).

    Args:
        pre: [n, F] pre-activations.
        k: matches a token, 1 to F.

    Raises:
        SaekitError: k is out of bounds.
    """
    n, width = pre.shape
    if not 1 <= k <= width:
        raise SaekitError(f"k = {k} is not between 1 and the {width} features of the dictionary")
    features = largest_in_rows(pre.detach(), k)
    tokens = torch.arange(n, device=pre.device).repeat_interleave(k)
    return _matches(pre, tokens, features.flatten())


def mutual_choice(pre: Float[Tensor, "n F"], total: int) -> SparseCode:
    """The ``total`` largest pre-activations of the whole batch match, whichever tokens and features they belong to.

    Args:
        pre: [n, F] pre-activations.
        total: matches in the whole batch (M = k·n for a mean of k a token), 1 to n·F.

    Raises:
        SaekitError: the total is out of bounds.
    """
    n, width = pre.shape
    if not 1 <= total <= n * width:
        raise SaekitError(f"{total} matches are not between 1 and the {n} × {width} pairs of the batch")
    pairs = largest_in_all(pre.detach().contiguous(), total)
    return _matches(pre, pairs.div(width, rounding_mode="floor"), pairs % width)


def threshold_choice(pre: Float[Tensor, "n F"], threshold: Float[Tensor, "#F"]) -> SparseCode:
    """Every pair whose pre-activation is positive and above its feature's threshold matches (jumprelu inference).

    Args:
        pre: [n, F] pre-activations.
        threshold: [F], or [1] for one threshold for all features. The comparison is strict.
    """
    chosen = (pre.detach() > threshold.clamp(min=0)).nonzero()
    return _matches(pre, chosen[:, 0], chosen[:, 1])
