"""How much of the activations a dictionary explains."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.evals.outliers import Outliers


class Reconstruction:
    """Reconstruction figures over a stream of (x, x̂), summed in float64 with one ratio at the end.

    FVU is Σ‖x − x̂‖² / Σ‖x − x̄‖² with x̄ the mean of all evaluated tokens; a constant bias counts as error.
    """

    def __init__(self, d_in: int) -> None:
        self.tokens = 0
        self.origin: Tensor | None = None  # sums are taken about the first batch's mean, against cancellation
        self.shifted = torch.zeros(d_in, dtype=torch.float64)
        self.shifted_squares = self.squares = self.error = 0.0
        self.cosine = self.norm_ratio = 0.0
        self.outliers = Outliers(d_in)

    def update(self, x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"]) -> None:
        """Count one batch."""
        x, x_hat = x.cpu().double(), x_hat.cpu().double()
        if self.origin is None:
            self.origin = x.mean(0)
        self.tokens += len(x)
        self.shifted += (x - self.origin).sum(0)
        self.shifted_squares += float((x - self.origin).square().sum())
        self.squares += float(x.square().sum())
        self.error += float((x - x_hat).square().sum())
        norm, norm_hat = x.norm(dim=1), x_hat.norm(dim=1)
        self.outliers.update(x - self.origin, norm, (x - x_hat).square().sum(1))
        tiny = torch.finfo(torch.float64).tiny
        self.cosine += float(((x * x_hat).sum(1) / (norm * norm_hat).clamp_min(tiny)).sum())
        self.norm_ratio += float((norm_hat / norm.clamp_min(tiny)).sum())

    def mean(self) -> Float[Tensor, "d"]:
        """x̄, the mean of the activations seen."""
        assert self.origin is not None
        return self.origin + self.shifted / self.tokens

    def result(self) -> dict[str, float | int]:
        """The figures.

        Keys:
            tokens: over how many tokens.
            fvu: fraction of variance unexplained; explained_variance: 1 − fvu.
            fvu_without_outliers, outliers, outlier_variance_share: as in ``Outliers``.
            mse: squared error a token, summed over dimensions, in squared units of the activations.
            normalized_mse: Σ‖x − x̂‖² / Σ‖x‖².
            cosine: mean cosine of x and x̂ (0 where x̂ = 0).
            norm_ratio: mean of ‖x̂‖ / ‖x‖.
        """
        variance = self.shifted_squares - float(self.shifted.square().sum()) / self.tokens
        fvu = self.error / variance if variance > 0 else (0.0 if self.error == 0 else math.inf)
        return {
            "tokens": self.tokens,
            "fvu": fvu,
            "explained_variance": 1 - fvu,
            **self.outliers.result(fvu),
            "mse": self.error / self.tokens,
            "normalized_mse": self.error / self.squares if self.squares > 0 else math.nan,
            "cosine": self.cosine / self.tokens,
            "norm_ratio": self.norm_ratio / self.tokens,
        }
