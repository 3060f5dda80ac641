"""What the few tokens of an extreme norm do to the figures: attention sinks can hold nearly all of the variance."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.errors import SaekitWarning

_STEPS = 64  # in which norms are told apart: so many a doubling, 1.1% each
_BEYOND = round(_STEPS * math.log2(10))  # from the median's to the first outlier's
_ZERO = math.floor(_STEPS * math.log2(torch.finfo(torch.float64).tiny))  # where a norm of 0 is counted
_MUCH = 0.1  # of the variance


class Outliers:
    """FVU without the tokens whose ‖x‖ is beyond 10 times the median norm, over a stream of (x, x̂).

    The median is known at the end alone, so sums are kept by steps of log ‖x‖, 64 a doubling. A token is an outlier
    where its step is at least 213 above the median's: the limit is 9.9 to 10.1 times the median (our reading), and how
    the stream is cut changes nothing. Memory is d + 3 numbers a step that occurs: 3 MB at d = 1,000 where the norms
    differ by a factor of 64, however many the tokens.
    """

    def __init__(self, d_in: int) -> None:
        self.steps = torch.zeros(0, dtype=torch.long)  # ascending
        self.sums = torch.zeros(0, d_in + 3, dtype=torch.float64)  # of x, ‖x‖² and ‖x − x̂‖² at each, and tokens

    def update(self, x: Float[Tensor, "n d"], norms: Float[Tensor, "n"], errors: Float[Tensor, "n"]) -> None:
        """Count one batch.

        Args:
            x: activations, about any origin that stays the same.
            norms: ‖x‖ about zero.
            errors: ‖x − x̂‖².
        """
        step = torch.floor(_STEPS * norms.log2()).clamp_min(_ZERO).long()
        steps: Tensor = torch.unique(torch.cat([self.steps, step]))
        sums = torch.zeros(len(steps), self.sums.shape[1], dtype=torch.float64)
        sums[torch.searchsorted(steps, self.steps)] = self.sums
        columns = torch.stack([x.square().sum(1), errors, torch.ones_like(errors)], dim=1)
        sums.index_add_(0, torch.searchsorted(steps, step), torch.cat([x, columns], dim=1))
        self.steps, self.sums = steps, sums

    def result(self, fvu: float) -> dict[str, float | int]:
        """The figures, given the FVU of all tokens.

        Keys:
            fvu_without_outliers: the FVU of all other tokens, about their own mean.
            outliers: how many tokens are beyond 10 times the median norm.
            outlier_variance_share: of Σ‖x − x̄‖² over all tokens, what those hold.
        """
        counts = self.sums[:, -1]
        median = int(self.steps[counts.cumsum(0) >= counts.sum() / 2][0])
        out = (self.steps >= median + _BEYOND) & (median > _ZERO)  # beside norms of 0 all would be
        if not bool(out.any()):
            return {"fvu_without_outliers": fvu, "outliers": 0, "outlier_variance_share": 0.0}
        total, rest, few = (part.sum(0) for part in (self.sums, self.sums[~out], self.sums[out]))
        mean = total[:-3] / total[-1]
        held = float(few[-3] - 2 * few[:-3] @ mean + few[-1] * mean.square().sum())
        variance = float(total[-3] - total[-1] * mean.square().sum())
        left = float(rest[-3] - rest[:-3].square().sum() / rest[-1])
        error = float(rest[-2])
        return {
            "fvu_without_outliers": error / left if left > 0 else (0.0 if error == 0 else math.inf),
            "outliers": int(few[-1]),
            "outlier_variance_share": min(1.0, held / variance),
        }


def warn_of_outliers(found: Mapping[str, Any]) -> None:
    """Say it where a few tokens hold more than a tenth of the variance: FVU tells little of all others then."""
    if found["outlier_variance_share"] > _MUCH:
        warnings.warn(
            f"{found['outliers']:,} of {found['tokens']:,} tokens have more than 10 times the median norm and hold "
            f"{found['outlier_variance_share']:.0%} of the variance: FVU is {found['fvu']:.4f} with them and "
            f"{found['fvu_without_outliers']:.4f} without; --max-norm or --skip-first leave them out",
            SaekitWarning,
            stacklevel=2,
        )
