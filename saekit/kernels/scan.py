"""The few large entries among many scores: bounds from group maxima, then a scan of the groups that reach them.

The entries of a row fall into strided groups of 16. A group whose maximum is below a bound holds nothing above it, so
few scores are looked at twice, and no long row is ever sorted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from saekit.code import SparseCode
from saekit.kernels.scores import Scores

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

_GROUP = 16

# from some rows' scores [m, p], their group maxima [m, p / 16] and their slice to a lower bound [m] for each row
LowerBound = Callable[[Tensor, Tensor, slice], Tensor]


class Found(NamedTuple):
    """What a scan finds.

    Attributes:
        pairs: rows as ``tokens``, columns as ``features``, both ascending, and exact scores as ``values``.
        overflow_rows: [m] rows left out, since too many of their scores lie above the bound.
    """

    pairs: SparseCode
    overflow_rows: Int[Tensor, "m"]


def above(scores: Scores, lower_bound: LowerBound, most: Int[Tensor, "r"] | None = None) -> Found:
    """All pairs whose exact score is positive and at least the lower bound of its row, and some others.

    Args:
        scores: r rows and c columns.
        lower_bound: gives the bounds.
        most: [r] groups with such pairs above which a row is left out.
    """
    r, c = scores.shape
    step = scores.rows_at_once
    none = torch.zeros(0, dtype=torch.long, device=scores.left.device)
    rows, columns, values, overflow_rows = [none], [none], [scores.left.new_empty(0)], [none]
    for start in range(0, r, step):
        part = slice(start, min(start + step, r))
        piece = scores.rows(part.start, part.stop)
        grouped = piece.view(len(piece), _GROUP, -1)
        maxima = grouped.amax(1)
        least = lower_bound(piece, maxima, part).clamp_min(torch.finfo(piece.dtype).tiny) - scores.margin[part]
        bound = least.to(piece.dtype)[:, None]  # rounding is monotone: a score above it is still above it
        row, group = (maxima >= bound).nonzero().unbind(1)
        if most is not None:
            crowd = torch.bincount(row, minlength=len(piece)) > most[part]
            if crowd.any():
                row, group = (column[~crowd[row]] for column in (row, group))
                overflow_rows.append(crowd.nonzero()[:, 0] + start)
        entries = grouped[row, :, group]
        place, member = (entries >= bound[row]).nonzero().unbind(1)
        rows.append(row[place] + start)
        columns.append(group[place] + member * maxima.shape[1])
        if scores.exact:
            values.append(entries[place, member])
    keys, order = (torch.cat(rows) * c + torch.cat(columns)).sort()
    value = torch.cat(values)[order] if scores.exact else scores.left.new_empty(0)
    pairs = SparseCode(keys.div(c, rounding_mode="floor"), keys % c, value, r, c)
    return Found(pairs if scores.exact else pairs.with_values(scores.at(pairs)), torch.cat(overflow_rows))


def above_largest(scores: Scores, counts: Int[Tensor, "r"]) -> Found:
    """Pairs among which are the ``counts[i]`` largest positive scores of each row i.

    A row with more than ten times as many groups that may hold one is left out, as overflow.
    The counts[i]-th largest group maximum of a row bounds its counts[i]-th largest score from below.

    Args:
        scores: r rows and c columns.
        counts: [r], 0 to c each.
    """

    bins = counts.clamp_min(1).log2().ceil().long()

    def lower_bound(piece: Tensor, maxima: Tensor, part: slice) -> Tensor:
        count, kind = counts[part].clamp_min(1), bins[part]
        bounds = piece.new_empty(len(piece))
        kinds = torch.unique(kind).tolist()
        for number in kinds:  # rows of like counts together, so that few large ones do not make all of them large
            chosen = slice(None) if len(kinds) == 1 else (kind == number).nonzero()[:, 0]
            k = int(count[chosen].max())
            source = piece[chosen] if maxima.shape[1] < 4 * k else _merged(maxima[chosen], 8 * k)
            bounds[chosen] = source.topk(k, dim=1).values.gather(1, count[chosen, None] - 1)[:, 0]
        bounds = bounds.to(scores.margin).masked_fill_(counts[part] == 0, torch.inf)
        # in bfloat16 a score may have grown by 2⁻⁸ of itself
        return bounds if scores.exact else bounds - bounds.abs() * 2**-8 - scores.margin[part]

    return above(scores, lower_bound, most=10 * counts + 100)


def _merged(maxima: Float[Tensor, "m g"], enough: int) -> Float[Tensor, "m h"]:
    """Maxima of larger groups, as few as may be but at least ``enough``."""
    m, groups = maxima.shape
    merge = 1
    while groups % (2 * merge) == 0 and groups // (2 * merge) >= enough:
        merge *= 2
    return maxima.view(m, merge, -1).amax(1) if merge > 1 else maxima


def largest_of_rows(pairs: SparseCode, counts: Int[Tensor, "r"]) -> Bool[Tensor, "m"]:
    """Which pairs are among the ``counts[i]`` largest positive ones of their row; among equals the first columns.

    Args:
        pairs: ascending by row and column.
        counts: [r].
    """
    values = pairs.values.clamp_min(0)
    if values.dtype == torch.float32:  # positive floats are ordered as their bits are: one sort of whole numbers does
        order = ((pairs.tokens << 32) - values.view(torch.int32)).sort(stable=True).indices
    else:
        order = values.sort(descending=True, stable=True).indices
        order = order[pairs.tokens[order].sort(stable=True).indices]
    rank = torch.arange(len(order), device=order.device) - pairs.offsets[pairs.tokens]  # rows stay where they are
    keep = torch.empty_like(order, dtype=torch.bool)
    keep[order] = rank < counts[pairs.tokens]
    return keep & (pairs.values > 0)
