"""The norm test: how well the squared norms of a dictionary's error and of its parts follow from what is known before.

Squared norms are regressed on the activation itself and on simple baselines, fitted on one half of the tokens and
scored on the other (arXiv 2410.14670).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.errors import SaekitError
from saekit.evals.dark_matter.error_batch import ErrorBatch
from saekit.evals.dark_matter.least_squares import LinearMap, Moments, fit_linear

PARTS = ("x", "x_hat", "error", "nonlinear", "x_hat_plus_nonlinear", "linear")
BASELINES = ("loss", "l0", "norm")


class NormTest:
    """Regressions of the six squared norms, summed over a stream of batches."""

    def __init__(self, d: int, b: LinearMap) -> None:
        """Of activations of width d; ``b`` maps them to the linear error."""
        self.b = b
        self.by_x = [Moments.zeros(d, len(PARTS)) for _ in range(2)]  # the half to fit on, the half to test on
        self.by_baseline = {name: [Moments.zeros(1, len(PARTS)) for _ in range(2)] for name in BASELINES}
        self.by_token = [TokenMeans(len(PARTS)) for _ in range(2)]

    def update(self, batch: ErrorBatch, test: Bool[Tensor, "m"]) -> None:
        """Count one batch; ``test`` says which of its tokens are in the half to test on.

        Raises:
            SaekitError: a loss is not finite.
        """
        x, x_hat = batch.x.cpu().double(), batch.x_hat.cpu().double()
        linear = self.b(x)
        parts = (x, x_hat, x - x_hat, x - x_hat - linear, x - linear, linear)
        targets = torch.stack([part.square().sum(1) for part in parts], dim=1)
        known = {"loss": batch.losses, "l0": batch.l0, "norm": x.norm(dim=1)}
        if batch.losses is not None and not bool(torch.isfinite(batch.losses).all()):
            raise SaekitError("a loss is NaN or infinite; leave out tokens without a next one")
        for half, rows in enumerate((~test, test)):
            self.by_x[half].update(x[rows], targets[rows])
            for name, column in known.items():
                if column is not None:
                    self.by_baseline[name][half].update(column.cpu()[rows, None], targets[rows])
            if batch.tokens is not None and bool((batch.tokens >= 0).all()):  # −1: not known
                self.by_token[half].update(batch.tokens.cpu()[rows], targets[rows])

    def result(self) -> dict[str, dict[str, float | None]]:
        """R² on the half to test on, for each part and each way of predicting its squared norm.

        Keys:
            x, x_hat, error, nonlinear, x_hat_plus_nonlinear, linear: whose squared norm.
            Of each: ``from_x`` (linear in x, without intercept), ``from_x_with_intercept``, and the baselines, with an
            intercept: ``from_loss`` (the model's on the next token), ``from_l0`` (active features), ``from_norm``
            (‖x‖), ``from_token`` (the mean for the token id; for ids not seen, the mean of all). None where that was
            not known, or has no variance.
        """
        train, test = self.by_x
        found: dict[str, Float[Tensor, "6"] | None] = {
            "from_x": _r2(test, fit_linear(train, intercept=False, warn=False)),
            "from_x_with_intercept": _r2(test, fit_linear(train, intercept=True, warn=False)),
        }
        for name, (train, test) in self.by_baseline.items():
            known = train.n and test.n
            found[f"from_{name}"] = _r2(test, fit_linear(train, intercept=True, warn=False)) if known else None
        fitted, scored = self.by_token
        found["from_token"] = scored.r2(fitted) if fitted.n and scored.n else None
        columns = {name: [math.nan] * len(PARTS) if r2 is None else r2.tolist() for name, r2 in found.items()}
        return {
            part: {name: None if math.isnan(values[i]) else values[i] for name, values in columns.items()}
            for i, part in enumerate(PARTS)
        }


def _r2(test: Moments, fit: LinearMap) -> Float[Tensor, "p"]:
    """R² of each target by itself; NaN without variance."""
    total = test.y_variance
    share = 1 - test.residuals(fit) / total
    return torch.where(total > 1e-12 * test.yy, share, torch.nan)


class TokenMeans:
    """Sums of targets [p] for each token id."""

    def __init__(self, p: int) -> None:
        self.n = 0
        self.counts = torch.zeros(0, dtype=torch.float64)
        self.sums = torch.zeros(0, p, dtype=torch.float64)
        self.squares = torch.zeros(p, dtype=torch.float64)

    def update(self, tokens: Int[Tensor, "m"], targets: Float[Tensor, "m p"]) -> None:
        """Count one batch."""
        if not len(tokens):
            return
        self.grow(int(tokens.max()) + 1)
        self.n += len(tokens)
        self.counts.index_add_(0, tokens.long(), torch.ones(len(tokens), dtype=torch.float64))
        self.sums.index_add_(0, tokens.long(), targets)
        self.squares += targets.square().sum(0)

    def grow(self, vocabulary: int) -> None:
        """Make room for token ids below ``vocabulary``."""
        more = max(0, vocabulary - len(self.counts))
        self.counts = torch.nn.functional.pad(self.counts, (0, more))
        self.sums = torch.nn.functional.pad(self.sums, (0, 0, 0, more))

    def r2(self, fitted: TokenMeans) -> Float[Tensor, "p"]:
        """R² of the means that were fitted on other tokens; NaN without variance."""
        for one, other in ((self, fitted), (fitted, self)):
            one.grow(len(other.counts))
        seen = fitted.counts[:, None] > 0
        means = torch.where(seen, fitted.sums / fitted.counts.clamp_min(1)[:, None], fitted.sums.sum(0) / fitted.n)
        residual = self.squares - 2 * (means * self.sums).sum(0) + (self.counts[:, None] * means.square()).sum(0)
        total = self.squares - self.sums.sum(0).square() / self.n
        return torch.where(total > 1e-12 * self.squares, 1 - residual / total, torch.nan)
