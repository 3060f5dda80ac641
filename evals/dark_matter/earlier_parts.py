"""Whether dictionaries of earlier parts of the model know what this one misses.

The error of a dictionary, its linear and its nonlinear part are regressed on the *reconstructions* that dictionaries of
other hook points (the residual stream a block before, the attention's and the MLP's output) make of the same tokens
(arXiv 2410.14670).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saekit.evals.dark_matter.least_squares import LinearMap, Moments, fit_linear

TOGETHER = "together"


class EarlierParts:
    """Regressions on several reconstructions, each alone and all together, summed over a stream of batches."""

    def __init__(self, widths: Mapping[str, int], d: int) -> None:
        """For reconstructions of these names and widths, and an error of width d."""
        self.columns: dict[str, slice] = {}
        total = 0
        for name, width in widths.items():
            self.columns[name] = slice(total, total + width)
            total += width
        if len(widths) > 1:
            self.columns[TOGETHER] = slice(0, total)
        self.d = d
        self.halves = [Moments.zeros(total, 2 * d) for _ in range(2)]

    def update(
        self,
        reconstructions: Mapping[str, Float[Tensor, "m w"]],
        x: Float[Tensor, "m d"],
        x_hat: Float[Tensor, "m d"],
        test: Bool[Tensor, "m"],
    ) -> None:
        """Count one batch; ``test`` says which of its tokens are in the half to test on."""
        z = torch.cat([reconstructions[name].cpu() for name in self.columns if name != TOGETHER], dim=1)
        x, x_hat = x.cpu().double(), x_hat.cpu().double()
        y = torch.cat([x, x - x_hat], dim=1)
        for moments, rows in zip(self.halves, (~test, test), strict=True):
            moments.update(z[rows], y[rows])

    def result(self, b: LinearMap, halves: tuple[Moments, Moments]) -> dict[str, dict[str, dict[str, Any]]]:
        """R² on the half to test on, fitted with an intercept on the other.

        Args:
            b: the map from x to the linear error.
            halves: moments of x → e of either half of the tokens.

        Returns:
            Of each reconstruction, and of all together: ``error``, ``linear`` and ``nonlinear``, each with r2 (the
            unweighted mean over dimensions) and r2_pooled.
        """
        figures: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in self.columns}
        for target in ("error", "linear", "nonlinear"):
            train, test = (
                self._towards(target, mine, known, b) for mine, known in zip(self.halves, halves, strict=True)
            )
            for name, columns in self.columns.items():
                fit = fit_linear(train.inputs(columns), intercept=True, warn=False)
                r2 = test.inputs(columns).r2(fit)
                figures[name][target] = {"r2": r2.mean, "r2_pooled": r2.pooled}
        return figures

    def _towards(self, target: str, moments: Moments, known: Moments, b: LinearMap) -> Moments:
        """The moments of z → e, x b* or e − x b*: these are linear in (x, e), of which everything is known."""
        d, w = self.d, b.weight
        zx, ze, x_sum, e_sum = moments.xy[:, :d], moments.xy[:, d:], moments.y_sum[:d], moments.y_sum[d:]
        linear = (zx @ w, x_sum @ w, (w * (known.xx @ w)).sum(0))
        zy, y_sum, yy = {
            "error": (ze, e_sum, known.yy),
            "linear": linear,
            "nonlinear": (ze - linear[0], e_sum - linear[1], known.residuals(b)),
        }[target]
        return Moments(moments.n, moments.x_sum, y_sum, moments.xx, zy, yy)
