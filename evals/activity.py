"""Where features fire, over a stream of codes in bounded memory: counts, histograms, passages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.activations import ContextBatch
from saekit.code import SparseCode
from saekit.errors import SaekitError

_BINS = 64
_SAMPLE = 32  # activations of each feature, of which quantiles are shown
_ALIKE = 12  # tokens up to the peak; passages that have the same are one


class Found(NamedTuple):
    """A token on which a feature fires.

    Attributes:
        score: what it was kept for; smaller is better.
        value: the activation.
        place: of the token in the contexts, flattened; of the passage, ``start`` and ``stop``.
        group: a digest of the last tokens up to it.
        values: the feature's activation on each token of the passage.
    """

    score: float
    value: float
    place: int
    start: int
    stop: int
    group: int
    values: list[float]


class Activity:
    """What is known of the features so far.

    Attributes:
        tokens: text tokens seen.
        fired: [F] on how many of them each feature fires.
        l0_counts: [largest L0 + 1] on how many 0, 1, 2, ... features fire.
        sums: [P] sum of its activations, of the P studied features from here on.
        histogram: of each.
        top: the strongest passages of each.
        sample: a random sample of each one's activations.
    """

    def __init__(self, n_features: int, studied: Sequence[int], *, top: int, window: int) -> None:
        self.tokens = self.contexts = 0
        self.fired = torch.zeros(n_features, dtype=torch.long)
        self.l0_counts = torch.zeros(1, dtype=torch.long)
        self.studied = torch.tensor(studied)
        self.row_of = torch.full((n_features,), -1)
        self.row_of[self.studied] = torch.arange(len(studied))
        self.sums = torch.zeros(len(studied), dtype=torch.float64)
        self.histogram = Histograms(len(studied))
        self.top, self.sample = Best(len(studied), top, window), Best(len(studied), _SAMPLE, window)
        self.window = window

    def update(self, batch: ContextBatch, code: SparseCode) -> None:
        """Count the code of a batch of contexts, whose text tokens it holds in order."""
        where = batch.kept.flatten().nonzero()[:, 0]
        if len(where) != code.n_tokens:
            raise SaekitError(f"a code of {code.n_tokens} tokens is not that of contexts with {len(where)}")
        self.fired += code.matches_per_feature().cpu()
        self.tokens += code.n_tokens
        self.l0_counts = _added(self.l0_counts, torch.bincount(code.matches_per_token().cpu()))
        row = self.row_of[code.features.cpu()]
        kept = row >= 0
        size, length = batch.tokens.numel(), batch.tokens.shape[1]
        key, order = (row * size + where[code.tokens.cpu()])[kept].sort()  # by feature, then by place
        row, place = key // size, key % size
        value = code.values.detach().cpu().float()[kept][order]
        if not torch.isfinite(value).all():
            raise SaekitError("the dictionary gives activations that are NaN or infinite; there is nothing to show")
        self.histogram.update(row, value)
        self.sums.index_add_(0, row, value.double())
        group, start, stop = _passages(batch, self.window)
        before = self.contexts * length

        def around(row: Tensor, place: Tensor) -> Tensor:
            """The activations [m, window] of features on the passages around places."""
            at = start[place][:, None] + torch.arange(self.window)
            wanted = row[:, None] * size + at
            found = torch.searchsorted(key, wanted).clamp(max=len(key) - 1)
            return torch.where((key[found] == wanted) & (at < stop[place][:, None]), value[found], 0.0)

        def offer(best: Best, some: Tensor, score: Tensor, alike: bool) -> None:
            here = place[some]
            columns = (value[some], here + before, start[here] + before, stop[here] + before, group[here])
            best.offer(row[some], score[some], *columns, lambda chosen: around(row[some][chosen], here[chosen]), alike)

        offer(self.top, _peaks(key // length, value), -value.double(), True)
        offer(self.sample, torch.ones_like(row, dtype=torch.bool), _random(self.studied[row], place + before), False)
        self.contexts += len(batch.tokens)


class Histograms:
    """Exact counts of positive values in bins of equal width from 0, one histogram a row.

    The width is the power of two for which the largest value so far falls into the upper half of the bins. When it
    doubles, pairs of bins become one, so the counts are those that the final width would have given from the start.
    """

    def __init__(self, rows: int) -> None:
        self.counts = torch.zeros(rows, _BINS, dtype=torch.long)
        self.exponent = torch.zeros(rows, dtype=torch.long)  # the width is 2 to the power of it
        self.peaks = torch.zeros(rows)

    def update(self, row: Int[Tensor, "m"], value: Float[Tensor, "m"]) -> None:
        """Count some values."""
        before = self.peaks.clone()
        self.peaks.scatter_reduce_(0, row, value, "amax")
        bits = _BINS.bit_length() - 1
        needed = torch.frexp(self.peaks.double()).exponent.long() - bits
        folds = torch.where(before > 0, needed - self.exponent, 0).clamp(0, bits)
        self.exponent = torch.where(self.peaks > 0, needed, self.exponent)
        bins = torch.arange(_BINS)[None] >> folds[:, None]
        self.counts = torch.zeros_like(self.counts).scatter_add_(1, bins, self.counts)
        at = torch.ldexp(value.double(), -self.exponent[row]).long()
        self.counts.view(-1).index_add_(0, row * _BINS + at, torch.ones_like(at))

    def of(self, row: int) -> tuple[list[float], list[int]]:
        """Edges [b + 1] and counts [b] of one row, up to the largest value."""
        width = 2.0 ** int(self.exponent[row])
        bins = int(float(self.peaks[row]) / width) + 1 if self.peaks[row] > 0 else 0
        return [width * edge for edge in range(bins + 1)], self.counts[row, :bins].tolist()


class Best:
    """Of each row, the entries with the smallest scores over a stream; of equal ones, the earlier."""

    def __init__(self, rows: int, most: int, window: int) -> None:
        self.most = most
        self.row = torch.zeros(0, dtype=torch.long)
        self.columns: list[Tensor] = [torch.zeros(0, dtype=torch.float64), torch.zeros(0)]
        self.columns += [torch.zeros(0, dtype=torch.long) for _ in range(4)]
        self.values = torch.zeros(0, window)
        self.bound = torch.full((rows,), torch.inf, dtype=torch.float64)  # no score from here on is kept
        self.ends = torch.zeros(rows + 1, dtype=torch.long)

    def offer(
        self,
        row: Int[Tensor, "m"],
        score: Float[Tensor, "m"],
        value: Float[Tensor, "m"],
        place: Int[Tensor, "m"],
        start: Int[Tensor, "m"],
        stop: Int[Tensor, "m"],
        group: Int[Tensor, "m"],
        around: Callable[[Tensor], Tensor],
        alike: bool,
    ) -> None:
        """Take in entries.

        Args:
            row, score, value, place, start, stop, group: of each.
            around: gives the activations [n, window] around some of them, by their index.
            alike: whether of a row's entries of one group only the best counts.
        """
        some = (score < self.bound[row]).nonzero()[:, 0]
        if not len(some):
            return
        old = len(self.row)
        rows = torch.cat([self.row, row[some]])
        new = (score, value, place, start, stop, group)
        columns = [torch.cat([mine, theirs[some]]) for mine, theirs in zip(self.columns, new, strict=True)]
        order = columns[0].argsort(stable=True)
        order = order[rows[order].argsort(stable=True)]
        if alike:
            order = order[_first_of_each(rows[order], columns[-1][order])]
        ends = torch.searchsorted(rows[order], torch.arange(len(self.ends)))
        order = order[torch.arange(len(order)) - ends[rows[order]] < self.most]
        entered = order >= old
        values = torch.empty(len(order), self.values.shape[1])
        values[~entered] = self.values[order[~entered]]
        values[entered] = around(some[order[entered] - old])
        self.row, self.columns, self.values = rows[order], [column[order] for column in columns], values
        self.ends = torch.searchsorted(self.row, torch.arange(len(self.ends)))
        full = (self.ends.diff() == self.most).nonzero()[:, 0]
        self.bound[full] = self.columns[0][self.ends[full + 1] - 1]

    def of(self, row: int) -> list[Found]:
        """What is kept of one row, best first."""
        part = slice(int(self.ends[row]), int(self.ends[row + 1]))
        return [Found(*each) for each in zip(*(c[part].tolist() for c in [*self.columns, self.values]), strict=True)]


def _added(a: Int[Tensor, "l"], b: Int[Tensor, "m"]) -> Int[Tensor, "n"]:
    """The sum of two tensors, the shorter filled up with zeros."""
    longer = max(len(a), len(b))
    return torch.nn.functional.pad(a, (0, longer - len(a))) + torch.nn.functional.pad(b, (0, longer - len(b)))


def _first_of_each(row: Int[Tensor, "m"], group: Int[Tensor, "m"]) -> Bool[Tensor, "m"]:
    """Which entries have no equal pair of row and group before them."""
    order = group.argsort(stable=True)
    order = order[row[order].argsort(stable=True)]
    row, group = row[order], group[order]
    first = torch.ones_like(row, dtype=torch.bool)
    first[1:] = (row[1:] != row[:-1]) | (group[1:] != group[:-1])
    return torch.zeros_like(first).scatter_(0, order, first)


def _peaks(segment: Int[Tensor, "m"], value: Float[Tensor, "m"]) -> Bool[Tensor, "m"]:
    """The largest value of each segment (numbers, ascending); of equal ones, the first."""
    _, segment = torch.unique_consecutive(segment, return_inverse=True)
    largest = value.new_zeros(int(segment[-1]) + 1 if len(segment) else 0)
    largest.scatter_reduce_(0, segment, value, "amax")
    highest = (value == largest[segment]).nonzero()[:, 0]
    first = torch.ones_like(highest, dtype=torch.bool)
    first[1:] = segment[highest][1:] != segment[highest][:-1]
    return torch.zeros_like(value, dtype=torch.bool).scatter_(0, highest, first)


def _passages(batch: ContextBatch, window: int) -> tuple[Int[Tensor, "p"], Int[Tensor, "p"], Int[Tensor, "p"]]:
    """Of each position, flattened: a digest of the last tokens up to it, and the passage around it, start and stop.

    A passage is of text tokens of one document that stand together: two thirds before the position, one third from it
    on, more of one where the document has less of the other.
    """
    places = torch.arange(batch.tokens.numel()).reshape(batch.tokens.shape)
    breaks = torch.ones_like(batch.kept)  # whether a run of text begins at a position
    breaks[:, 1:] = (batch.documents[:, 1:] != batch.documents[:, :-1]) | (batch.kept[:, 1:] != batch.kept[:, :-1])
    low = torch.where(breaks, places, -1).flatten().cummax(0).values
    ends = torch.cat([breaks.flatten()[1:], torch.ones(1, dtype=torch.bool)])
    after = len(low)
    high = torch.where(ends, places.flatten() + 1, after).flip(0).cummin(0).values.flip(0)
    at = places.flatten()
    start = torch.maximum(low, at - 2 * window // 3)
    stop = torch.minimum(high, start + window)
    start = torch.maximum(low, stop - window)
    tokens, digest = batch.tokens.flatten(), torch.zeros_like(low)
    for back in range(_ALIKE):
        here = torch.where(at - back >= low, tokens[(at - back).clamp_min(0)] + 1, 0)
        digest = (digest + here) * 0x2545F4914F6CDD1D  # overflows, as a digest may
    return digest, start, stop


def _random(feature: Int[Tensor, "m"], place: Int[Tensor, "m"]) -> Float[Tensor, "m"]:
    """Numbers in [0, 1) that look random and follow from both alone: the finaliser of MurmurHash3."""
    x = feature * 0x5851F42D4C957F2D + place * 0x14057B7EF767814F + 0x632BE59BD9B4E019
    for factor in (-0x00AE502812AA7333, -0x3B314601E57A13AD):  # 0xff51afd7ed558ccd, 0xc4ceb9fe1a85ec53
        x = (x ^ ((x >> 33) & 0x7FFFFFFF)) * factor
    x = x ^ ((x >> 33) & 0x7FFFFFFF)
    return ((x >> 11) & ((1 << 53) - 1)).double() / (1 << 53)
