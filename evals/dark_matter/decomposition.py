"""Dark matter: what a dictionary fails to explain, and how much of that is linear in what it was given.

The method of arXiv 2410.14670. With the error e = x − x̂ and the least-squares map b* from x to e: the *linear error* is
x b*, the *nonlinear error* e − x b*. Maps are fitted on one half of the tokens; every figure is of the other half.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.errors import SaekitError
from saekit.evals.dark_matter.error_batch import ErrorBatch
from saekit.evals.dark_matter.error_norms import NormTest
from saekit.evals.dark_matter.least_squares import LinearMap, Moments, fit_linear
from saekit.evals.dark_matter.splits import SPLITS, SplitKind, in_test_half, scrambled
from saekit.evals.intervals import DocumentSums

BLOCKS = 64  # groups of documents, for intervals
SAMPLED = 400  # tokens whose norms are kept for a picture
_CHUNK = 8192


class Norms(NamedTuple):
    """‖e‖ and ‖nonlinear error‖ of m tokens, and whether each is in the half to test on (by document)."""

    error: Float[Tensor, "m"]
    nonlinear: Float[Tensor, "m"]
    test: Tensor


@dataclass
class DarkMatter:
    """One dictionary's error taken apart, in two passes over the same tokens in the same order.

    ``update`` every batch, ``fit``, ``examine`` every batch again, ``result``. Memory is O(d²), whatever the number of
    tokens. ``dark_matter`` does all this.

    Attributes:
        d: width of the activations.
        seed: of both splits.
        b: after ``fit``, the map x → linear error of each split, without an intercept.
    """

    d: int
    seed: int = 0
    b: dict[SplitKind, LinearMap] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._cells = {cell: Moments.zeros(self.d, self.d) for cell in range(4)}  # by half of either split
        self._seen = 0
        self._norms: dict[SplitKind, NormTest] = {}
        self._blocks = torch.zeros(3, BLOCKS, dtype=torch.float64)
        self._lengths = torch.zeros(3, dtype=torch.float64)
        self._sums = DocumentSums(4 + self.d)  # 1, ‖e‖², ‖nonlinear‖², ‖x − mean‖², x − mean; of the test half
        self._sample: list[Tensor] = []

    @torch.no_grad()
    def update(self, batch: ErrorBatch) -> None:
        """First pass: count one batch.

        Raises:
            SaekitError: x̂ has another shape than x, x another width than expected, or either is NaN or infinite.
        """
        self._check(batch)
        halves = self._halves(batch)
        cell = halves["random"].long() + 2 * halves["document"].long()
        x = batch.x.cpu().double()
        error = x - batch.x_hat.cpu().double()
        for each, moments in self._cells.items():
            rows = cell == each
            moments.update(x[rows], error[rows])

    def moments(self, split: SplitKind) -> tuple[Moments, Moments]:
        """Of x → e on the half to fit on and on the half to test on."""
        bit = 1 + SPLITS.index(split)
        train, test = Moments.zeros(self.d, self.d), Moments.zeros(self.d, self.d)
        for cell, moments in self._cells.items():
            train, test = (train, test + moments) if cell & bit else (train + moments, test)
        return train, test

    def fit(self) -> None:
        """Between the passes: fit b*.

        Raises:
            SaekitError: there are fewer than 4·d tokens, or a split leaves a half empty.
        """
        seen, self._seen = self._seen, 0
        if seen < 4 * self.d:
            raise SaekitError(
                f"{seen:,} tokens are too few to regress on activations of width {self.d}; give at least {4 * self.d:,}"
            )
        for split in SPLITS:
            train, test = self.moments(split)
            if not (train.n and test.n):
                one = " (all tokens are of one document)" if split == "document" else ""
                raise SaekitError(f"the split by {split} leaves one half empty{one}; give more documents")
            self.b[split] = fit_linear(train, intercept=False)
            self._norms[split] = NormTest(self.d, self.b[split])
        test = self.moments("document")[1]
        self._mean = test.x_sum / test.n

    def explained(self, split: SplitKind) -> dict[str, Any]:
        """What the first pass alone says about one split; see ``result``."""
        train, test = self.moments(split)
        biased = fit_linear(train, intercept=True, warn=False)
        return {
            "tokens_fit": train.n,
            "tokens_test": test.n,
            "fvu": _ratio(float(test.yy.sum()), test.x_variance),
            "plain": with_linear(test, self.b[split]),
            "with_intercept": with_linear(test, biased),
            "shrinkage": shrinkage(train, test, biased),
        }

    @torch.no_grad()
    def examine(self, batch: ErrorBatch) -> Norms:
        """Second pass: squared norms of the same tokens and what predicts them."""
        halves = self._halves(batch)
        for split, norms in self._norms.items():
            norms.update(batch, halves[split])
        x, x_hat = batch.x.cpu().double(), batch.x_hat.cpu().double()
        error, linear, test = x - x_hat, self.b["document"](x), halves["document"]
        nonlinear = error - linear
        lengths = torch.stack([part.norm(dim=1) for part in (error, linear, nonlinear)])
        self._lengths += lengths[:, test].sum(1)
        shifted = x - self._mean
        squares = torch.stack([lengths[0], lengths[2], shifted.norm(dim=1)]).square()
        columns = torch.cat([torch.ones(len(x), 1, dtype=torch.float64), squares.T, shifted], dim=1)
        self._sums.add(columns[test], None if batch.documents is None else batch.documents.cpu()[test])
        block = scrambled(self._numbers(batch, self._seen - len(x)), self.seed + 1) % BLOCKS
        self._blocks.index_add_(1, block[test], squares[:, test])
        if sum(map(len, self._sample)) < SAMPLED:
            self._sample.append(lengths[[0, 2]].T[test])
        return Norms(lengths[0], lengths[2], test)

    def result(self) -> dict[str, Any]:
        """The figures; every one is of the half that nothing was fitted on.

        Keys:
            tokens, d_in, seed; documents: in the half to test on.
            random, document (the two splits): tokens_fit and tokens_test; fvu; ``plain`` and ``with_intercept``, each
            with r2 (unweighted mean over dimensions), r2_pooled, fvu_nonlinear (the FVU of x̂ + x b*) and rank (of x);
            ``shrinkage`` (see ``shrinkage``); ``norms`` (see ``NormTest.result``). Split by document, fvu and the plain
            fvu_nonlinear have their standard errors over documents beside them, as NAME_se; b* is taken as it is.
            norm_shares: Σ‖linear‖ / Σ‖e‖ and Σ‖nonlinear‖ / Σ‖e‖, split by document (they add up to more than 1).
            blocks: Σ‖e‖², Σ‖nonlinear‖² and Σ‖x − x̄‖² in groups of documents, for intervals.
            sample: ‖e‖ and ‖nonlinear‖ of some tokens.

        Raises:
            SaekitError: the second pass had other tokens than the first.
        """
        first = sum(moments.n for moments in self._cells.values())
        if self._seen != first:
            raise SaekitError(f"the second pass had {self._seen:,} tokens, the first {first:,}; they must be the same")
        figures: dict[str, Any] = {"tokens": self._seen, "d_in": self.d, "seed": self.seed}
        for split in SPLITS:
            figures[split] = {**self.explained(split), "norms": self._norms[split].result()}
        errors = self._sums.figures(_unexplained)
        figures["documents"] = self._sums.documents
        figures["document"]["fvu_se"] = errors["fvu_se"]
        figures["document"]["plain"]["fvu_nonlinear_se"] = errors["fvu_nonlinear_se"]
        error, linear, nonlinear = self._lengths.tolist()
        figures["norm_shares"] = {"linear": linear / error, "nonlinear": nonlinear / error} if error else None
        figures["blocks"] = dict(zip(("error", "nonlinear", "variance"), self._blocks.tolist(), strict=True))
        sample = torch.cat(self._sample)[:SAMPLED]
        figures["sample"] = {
            name: [float(f"{value:.5g}") for value in column.tolist()]
            for name, column in zip(("error", "nonlinear"), sample.T, strict=True)
        }
        return figures

    def _check(self, batch: ErrorBatch) -> None:
        check_shapes(batch.x, batch.x_hat)
        if batch.x.shape[1] != self.d:
            raise SaekitError(f"activations of width {batch.x.shape[1]} follow others of width {self.d}")
        for name, x in (("x", batch.x), ("x̂", batch.x_hat)):
            if not bool(torch.isfinite(x).all()):
                row = int((~torch.isfinite(x)).any(1).nonzero()[0])
                raise SaekitError(f"{name} is NaN or infinite at row {self._seen + row}")
        for name, column in batch._asdict().items():
            if column is not None and len(column) != len(batch.x):
                raise SaekitError(f"{name} has {len(column)} entries for {len(batch.x)} tokens")

    def _numbers(self, batch: ErrorBatch, first: int) -> Int[Tensor, "m"]:
        rows = torch.arange(first, first + len(batch.x))
        return rows if batch.documents is None else batch.documents.cpu()

    def _halves(self, batch: ErrorBatch) -> dict[SplitKind, Tensor]:
        """Which tokens are in the half to test on; moves on in the count of the tokens."""
        rows = torch.arange(self._seen, self._seen + len(batch.x))
        documents = self._numbers(batch, self._seen)
        self._seen += len(batch.x)
        return {"random": in_test_half(rows, self.seed), "document": in_test_half(documents, self.seed)}


def _unexplained(sums: Float[Tensor, "... c"]) -> dict[str, Float[Tensor, "..."]]:
    tokens, error, nonlinear, squares = sums[..., :4].unbind(-1)
    variance = squares - sums[..., 4:].square().sum(-1) / tokens
    return {"fvu": error / variance, "fvu_nonlinear": nonlinear / variance}


def check_shapes(x: Tensor, x_hat: Tensor) -> None:
    """Raise SaekitError unless both are matrices [n, d] of the same shape."""
    if x.ndim != 2 or x.shape != x_hat.shape:
        raise SaekitError(f"x̂ of shape {list(x_hat.shape)} does not fit x of shape {list(x.shape)}, a matrix [n, d]")


def with_linear(test: Moments, b: LinearMap) -> dict[str, Any]:
    """R² of both kinds of a map from x to e, FVU_nonlinear (the FVU of x̂ with the linear error added), and x's rank."""
    r2 = test.r2(b)
    left = float(test.residuals(b).sum())
    return {"r2": r2.mean, "r2_pooled": r2.pooled, "fvu_nonlinear": _ratio(left, test.x_variance), "rank": b.rank}


