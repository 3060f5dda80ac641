"""One harvest by several processes: each runs the model on its share of the passes, and all get all rows in order."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from inspect import GEN_CREATED, getgeneratorstate
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saekit.activations.finite import BadTokens
from saekit.activations.tokens import ContextBatch
from saekit.errors import SaekitError, first_line
from saekit.interrupt import Interrupted, InterruptGuard
from saekit.ranks import Ranks, ToldError, current

Piece = tuple[Tensor, ...]  # columns [m, ...] of as many rows


Run = Callable[[Iterator[ContextBatch], BadTokens, int, Iterable[int]], Iterator[Piece]]


class Harvester(NamedTuple):
    """How one process harvests its share.

    Attributes:
        contexts: from the number of a batch to the batches of contexts from there on, the same on every process.
        run: what the model makes of some of them, batch by batch. It is given the batches, what counts the tokens that
            are left out, the contexts of a pass, and the numbers of the batches, for messages.
        at_once: contexts of a pass (``in_passes``), and of a batch.
        size: contexts of a batch.
    """

    contexts: Callable[[int], Iterator[ContextBatch]]
    run: Run
    at_once: int
    size: int

    def alone(self, bad: BadTokens | None, first: int) -> Generator[Piece, None, None]:
        """The pieces from one on, all by this process."""
        yield from self.run(self.contexts(first), bad or BadTokens(), self.at_once, count(first))


def in_order(harvester: Harvester, bad: BadTokens, first: int | None) -> Generator[Piece, None, None]:
    """The pieces of a harvest from one on, made by the processes of this run (``spread``) or by this one alone."""
    if current().world > 1:
        yield from spread(current(), harvester, bad, first)
    elif first is not None:
        yield from harvester.alone(bad, first)


def assist(pieces: Iterable[Any]) -> None:
    """Take part in a harvest of which this process wants no rows (``in_order`` from None) until no other wants any.

    Raises:
        SaekitError: as ``spread``.
        Interrupted: this process was asked to stop, once the others have.
    """
    with InterruptGuard() as guard:
        try:
            deque(pieces, maxlen=0)
        except SaekitError:
            if not guard.received:
                raise
    if guard.received:
        raise Interrupted(guard.received)


def spread(ranks: Ranks, harvester: Harvester, bad: BadTokens, first: int | None) -> Iterator[Piece]:
    """The pieces of a harvest from one on; pass i of the model is that of process i mod P.

    Passes are what they are on one process, so the rows are too, bit for bit on like processors. A process that wants
    no more rows goes on with its share until none does; it does so while it closes this.

    Args:
        ranks: the processes; each of them calls this at the same time.
        harvester: how each harvests.
        bad: its count is set to that of all tokens left out up to the end of the newest piece.
        first: number of the first piece that this process wants; None if it wants none.

    Raises:
        SaekitError: one of the processes raised it, was stopped, or ended.
    """
    begun = ranks.told({"first": first, "skipped": bad.count, "at_once": harvester.at_once}, harvest=True)
    wanted = [each for each in begun if each["first"] is not None]
    if not wanted:
        return
    start = min(wanted, key=lambda each: each["first"])
    at_once = min(each["at_once"] for each in begun)
    unit = max(1, at_once // harvester.size)
    own = BadTokens(bad.skip, limits=bad.limits)
    mine = _share(harvester.contexts(start["first"]), ranks, unit)
    numbers = (start["first"] + (i // unit * ranks.world + ranks.rank) * unit + i % unit for i in count())
    found = harvester.run(mine, own, at_once, numbers)
    number, skipped, whole, last = start["first"], int(start["skipped"]), unit * ranks.world, False
    try:
        while not last and _go_on(ranks, needs=first is not None):
            pieces = _round(ranks, found, own, unit)
            last = len(pieces) < whole  # the text has ended, which all see
            for piece, left_out in pieces:
                skipped, number = skipped + left_out, number + 1
                if first is not None and number > first:
                    bad.count = skipped
                    yield piece
    except GeneratorExit:  # this process has enough
        while not last and _go_on(ranks, needs=False):
            last = len(_round(ranks, found, own, unit)) < whole
        raise


def leave(pieces: Generator[Any, None, None], ranks: Ranks | None = None) -> None:
    """Want no more of a harvest. One that was not begun is, where others wait for its beginning."""
    if (ranks or current()).world > 1 and getgeneratorstate(pieces) == GEN_CREATED:
        next(pieces, None)
    pieces.close()


def _share(contexts: Iterable[ContextBatch], ranks: Ranks, unit: int) -> Iterator[ContextBatch]:
    """The batches of contexts that are this process's: ``unit`` in a row of as many times the number of processes."""
    return (batch for number, batch in enumerate(contexts) if number // unit % ranks.world == ranks.rank)


def _go_on(ranks: Ranks, needs: bool) -> bool:
    """Whether any process needs another round."""
    told = ranks.told({"needs": needs, "stopped": ranks.stopped}, harvest=True)
    stopped = [number for number, each in enumerate(told) if each["stopped"]]
    if stopped and not ranks.stopped:
        raise SaekitError(f"process {stopped[0]} was stopped, so this one stopped too; --resume goes on")
    return not stopped and any(each["needs"] for each in told)


def _round(ranks: Ranks, found: Iterator[Piece], own: BadTokens, unit: int) -> list[tuple[Piece, int]]:
    """The pieces of one pass of every process, each with the tokens that were left out of it."""
    pieces: list[Piece] = []
    counts: list[int] = []
    error: Exception | None = None
    try:
        for _ in range(unit):
            before = own.count
            if (piece := next(found, None)) is None:
                break
            pieces.append(tuple(column.detach().cpu().contiguous() for column in piece))
            counts.append(own.count - before)
    except Exception as raised:  # whatever it is, the others wait to be told
        error = raised
    described = [[(str(c.dtype).removeprefix("torch."), list(c.shape)) for c in piece] for piece in pieces]
    message = None if error is None else str(error) if isinstance(error, SaekitError) else first_line(error)
    told = ranks.told({"pieces": described, "skipped": counts, "error": message}, harvest=True)
    if error is not None and not isinstance(error, SaekitError):
        raise error
    if errors := [each["error"] for each in told if each["error"] is not None]:
        raise ToldError(errors[0])
    columns = [column.flatten().view(torch.uint8) for piece in pieces for column in piece if column.numel()]
    every = ranks.gather(torch.cat(columns) if columns else torch.empty(0, dtype=torch.uint8), harvest=True)
    return [
        each
        for sent, facts in zip(every, told, strict=True)
        for each in zip(_unpacked(sent, facts["pieces"]), facts["skipped"], strict=True)
    ]


def _unpacked(sent: Tensor, described: Sequence[Sequence[tuple[str, list[int]]]]) -> Iterator[Piece]:
    """Pieces from their bytes."""
    start = 0
    for columns in described:
        piece: list[Any] = []
        for name, shape in columns:
            dtype = getattr(torch, name)
            stop = start + math.prod(shape) * dtype.itemsize
            piece.append(sent[start:stop].clone().view(dtype).reshape(shape))
            start = stop
        yield tuple(piece)
