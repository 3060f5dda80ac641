"""How many features are active, and which never are."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from saekit.code import SparseCode
from saekit.evals.evaluation import Evaluation, Figure, Seen
from saekit.evals.intervals import DocumentSums
from saekit.sae import SparseAutoencoder
from saekit.settings import Settings
from saekit.zipf import fit_zipf

_UNDERUTILISED = 0.1  # share of the Zipf curve


class Sparsity:
    """L0 and firing densities, counted exactly over a stream of codes."""

    def __init__(self, n_features: int) -> None:
        self.tokens = 0
        self.sums = DocumentSums(2)  # tokens, matches
        self.matches = torch.zeros(n_features, dtype=torch.long)
        self.l0_counts = torch.zeros(n_features + 1, dtype=torch.long)
        self.l0_squares = 0.0
        self.l0_max = 0

    def update(self, code: SparseCode, documents: Int[Tensor, "n"] | None = None) -> None:
        """Count one batch; without the numbers of their documents, each token is a document of its own."""
        each = code.matches_per_token().cpu().double()
        self.tokens += code.n_tokens
        self.matches += code.matches_per_feature().cpu()
        self.l0_counts += torch.bincount(each.long(), minlength=len(self.l0_counts))
        self.sums.add(torch.stack([torch.ones_like(each), each], dim=1), documents)
        self.l0_squares += float(each.square().sum())
        self.l0_max = max(self.l0_max, int(each.max()) if code.n_tokens else 0)

    def see(self, seen: Seen) -> None:
        """Count one batch of an evaluation."""
        self.update(seen.code, seen.documents)

    def result(self) -> dict[str, Any]:
        """The figures.

        Keys:
            tokens, documents, features: over how many everything here was counted.
            l0, l0_std, l0_max: active features a token; l0_se: standard error of l0 over documents.
            l0_histogram: on how many tokens so many are active (``histogram``).
            dead, dead_share: features that fired on none of these tokens.
            density_mean, density_quantiles: firing rates (share of the tokens), over the features.
            density_by_rank: rank (1 the densest) and firing rate, at about a hundred ranks in equal steps of log rank.
            zipf: the Zipf-Mandelbrot law fitted to the densities (``saekit.zipf.fit_zipf``), None where too few fire.
            underutilised, underutilised_share: features below a tenth of that law at their rank, the dead among them.
        """
        density = self.matches.double() / self.tokens
        l0 = self.sums.figures(lambda sums: {"l0": sums[..., 1] / sums[..., 0]})
        mean = float(self.sums.total()[1]) / self.tokens
        quantiles = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
        found = torch.quantile(density, torch.tensor(quantiles, dtype=torch.float64)).tolist()
        dead = int((self.matches == 0).sum())
        ranked = density.sort(descending=True).values
        law = fit_zipf(density)
        low = int((ranked < _UNDERUTILISED * law.curve(len(ranked))).sum()) if law else dead
        ranks = sorted({round(rank) for rank in torch.logspace(0, math.log10(len(ranked)), 100).tolist()})
        return {
            "tokens": self.tokens,
            "documents": self.sums.documents,
            "features": len(self.matches),
            **l0,
            "l0_std": max(0.0, self.l0_squares / self.tokens - mean**2) ** 0.5,
            "l0_max": self.l0_max,
            "l0_histogram": histogram(self.l0_counts),
            "dead": dead,
            "dead_share": dead / len(self.matches),
            "density_mean": float(density.mean()),
            "density_quantiles": dict(zip(map(str, quantiles), found, strict=True)),
            "density_by_rank": {"rank": ranks, "density": [float(ranked[rank - 1]) for rank in ranks]},
            "zipf": law._asdict() if law else None,
            "underutilised": low,
            "underutilised_share": low / len(self.matches),
        }


def histogram(counts: Int[Tensor, "l"], bins: int = 40) -> dict[str, Any]:
    """Counts of 0, 1, 2, ... in at most so many bins.

    Returns:
        width: whole numbers in each bin, the first of which begins at 0.
        counts: of each bin, up to the one that makes 99.9% of all: a far tail would flatten the rest.
        beyond: how many lie beyond.
    """
    total = int(counts.sum())
    most = int((counts.cumsum(0) < 0.999 * total).sum()) + 1
    width = -(-most // bins)
    sums = [int(part.sum()) for part in torch.split(counts[: -(-most // width) * width], width)]
    return {"width": width, "counts": sums, "beyond": total - sum(sums)}


class SparsityEvaluation(Evaluation):
    """How many features are active?"""

    name = "sparsity"
    title = "Sparsity"
    figures = (
        Figure("l0", "L0", "{:.1f}", "active features a token", headline=2),
        Figure("dead", "dead", "{:,d}", "features that never fired on these tokens", headline=4),
        Figure("underutilised", "low", "{:,d}", "features below a tenth of the fitted Zipf curve, the dead among them"),
        Figure("features", "features", "{:,d}", "width of the dictionary"),
        Figure("tokens", "tokens", "{:,d}", "held-out tokens; CE and KL score those with a next one", last=True),
    )

    def begin(self, sae: SparseAutoencoder, settings: Settings) -> Sparsity:
        """Counts of every feature."""
        return Sparsity(sae.cfg.d_sae)