def shrinkage(train: Moments, test: Moments, biased: LinearMap) -> dict[str, Any]:
    """Controls: how much of the linear error is x̂ being too short (our reading).

    A dictionary that is dead altogether has the error e = x − b_dec, perfectly linear and worth nothing. Its x̂ cannot
    be rescaled; the second control sees it, because one number s explains all of its error.

    Args:
        train, test: moments of x → e on either half.
        biased: the map x → e with an intercept, fitted on the first.

    Returns:
        scale: the best scalar for x̂, by least squares; None where x̂ = 0.
        r2, r2_pooled: of the error x − scale · x̂ on x, so without what was shrunk.
        scalar: the best s in e ≈ s · x + constant; scalar_r2_pooled: how much of e's variance that number explains.
        r2_beyond_scalar: share of what s leaves of it that the whole map explains; 0 if it leaves nothing.
    """
    x_x, x_e, e_e = float(train.xx.trace()), float(train.xy.trace()), float(train.yy.sum())
    x_hat_squared = x_x - 2 * x_e + e_e
    figures: dict[str, Any] = {"scale": None, "r2": None, "r2_pooled": None}
    if x_hat_squared > 1e-12 * x_x:
        scale = (x_x - x_e) / x_hat_squared
        again = [moments.mixed(1 - scale, scale) for moments in (train, test)]  # x − a·x̂ = (1 − a)·x + a·e
        r2 = again[1].r2(fit_linear(again[0], intercept=False, warn=False))
        figures = {"scale": scale, "r2": r2.mean, "r2_pooled": r2.pooled}
    centred = train.centred()
    s = _ratio(float(centred.xy.trace()), train.x_variance)
    only = LinearMap(s * torch.eye(len(train.xx), dtype=torch.float64), (train.y_sum - s * train.x_sum) / train.n, 1)
    left, total = float(test.residuals(only).sum()), float(test.y_variance.sum())
    figures |= {"scalar": s, "scalar_r2_pooled": 1 - _ratio(left, total)}
    nothing = left <= 1e-9 * float(test.yy.sum())
    return figures | {"r2_beyond_scalar": 0.0 if nothing else 1 - float(test.residuals(biased).sum()) / left}


