"""Which rows of a cache are held out: the hash of a row's group decides, so that every part is like the whole.

A group is a document (or an image, a patient: whatever ``documents`` numbers) or, where a cache has too few of those to
be divided, a block of neighbouring rows. Groups stand on a circle of 2²⁰ places, each at its hash; an arc of it is held
out, the next one serves the calibration, the rest is trained on. The arcs are chosen once all rows are written, so that
they hold the shares of rows that are wanted; a reader needs the arcs alone (our reading throughout).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Annotated, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from saekit.activations.python_source import Split
from saekit.errors import SaekitError

SHARE = 0.05  # of the rows for each of the smaller parts
_MOST = {"heldout": 65_536, "calibration": 262_144}  # rows of them; thresholds need many
_PLACES = 1 << 20
_STARTS = 16  # places that are tried as the beginning of the arcs
_FARTHEST = 2  # times the wanted rows, or that part of them, that whole documents may give
_FEWEST = 3  # groups, one for each part
_BLOCK = 256  # rows of a block, at most
_BLOCKS = 200  # a block is at most one in so many of the rows before it

Count = Annotated[int, Field(ge=0, lt=2**62)]
Place = Annotated[int, Field(ge=0, le=_PLACES)]
Grouping = Literal["documents", "blocks"]
_Numbers = npt.NDArray[np.int64]


class Parts(BaseModel):
    """Numbers of rows."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    train: Count
    calibration: Count
    heldout: Count

    @property
    def total(self) -> int:
        """Of all parts."""
        return self.train + self.calibration + self.heldout


class Division(BaseModel):
    """How a cache is divided into its parts.

    Attributes:
        by: what a group is: ``documents``, or ``blocks`` of neighbouring rows.
        start: place on the circle where the arc that is held out begins.
        heldout, calibration: places of the two arcs.
        rows: of each part.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    by: Grouping
    start: Place = 0
    heldout: Place = 0
    calibration: Place = 0
    rows: Parts

    def holds(self, part: Split, first: int, documents: Int[Tensor, "m"]) -> Bool[Tensor, "m"]:
        """Which of some neighbouring rows belong to a part.

        Args:
            part: the part.
            first: number of the first row in the cache.
            documents: [m] numbers of the rows' documents.
        """
        numbers = np.arange(first, first + len(documents))
        groups = documents.numpy() if self.by == "documents" else blocks(numbers)
        places, names = (_places(groups) - self.start) % _PLACES, ("heldout", "calibration", "train")
        edges = np.cumsum([self.heldout, self.calibration])
        return torch.from_numpy(np.searchsorted(edges, places, side="right") == names.index(part))

    @property
    def told(self) -> str:
        """In words."""
        whole = "documents" if self.by == "documents" else f"blocks of up to {_BLOCK} neighbouring rows"
        return f"a hash divides whole {whole} among the parts"


def divided(columns: Iterable[Int[Tensor, "m"]], by: Grouping | None = None) -> Division:
    """The division of rows that are written.

    Args:
        columns: the numbers of the documents, row by row, in pieces.
        by: what the groups are, however far from the wanted shares the parts are then; if not given, documents, unless
            they are too few or too unlike in size for parts of half to twice the wanted rows.

    Raises:
        SaekitError: by documents, and there are fewer than three.
    """
    by_document, by_block, rows = np.zeros(_PLACES, np.int64), np.zeros(_PLACES, np.int64), 0
    for documents in columns:
        by_document += np.bincount(_places(documents.numpy()), minlength=_PLACES)
        by_block += np.bincount(_places(blocks(np.arange(rows, rows + len(documents)))), minlength=_PLACES)
        rows += len(documents)
    arcs = _arcs(by_document)
    if by == "documents" and arcs is None:
        raise SaekitError(
            f"the rows are of {np.count_nonzero(by_document)} groups; to hold whole ones out, there must be {_FEWEST}"
        )
    if arcs is not None and (by == "documents" or (by is None and arcs.deviation <= _FARTHEST)):
        return arcs.division("documents")
    arcs = _arcs(by_block)
    if arcs is None:
        return Division(by="blocks", rows=Parts(train=rows, calibration=0, heldout=0))
    return arcs.division("blocks")


def blocks(rows: _Numbers) -> _Numbers:
    """The block of each row: one in 200 of the rows before it, at least one row, at most 256.

    So it depends on the row's number alone, and a cache of any length has at least some 200 of them.
    """
    starts = _small_blocks()
    far = len(starts) - 1 + (rows - starts[-1]) // _BLOCK
    return np.where(rows < starts[-1], np.searchsorted(starts, rows, side="right") - 1, far)


@cache
def _small_blocks() -> _Numbers:
    """Where blocks of less than 256 rows begin, and the first of 256."""
    starts = [0]
    while starts[-1] < _BLOCKS * _BLOCK:
        starts.append(starts[-1] + max(1, starts[-1] // _BLOCKS))
    return np.array(starts)


def _places(groups: _Numbers) -> _Numbers:
    """Where groups of these numbers stand on the circle: their upper bits, scrambled (the finaliser of splitmix64)."""
    with np.errstate(over="ignore"):
        z = groups.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(44)).astype(np.int64)


def _factor(found: float, wanted: float) -> float:
    return max(found / wanted, wanted / found)


class _Arcs(NamedTuple):
    """Arcs of the circle, the rows on them, and the factor by which these miss what is wanted."""

    deviation: float
    start: int
    heldout: int
    calibration: int
    rows: Parts

    def division(self, by: Grouping) -> Division:
        return Division(by=by, start=self.start, heldout=self.heldout, calibration=self.calibration, rows=self.rows)


def _arcs(rows: _Numbers) -> _Arcs | None:
    """The arcs that come nearest to the wanted shares, with a group on each; None for fewer than three groups.

    Args:
        rows: [2²⁰] at each place of the circle.
    """
    places = rows.nonzero()[0]
    n, total = len(places), int(rows.sum())
    if n < _FEWEST:
        return None
    wanted = {part: min(SHARE * total, most) for part, most in _MOST.items()}
    found = []
    for first in sorted({n * i // _STARTS for i in range(_STARTS)}):
        around = np.roll(places, -first)
        sums = rows[around].cumsum()
        i = int(np.abs(sums[: n - 2] - wanted["heldout"]).argmin())  # the last group that is held out
        j = i + 1 + int(np.abs(sums[i + 1 : n - 1] - sums[i] - wanted["calibration"]).argmin())
        heldout, calibration = int(sums[i]), int(sums[j] - sums[i])
        found.append(
            _Arcs(
                max(_factor(heldout, wanted["heldout"]), _factor(calibration, wanted["calibration"])),
                int(around[0]),
                int(around[i + 1] - around[0]) % _PLACES,
                int(around[j + 1] - around[i + 1]) % _PLACES,
                Parts(train=total - heldout - calibration, calibration=calibration, heldout=heldout),
            )
        )
    return min(found, key=lambda arcs: arcs.deviation)
