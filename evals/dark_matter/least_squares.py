"""Linear regression from sums over tokens: one pass, memory that does not grow with the tokens, solved in float64."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.errors import SaekitWarning

_SAFE_PIVOT = 1e-10  # of the scaled Gram matrix; below it the eigenvalues are looked at
_RANK = 1e-12  # eigenvalues below this share of the largest are rounding


class R2(NamedTuple):
    """Shares of the targets' variance that a map explains; below zero where their mean does better.

    Attributes:
        mean: the unweighted mean of the p targets' own shares (those without variance are left out).
        pooled: 1 − Σ squared residuals / Σ squared deviations from the mean, both summed over all targets.
    """

    mean: float
    pooled: float


@dataclass(frozen=True)
class LinearMap:
    """x ↦ x weight + bias.

    Attributes:
        weight: [d, p] in float64.
        bias: [p] in float64, zero where it was fitted without an intercept.
        rank: of the inputs that it was fitted on; below d, the map is one of many that fit equally well.
    """

    weight: Float[Tensor, "d p"]
    bias: Float[Tensor, "p"]
    rank: int

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n p"]:
        """The predictions, in the dtype and on the device of x."""
        return torch.addmm(self.bias.to(x), x, self.weight.to(x))


@dataclass
class Moments:
    """What n tokens say about regressing targets y [p] on inputs x [d]: sums in float64.

    Moments of different tokens add up by ``+``.

    Attributes:
        n: number of tokens.
        x_sum: [d] and y_sum: [p], sums.
        xx: [d, d] Σ xᵀx; xy: [d, p] Σ xᵀy; yy: [p] Σ y².
    """

    n: int
    x_sum: Float[Tensor, "d"]
    y_sum: Float[Tensor, "p"]
    xx: Float[Tensor, "d d"]
    xy: Float[Tensor, "d p"]
    yy: Float[Tensor, "p"]

    @classmethod
    def zeros(cls, d: int, p: int) -> Moments:
        """Of no tokens yet."""
        shapes = ((d,), (p,), (d, d), (d, p), (p,))
        return cls(0, *(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def update(self, x: Float[Tensor, "n d"], y: Float[Tensor, "n p"]) -> None:
        """Count further tokens."""
        x, y = x.detach().cpu().double(), y.detach().cpu().double()
        self.n += len(x)
        self.x_sum += x.sum(0)
        self.y_sum += y.sum(0)
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)
        self.yy += y.square().sum(0)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.n + other.n, *(a + b for a, b in zip(self._sums, other._sums, strict=True)))

    @property
    def _sums(self) -> tuple[Tensor, ...]:
        return self.x_sum, self.y_sum, self.xx, self.xy, self.yy

    def inputs(self, columns: Int[Tensor, "c"] | slice) -> Moments:
        """Of some of the inputs alone."""
        xx = self.xx[columns][:, columns]
        return Moments(self.n, self.x_sum[columns], self.y_sum, xx, self.xy[columns], self.yy)

    def mixed(self, a: float, b: float) -> Moments:
        """Of the targets a·x + b·y, where there are as many targets as inputs."""
        yy = a * a * self.xx.diagonal() + 2 * a * b * self.xy.diagonal() + b * b * self.yy
        return Moments(self.n, self.x_sum, a * self.x_sum + b * self.y_sum, self.xx, a * self.xx + b * self.xy, yy)

    def centred(self) -> Moments:
        """Of x − x̄ and y − ȳ."""
        x_mean, y_mean = self.x_sum / max(self.n, 1), self.y_sum / max(self.n, 1)
        xx = self.xx - self.n * torch.outer(x_mean, x_mean)
        xy = self.xy - self.n * torch.outer(x_mean, y_mean)
        return Moments(self.n, torch.zeros_like(x_mean), torch.zeros_like(y_mean), xx, xy, self.y_variance)

    @property
    def x_variance(self) -> float:
        """Σ‖x − x̄‖² over the tokens."""
        return float(self.xx.trace() - self.x_sum.square().sum() / max(self.n, 1))

    @property
    def y_variance(self) -> Float[Tensor, "p"]:
        """Σ(y − ȳ)² over the tokens, of each target."""
        return (self.yy - self.y_sum.square() / max(self.n, 1)).clamp_min(0)

    def residuals(self, fit: LinearMap) -> Float[Tensor, "p"]:
        """Σ(y − ŷ)² over these tokens, of each target."""
        w, b = fit.weight, fit.bias
        explained = 2 * (w * self.xy).sum(0) - (w * (self.xx @ w)).sum(0)
        shifted = 2 * b * (self.y_sum - self.x_sum @ w) - self.n * b.square()
        return (self.yy - explained - shifted).clamp_min(0)

    def r2(self, fit: LinearMap) -> R2:
        """How much of these tokens' targets a map explains; NaN where they do not vary."""
        residual, total = self.residuals(fit), self.y_variance
        varies = total > 1e-12 * self.yy  # else what is left is rounding
        if not varies.any():
            return R2(math.nan, math.nan)
        mean = 1 - (residual[varies] / total[varies]).mean()
        return R2(float(mean), float(1 - residual.sum() / total.sum()))


def fit_linear(moments: Moments, *, intercept: bool, warn: bool = True) -> LinearMap:
    """The least-squares map x → y of these tokens.

    Solved by Cholesky's decomposition of the Gram matrix, scaled to a unit diagonal; where x does not have full rank,
    by its eigenvectors, with a warning that names the rank.

    Args:
        moments: of the tokens to fit.
        intercept: whether the map has a bias.
        warn: whether to warn of missing rank.
    """
    solved = moments.centred() if intercept else moments
    weight, rank = _solve(solved.xx, solved.xy)
    if warn and rank < len(weight):
        warnings.warn(
            f"x has rank {rank} of {len(weight)} on {moments.n:,} tokens; many maps fit equally well, one is taken",
            SaekitWarning,
            stacklevel=2,
        )
    bias = (
        (moments.y_sum - moments.x_sum @ weight) / max(moments.n, 1) if intercept else torch.zeros_like(moments.y_sum)
    )
    return LinearMap(weight, bias, rank)


def _solve(xx: Float[Tensor, "d d"], xy: Float[Tensor, "d p"]) -> tuple[Float[Tensor, "d p"], int]:
    """The solution of xx · weight = xy, and the rank of xx."""
    size = xx.diagonal().clamp_min(0).sqrt()
    scale = torch.where(size > 0, 1 / size, 0.0)
    gram, right = xx * scale * scale[:, None], xy * scale[:, None]
    lower, failed = torch.linalg.cholesky_ex(gram)
    if not failed and float(lower.diagonal().square().min()) > _SAFE_PIVOT:
        return torch.cholesky_solve(right, lower) * scale[:, None], len(xx)
    values, vectors = torch.linalg.eigh(gram)
    kept = values > _RANK * values[-1].clamp_min(torch.finfo(torch.float64).tiny)
    vectors = vectors[:, kept]
    return vectors @ ((vectors.T @ right) / values[kept, None]) * scale[:, None], int(kept.sum())
