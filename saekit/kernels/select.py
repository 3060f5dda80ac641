"""Exact selection of the largest entries, by row, by column or in the whole matrix, the same on every backend.

Among equal entries the one with the smallest index wins. Entries that are not positive never decide anything, since
relu follows every selection, so ties among them are left alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saekit.kernels.ops import ANY, operation

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

_GROUP = 8
_SAMPLE = 1 << 16


def _largest(rows: Float[Tensor, "n F"], k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Values and columns of the k largest of each row, descending; ties fall as they may."""
    n, width = rows.shape
    groups = width // _GROUP
    if width % _GROUP or groups < 2 * k:
        values, columns = rows.topk(k, dim=1)
        return values, columns
    # Two stages: the k largest lie in the k groups with the largest maxima.
    grouped = rows.view(n, _GROUP, groups)
    chosen = grouped.amax(1).topk(k, dim=1, sorted=False).indices
    candidates = grouped.gather(2, chosen[:, None, :].expand(n, _GROUP, k)).flatten(1)
    values, places = candidates.topk(k, dim=1)
    return values, chosen.gather(1, places % k) + places.div(k, rounding_mode="floor") * groups


@operation
def largest_in_rows(rows: Float[Tensor, "n F"], k: int) -> Int[Tensor, "n k"]:
    """Columns of the k largest entries of each row, in no particular order.

    Args:
        rows: [n, F] without gradients.
        k: 1 to F.
    """
    return rows.sort(dim=1, descending=True, stable=True).indices[:, :k]


@largest_in_rows.on(ANY)
def _in_rows(rows: Tensor, k: int) -> Tensor:
    width = rows.shape[1]
    if k == width:
        return torch.arange(width, device=rows.device).expand(rows.shape)
    values, columns = _largest(rows, k + 1)
    tied = (values[:, k - 1] == values[:, k]) & (values[:, k] > 0)
    columns = columns[:, :k]
    if tied.any():
        columns = columns.clone()
        columns[tied] = rows[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return columns


@operation
def largest_in_columns(matrix: Float[Tensor, "n F"], counts: Int[Tensor, "F"]) -> tuple[Tensor, Tensor]:
    """Tokens and features, ordered by token, of the ``counts[j]`` largest entries of each column j.

    Args:
        matrix: [n, F] without gradients.
        counts: [F], each 0 to n.
    """
    order = matrix.sort(dim=0, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        0, order, torch.arange(len(matrix), device=order.device)[:, None].expand_as(order)
    )
    tokens, features = (rank < counts).nonzero().unbind(1)
    return tokens, features


@largest_in_columns.on(ANY)
def _in_columns(matrix: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of like counts together, so that few large counts do not make every column's selection large."""
    columns = matrix.T.contiguous()
    n = columns.shape[1]
    bins = counts.clamp(min=1).log2().ceil().long()
    found = []
    for number in torch.unique(bins[counts > 0]).tolist():
        features = ((bins == number) & (counts > 0)).nonzero().flatten()
        rows, take = columns[features], counts[features]
        width = min(int(take.max()) + 1, n)
        values, tokens = _largest(rows, width)
        last = values.gather(1, take[:, None] - 1)
        following = values.gather(1, take[:, None].clamp(max=width - 1))
        tied = ((take < n) & (last == following)[:, 0] & (last[:, 0] > 0)).nonzero().flatten()
        if tied.numel():
            tokens[tied] = rows[tied].sort(dim=1, descending=True, stable=True).indices[:, :width]
        chosen = torch.arange(width, device=matrix.device) < take[:, None]
        found.append((tokens[chosen], features[:, None].expand_as(tokens)[chosen]))
    if not found:
        return counts.new_zeros(0), counts.new_zeros(0)
    tokens, features = (torch.cat(part) for part in zip(*found, strict=True))
    tokens, order = tokens.sort(stable=True)
    return tokens, features[order]


@operation
def largest_in_all(matrix: Float[Tensor, "n F"], total: int) -> Int[Tensor, "m"]:
    """Flat indices, ascending, of the ``total`` largest entries of a whole matrix, those not positive left out.

    Args:
        matrix: [n, F], contiguous, without gradients.
        total: at least 1.
    """
    flat = matrix.flatten()
    best = flat.sort(descending=True, stable=True).indices[:total]
    return best[flat[best] > 0].sort().values


@largest_in_all.on(ANY)
def _in_all(matrix: Tensor, total: int) -> Tensor:
    flat = matrix.flatten()
    survivors = (flat > _lower_bound(flat, total)).nonzero().flatten()
    if survivors.numel() < total:  # the sample misled, or fewer are positive
        survivors = (flat > 0).nonzero().flatten()
    return survivors[largest_among(flat[survivors], total)]


@operation
def largest_among(values: Float[Tensor, "m"], total: int) -> Bool[Tensor, "m"]:
    """Which values are among the ``total`` largest positive ones; among equals the first."""
    keep = torch.zeros_like(values, dtype=torch.bool)
    keep[values.sort(descending=True, stable=True).indices[:total]] = True
    return keep & (values > 0)


@largest_among.on(ANY)
def _among(values: Tensor, total: int) -> Tensor:
    if int((values > 0).sum()) <= total:
        return values > 0
    smallest = values.topk(total, sorted=False).values.min()
    keep = values > smallest
    ties = (values == smallest).nonzero()[:, 0]
    keep[ties[: total - int(keep.sum())]] = True
    return keep


def _lower_bound(flat: Float[Tensor, "m"], total: int) -> float:
    """A value, at least 0, that almost surely lies below the ``total`` largest entries, from a sample of them."""
    stride = flat.numel() // _SAMPLE | 1  # odd, so that a width that is a power of two does not alias
    sample = flat[::stride]
    expected = total / flat.numel() * sample.numel()
    rank = int(expected + 6 * expected**0.5 + 10)
    if stride == 1 or rank >= sample.numel():
        return 0.0
    return max(0.0, float(sample.topk(rank, sorted=False).values.min()))