def dark_matter(
    batches: Callable[[], Iterable[ErrorBatch]] | Float[Tensor, "n d"],
    x_hat: Float[Tensor, "n d"] | None = None,
    *,
    documents: Int[Tensor, "n"] | None = None,
    tokens: Int[Tensor, "n"] | None = None,
    l0: Float[Tensor, "n"] | None = None,
    losses: Float[Tensor, "n"] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Take the error of reconstructions apart, wherever they come from.

    Args:
        batches: activations x [n, d]; or a function that makes the same batches each time it is called.
        x_hat: [n, d] reconstructions of x.
        documents: [n] numbers of the tokens' documents. Without them both splits are by token.
        tokens, l0, losses: [n] what baselines go by, where known; see ``ErrorBatch``.
        seed: of the splits.

    Returns:
        The figures of ``DarkMatter.result``.

    Raises:
        SaekitError: x̂ has another shape than x, there are fewer than 4·d tokens, or a split leaves a half empty.
    """
    if isinstance(batches, Tensor):
        if x_hat is None:
            raise SaekitError("reconstructions x_hat are needed beside x")
        check_shapes(batches, x_hat)
        whole = ErrorBatch(batches, x_hat, documents, tokens, l0, losses)
        return dark_matter(lambda: _chunks(whole), seed=seed)
    analysis: DarkMatter | None = None
    for batch in batches():
        if analysis is None:
            check_shapes(batch.x, batch.x_hat)
            analysis = DarkMatter(batch.x.shape[1], seed)
        analysis.update(batch)
    if analysis is None:
        raise SaekitError("there are no activations to take apart")
    analysis.fit()
    for batch in batches():
        analysis.examine(batch)
    return analysis.result()


def _chunks(whole: ErrorBatch) -> Iterable[ErrorBatch]:
    for start in range(0, len(whole.x), _CHUNK):
        yield ErrorBatch(*(None if column is None else column[start : start + _CHUNK] for column in whole))  # type: ignore[arg-type]


def _ratio(part: float, whole: float) -> float:
    """part / whole; where there is no whole, 0 of nothing and infinity of something."""
    return part / whole if whole > 0 else (math.inf if part > 0 else 0.0)
