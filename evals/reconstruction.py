"""How much of the activations a dictionary explains."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.evals.evaluation import Evaluation, Figure, Seen
from saekit.evals.intervals import DocumentSums
from saekit.evals.outliers import Outliers
from saekit.sae import SparseAutoencoder
from saekit.settings import Settings

_SCALARS = 6  # sums of each token: 1, ‖x − origin‖², ‖x‖², ‖x − x̂‖², the cosine and ‖x̂‖ / ‖x‖; then come x − origin


class Reconstruction:
    """Reconstruction figures over a stream of (x, x̂), summed in float64 with one ratio at the end.

    FVU is Σ‖x − x̂‖² / Σ‖x − x̄‖² with x̄ the mean of all evaluated tokens; a constant bias counts as error. Where a
    document is left out for a standard error, x̄ is the mean of what is left.
    """

    def __init__(self, d_in: int) -> None:
        self.tokens = 0
        self.origin: Tensor | None = None  # sums are taken about the first batch's mean, against cancellation
        self.sums = DocumentSums(_SCALARS + d_in)
        self.outliers = Outliers(d_in)

    def update(
        self, x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"], documents: Int[Tensor, "n"] | None = None
    ) -> None:
        """Count one batch; without the numbers of their documents, each token is a document of its own."""
        x, x_hat = x.cpu().double(), x_hat.cpu().double()
        if self.origin is None:
            self.origin = x.mean(0)
        self.tokens += len(x)
        shifted = x - self.origin
        norm, norm_hat = x.norm(dim=1), x_hat.norm(dim=1)
        self.outliers.update(shifted, norm, (x - x_hat).square().sum(1))
        tiny = torch.finfo(torch.float64).tiny
        scalars = (
            torch.ones_like(norm),
            shifted.square().sum(1),
            x.square().sum(1),
            (x - x_hat).square().sum(1),
            (x * x_hat).sum(1) / (norm * norm_hat).clamp_min(tiny),
            norm_hat / norm.clamp_min(tiny),
        )
        self.sums.add(torch.cat([torch.stack(scalars, dim=1), shifted], dim=1), documents)

    def see(self, seen: Seen) -> None:
        """Count one batch of an evaluation."""
        self.update(seen.x, seen.x_hat, seen.documents)

    def mean(self) -> Float[Tensor, "d"]:
        """x̄, the mean of the activations seen."""
        assert self.origin is not None
        return self.origin + self.sums.total()[_SCALARS:] / self.tokens

    def result(self) -> dict[str, float | int | None]:
        """The figures, and under NAME_se the standard error over documents of each (``DocumentSums.figures``).

        Keys:
            tokens, documents: over how many.
            fvu: fraction of variance unexplained; explained_variance: 1 − fvu.
            fvu_without_outliers, outliers, outlier_variance_share: as in ``Outliers``.
            mse: squared error a token, summed over dimensions, in squared units of the activations.
            normalized_mse: Σ‖x − x̂‖² / Σ‖x‖².
            cosine: mean cosine of x and x̂ (0 where x̂ = 0).
            norm_ratio: mean of ‖x̂‖ / ‖x‖.
        """
        found = self.sums.figures(_figures)
        outliers = self.outliers.result(float(found["fvu"]))  # type: ignore[arg-type]
        return {"tokens": self.tokens, "documents": self.sums.documents, **found, **outliers}


def _figures(sums: Float[Tensor, "... c"]) -> dict[str, Float[Tensor, "..."]]:
    tokens, shifted_squares, squares, error, cosine, norm_ratio = sums[..., :_SCALARS].unbind(-1)
    variance = shifted_squares - sums[..., _SCALARS:].square().sum(-1) / tokens
    fvu = torch.where(variance > 0, error / variance, torch.where(error == 0, 0.0, math.inf))
    return {
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "mse": error / tokens,
        "normalized_mse": torch.where(squares > 0, error / squares, math.nan),
        "cosine": cosine / tokens,
        "norm_ratio": norm_ratio / tokens,
    }


class ReconstructionEvaluation(Evaluation):
    """How much of the activations is explained?"""

    name = "reconstruction"
    title = "Reconstruction"
    figures = (
        Figure("fvu", "FVU", "{:.4f}", "fraction of the activations' variance unexplained", headline=1),
        Figure(
            "fvu_without_outliers",
            "FVU rest",
            "{:.4f}",
            "without tokens beyond 10 times the median norm",
            where="outliers",
        ),
        Figure("outliers", "outliers", "{:,d}", "how many those are", where="outliers"),
        Figure("outlier_variance_share", "held", "{:.1%}", "share of the variance that those hold", where="outliers"),
        Figure("cosine", "cosine", "{:.4f}", "mean cosine of x and x̂"),
        Figure("norm_ratio", "length", "{:.4f}", "mean of ‖x̂‖ / ‖x‖", detail=True),
    )

    def begin(self, sae: SparseAutoencoder, settings: Settings) -> Reconstruction:
        """Sums over the errors."""
        return Reconstruction(sae.cfg.d_in)
