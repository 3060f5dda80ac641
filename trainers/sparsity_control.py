"""A penalty whose weight is driven towards a mean number of active features, so that runs are asked for by their L0."""

from __future__ import annotations

import math

_START = 1e-3  # weight before the first step
_RATE = 0.02  # by which the logarithm of the weight moves a step, where L0 is off by a factor of e or more


class SparsityControl:
    """The weight of a sparsity penalty, fixed or driven (our reading: an integral controller on log L0).

    Attributes:
        weight: of the penalty now.
        k: mean number of active features a token that is aimed at; None where the weight is fixed.
    """

    def __init__(self, weight: float | None, k: int) -> None:
        self.weight = _START if weight is None else weight
        self.k = k if weight is None else None

    def update(self, l0: float) -> None:
        """Look at the L0 of one batch."""
        if self.k is not None:
            off = math.log(max(l0, 1e-3) / self.k)
            self.weight *= math.exp(_RATE * min(1.0, max(-1.0, off)))
