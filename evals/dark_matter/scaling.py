"""How a dictionary's error and its nonlinear part change with the width of the dictionary (arXiv 2410.14670)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saekit.evals.dark_matter.decomposition import Norms
from saekit.evals.dark_matter.least_squares import Moments, fit_linear

_DRAWS, _LAW_DRAWS = 1000, 200
_INTERVAL = (5, 95)  # percent


class WidthLaw(NamedTuple):
    """FVU(F) ≈ c + a · F^(−m), F the number of features.

    Attributes:
        c: what no width would explain; a and m: how fast the rest falls.
        rms: root of the mean squared residual.
    """

    c: float
    a: float
    m: float
    rms: float

    def __call__(self, width: float | Float[np.ndarray, "w"]) -> Float[np.ndarray, "w"]:
        """The law at some widths."""
        return np.asarray(self.c + self.a * np.asarray(width, dtype=float) ** -self.m)


def fit_width_law(widths: Sequence[float], values: Sequence[float]) -> WidthLaw:
    """The law c + a·F^(−m) with c, a ≥ 0 nearest to the values by least squares; m is sought between 0.01 and 4.

    Three widths or more; with three the law goes through them, wherever it can.
    """
    F, y = np.asarray(widths, dtype=float), np.asarray(values, dtype=float)
    exponents = np.geomspace(0.01, 4, 600)
    best = _best(F, y, exponents)
    for step in (2e-2, 5e-4, 1e-5):  # about the best exponent, on finer and finer grids
        near = np.linspace(1 - step, 1 + step, 101) * best.m
        best = min(best, _best(F, y, near.clip(0.01, 4)), key=lambda law: law.rms)
    return best


def _best(F: np.ndarray, y: np.ndarray, exponents: np.ndarray) -> WidthLaw:
    """The best law for one of these exponents: for each, c and a follow by linear least squares."""
    powers = (F / F.min()) ** -exponents[:, None]
    centred = powers - powers.mean(1, keepdims=True)
    a = (centred @ y / np.square(centred).sum(1).clip(1e-300)).clip(0)
    c = y.mean() - a * powers.mean(1)
    through_zero = c < 0
    a = np.where(through_zero, powers @ y / np.square(powers).sum(1), a)
    c = np.where(through_zero, 0.0, c)
    rms = np.sqrt(np.square(y - c[:, None] - a[:, None] * powers).mean(1))
    i = int(rms.argmin())
    return WidthLaw(float(c[i]), float(a[i] * F.min() ** exponents[i]), float(exponents[i]), float(rms[i]))


def width_scaling(
    widths: Sequence[int],
    squares: Float[np.ndarray, "w blocks"],
    variance: Float[np.ndarray, "blocks"],
    seed: int = 0,
) -> dict[str, Any]:
    """FVU against width for dictionaries of like sparsity, with intervals over documents.

    Intervals are from the 5th to the 95th percentile over 1,000 draws of groups of documents (200 for the law), with
    replacement, the same for all widths. They say what other text would change, not what another training run would.

    Args:
        widths: numbers of features.
        squares: Σ‖residual‖² of each width in groups of documents.
        variance: Σ‖x − x̄‖² in the same groups.
        seed: of the draws.

    Returns:
        widths; fvu and fvu_interval of each; slope (of log FVU against log width) and slope_interval; and for three
        widths or more law (c, a, m, rms) and law_interval.
    """
    generator = np.random.default_rng(seed)
    squares, variance = squares[:, variance > 0], variance[variance > 0]  # few documents leave groups empty
    picks = generator.integers(len(variance), size=(_DRAWS, len(variance)))
    fvu = squares.sum(1) / variance.sum()
    drawn = squares[:, picks].sum(2) / variance[picks].sum(1)  # [w, draws]
    x = np.log(np.asarray(widths, dtype=float))
    x = x - x.mean()
    figures: dict[str, Any] = {"widths": list(widths), "fvu": fvu.tolist()}
    figures["fvu_interval"] = np.percentile(drawn, _INTERVAL, axis=1).T.tolist()
    if len(widths) > 1:
        figures["slope"] = float(x @ np.log(fvu) / (x @ x))
        figures["slope_interval"] = np.percentile(x @ np.log(drawn) / (x @ x), _INTERVAL).tolist()
    if len(widths) > 2:
        laws = np.array([fit_width_law(widths, values) for values in drawn[:, :_LAW_DRAWS].T])
        figures["law"] = fit_width_law(widths, fvu)._asdict()
        interval = np.percentile(laws, _INTERVAL, axis=0).T.tolist()
        figures["law_interval"] = dict(zip(("c", "a", "m"), interval, strict=False))
    return figures


class TokenScaling:
    """How well the error of one dictionary foretells another's, token by token, summed over a stream of batches."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.halves = [Moments.zeros(2 * len(names), len(names)) for _ in range(2)]

    def update(self, norms: Mapping[str, Norms]) -> None:
        """Count one batch: the norms that every dictionary has on the same tokens."""
        errors = torch.stack([norms[name].error for name in self.names], dim=1)
        nonlinear = torch.stack([norms[name].nonlinear for name in self.names], dim=1)
        test = norms[self.names[0]].test
        for moments, rows in zip(self.halves, (~test, test), strict=True):
            moments.update(torch.cat([errors, nonlinear], dim=1)[rows], errors[rows])

    def between(self, small: str, large: str) -> dict[str, float]:
        """‖e‖ of the larger dictionary regressed on that of the smaller, with an intercept, on the half to test on.

        Returns:
            r2: from the smaller one's ‖e‖; r2_with_nonlinear: from its ‖nonlinear‖ too; gain: the share of what the
            first leaves that the second explains.
        """
        i, j = self.names.index(small), self.names.index(large)
        r2 = [self._r2(torch.tensor(columns), j) for columns in ([i], [i, i + len(self.names)])]
        gain = (r2[1] - r2[0]) / (1 - r2[0]) if r2[0] != 1 else 0.0
        return {"r2": r2[0], "r2_with_nonlinear": r2[1], "gain": gain}

    def _r2(self, inputs: Tensor, target: int) -> float:
        train, test = (
            Moments(m.n, m.x_sum, m.y_sum[[target]], m.xx, m.xy[:, [target]], m.yy[[target]]).inputs(inputs)
            for m in self.halves
        )
        return test.r2(fit_linear(train, intercept=True, warn=False)).pooled


def alike(l0: Mapping[str, float], tolerance: float = 1.25) -> list[list[str]]:
    """Names in groups of like sparsity: in the order of L0, a new group begins where L0 exceeds the group's first."""
    groups: list[list[str]] = []
    for name in sorted(l0, key=lambda each: l0[each]):
        if not groups or l0[name] > tolerance * max(l0[groups[-1][0]], math.ulp(0)):
            groups.append([])
        groups[-1].append(name)
    return groups
