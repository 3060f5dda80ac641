"""Numbers that are NaN or infinite, found in one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def not_finite(values: Float[Tensor, "*batch d"]) -> Bool[Tensor, "*batch"] | None:
    """The tokens with a number that is not finite; None where there are none."""
    if bool(torch.isfinite(values.detach().sum())):  # one pass; an overflow of the sum is told apart below
        return None
    bad = (~torch.isfinite(values)).any(-1)
    return bad if bool(bad.any()) else None


def place_of(bad: Bool[Tensor, "*batch"]) -> list[int]:
    """The indices of the first token that is marked."""
    return [int(i) for i in bad.nonzero()[0]]
