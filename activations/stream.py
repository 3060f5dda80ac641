"""One shuffled, prefetching stream of training batches, from a cache or from a live harvest.

A thread collects rows in *fills* of ``buffer`` tokens, permutes each fill as a whole and cuts it into batches, so two
tokens of one context meet in a batch as often as chance within a fill says. The order depends on the seed alone.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import chain, count, islice
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.activations.batch import ActivationBatch
from saekit.activations.cache import ActivationCache
from saekit.activations.finite import BadTokens
from saekit.activations.harvesting import harvest, harvest_hooks
from saekit.activations.source import ActivationSource, piece_size
from saekit.activations.spread import Harvester, Piece, Run, in_order, leave
from saekit.activations.tee import Reader
from saekit.activations.tokens import ContextBatch
from saekit.errors import SaekitWarning

_BLOCK = 2048  # rows read from a cache in one piece


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed + 1 << 24) + number)


def _row(batch: ActivationBatch) -> Float[Tensor, "m w"]:
    """Activations, with gradients beside them where there are any."""
    x = batch.x.float().cpu()
    return x if batch.gradients is None else torch.cat([x, batch.gradients.float().cpu()], dim=1)


def cache_rows(
    cache: ActivationCache, seed: int, gradients: bool = False, *, first: int = 0, bad: BadTokens | None = None
) -> Iterator[Float[Tensor, "m w"]]:
    """The training rows of a cache in blocks, without end; each epoch has a random order of blocks of its own.

    Of each block of 2,048 rows, those of the other parts are left out.

    Rows are activations [m, d] or, with ``gradients``, activations and gradients side by side [m, 2·d].

    Args:
        cache: the data.
        seed: of the orders.
        gradients: whether they stand beside the activations.
        first: blocks to pass over, which are not read.
        bad: what becomes of tokens that are not to be learned from; NaN or inf is an error if not given.

    Raises:
        SaekitError: a shard is damaged, or an activation is not finite.
    """
    bad = bad or BadTokens()
    starts = torch.arange(0, len(cache), _BLOCK)
    epoch, passed = divmod(first, len(starts))
    while True:
        order = starts[torch.randperm(len(starts), generator=_generator(seed, -1 - epoch))]
        for start in order[passed:].tolist():
            batch = cache.read(start, min(start + _BLOCK, len(cache)), gradients=gradients)
            batch = batch.where(cache.division.holds("train", start, batch.documents))
            yield _row(*bad.sift([batch], [cache.hook], f"training rows from {start}"))
        epoch, passed = epoch + 1, 0


def live_rows(
    source: ActivationSource,
    gradients: bool = False,
    *,
    first: int | None = 0,
    bad: BadTokens | None = None,
    wanted: int | None = None,
) -> Iterator[Float[Tensor, "m w"]]:
    """Rows, as in ``cache_rows``, of the training text as the model makes them, one piece a batch of contexts.

    Text that runs out begins again, with a warning: before the first row where the pool holds all of the text and
    ``wanted`` rows are more, else when it happens. The first ``first`` batches are passed over, without the model.
    Several processes share the harvest; with ``first`` None this one wants none of the rows.

    Raises:
        SaekitError: the text does not fill one context, or an activation is not finite.
    """

    def run(contexts: Iterator[ContextBatch], bad: BadTokens, at_once: int, numbers: Iterable[int]) -> Iterator[Piece]:
        manner: Any = {"gradients": gradients, "bad": bad, "numbers": numbers, "at_once": at_once}
        return ((_row(batch),) for batch in harvest(source.model, source.hook, contexts, **manner))

    return _live(source, run, gradients, wanted, bad, first)


def live_rows_of_hooks(
    source: ActivationSource,
    hooks: Sequence[str],
    *,
    first: int | None = 0,
    bad: BadTokens | None = None,
    wanted: int | None = None,
) -> Iterator[Float[Tensor, "m w"]]:
    """Rows of the training text as in ``live_rows``, the activations at several hook points side by side.

    Each token has one row [d₁ + d₂ + ...], the hooks in the order asked for; the model goes over the text once.

    Raises:
        SaekitError: as ``live_rows``.
    """

    def run(contexts: Iterator[ContextBatch], bad: BadTokens, at_once: int, numbers: Iterable[int]) -> Iterator[Piece]:
        for found in harvest_hooks(source.model, hooks, contexts, bad=bad, numbers=numbers, at_once=at_once):
            yield (torch.cat([_row(batch) for batch in found.batches.values()], dim=1),)

    return _live(source, run, False, wanted, bad, first)


def _live(
    source: ActivationSource, run: Run, gradients: bool, wanted: int | None, bad: BadTokens | None, first: int | None
) -> Iterator[Float[Tensor, "m w"]]:
    """Rows by all processes there are (``spread``)."""

    def contexts(first: int) -> Iterator[ContextBatch]:
        return islice(_endless(source, gradients, wanted), first, None)

    harvester = Harvester(contexts, run, source.at_once(gradients), piece_size(gradients))
    with closing(in_order(harvester, bad or BadTokens(), first)) as pieces:
        for (rows,) in pieces:
            yield rows


def _endless(source: ActivationSource, gradients: bool = False, wanted: int | None = None) -> Iterator[ContextBatch]:
    """The training text over and over."""
    told = False

    def tell(tokens: int) -> None:
        nonlocal told
        if not told and wanted is not None and 0 < tokens < wanted:
            told = True
            passes = f"{wanted:,} are {wanted / tokens:.1f} passes over it"
            warnings.warn(f"the text holds {tokens:,} training tokens; {passes}", SaekitWarning, stacklevel=2)

    for lap in count():
        total = 0
        for contexts in source.mixed("train", piece_size(gradients), lap=lap, short=tell):
            yield contexts
            total += int(contexts.kept.sum())
        if not told:
            warnings.warn(f"the text ran out after {total:,} tokens and begins again", SaekitWarning, stacklevel=2)


class StreamState(NamedTuple):
    """A place between two batches of a stream, from which it can go on.

    Attributes:
        pieces: of the source that lie before the fill of the next batch.
        rows: in these pieces.
        fill: number of that fill.
        taken: batches of it that lie before the place.
        skipped: tokens in these pieces that were left out (``BadTokens``).
        rest: [m, w] rows of the fill before that joined this one; None for none.
    """

    pieces: int = 0
    rows: int = 0
    fill: int = 0
    taken: int = 0
    skipped: int = 0
    rest: Float[Tensor, "m w"] | None = None


class ShuffledStream:
    """Shuffled batches [batch_size, w] of float32 rows, prepared by a thread of its own.

    Attributes:
        waited: seconds that the consumer has waited for data.
        place: after the last batch that was taken.
    """

    def __init__(
        self,
        rows: Iterator[Float[Tensor, "m w"]],
        batch_size: int,
        buffer: int,
        seed: int,
        *,
        limit: int | None = None,
        place: StreamState | None = None,
        bad: BadTokens | None = None,
        pinned: bool = False,
    ) -> None:
        """Start to prepare batches.

        Args:
            rows: pieces of any length; where they end, rows that do not fill a batch are left out.
            batch_size: rows a batch.
            buffer: rows that are permuted together, at least; what does not fill a batch joins the next fill.
            seed: of the permutations.
            limit: rows to take in all; nothing is read or harvested in vain.
            place: where to go on; ``rows`` then begins with piece number ``place.pieces``.
            bad: counts the tokens that ``rows`` leaves out.
            pinned: whether batches lie where a card can fetch them while the processor goes on.
        """
        self.waited = 0.0
        self.place = place or StreamState()
        self._rows, self._batch_size, self._buffer, self._seed = rows, batch_size, max(buffer, batch_size), seed
        self._limit, self._bad, self._pinned = limit, bad or BadTokens(), pinned
        self._ready: queue.Queue[_Fill | BaseException | None] = queue.Queue(maxsize=1)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._batches: Iterator[tuple[Tensor, StreamState]] = self._take()
        self._thread = threading.Thread(target=self._prepare, args=[self.place], daemon=True)
        self._thread.start()

    def _prepare(self, place: StreamState) -> None:
        try:
            parts = [] if place.rest is None else [place.rest]
            pieces, rows = place.pieces, place.rows
            while (self._limit is None or rows < self._limit) and (piece := next(self._rows, None)) is not None:
                if self._stop.is_set():
                    return
                parts.append(piece if self._limit is None else piece[: self._limit - rows])
                pieces, rows = pieces + 1, rows + len(parts[-1])
                if sum(map(len, parts)) >= self._buffer:
                    place = self._deliver(parts, place, pieces, rows)
                    parts = [] if place.rest is None else [place.rest]
            self._deliver(parts, place, pieces, rows)
            self._put(None)
        except BaseException as error:  # handed to the consumer, who raises it
            self._put(error)
        finally:
            if isinstance(self._rows, Generator):
                try:
                    leave(self._rows)
                except BaseException as error:  # of a harvest that goes on for other processes
                    self._error = error
            elif isinstance(self._rows, Reader):
                self._rows.close()  # others that read the same rows do not wait for it

    def _deliver(self, parts: list[Tensor], place: StreamState, pieces: int, rows: int) -> StreamState:
        """Permute a fill and hand on its whole batches; returns the place after them."""
        made = torch.cat(parts) if parts else torch.empty(0, 0)
        order = torch.randperm(len(made), generator=_generator(self._seed, place.fill))
        filled = torch.empty(made.shape, dtype=made.dtype, pin_memory=self._pinned)
        torch.index_select(made, 0, order, out=filled)
        whole = len(filled) // self._batch_size * self._batch_size
        after = StreamState(pieces, rows, place.fill + 1, 0, self._bad.count, filled[whole:].clone())
        if whole:
            self._put(_Fill(filled[:whole], place, after))
        return after

    def _put(self, item: _Fill | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.2)
                break
            except queue.Full:
                continue

    def __iter__(self) -> Iterator[Float[Tensor, "b w"]]:
        """The batches that were not taken yet, in an order that the seed decides."""
        for batch, place in self._batches:
            self.place = place
            yield batch

    def peek(self, rows: int) -> Float[Tensor, "m w"]:
        """The first ``rows`` rows, or as many as there are; no batch is taken by that."""
        first: list[tuple[Tensor, StreamState]] = []
        for batch in self._batches:
            first.append(batch)
            if sum(len(each) for each, _ in first) >= rows:
                break
        self._batches = chain(first, self._batches)
        return torch.cat([each for each, _ in first])[:rows]

    def _take(self) -> Iterator[tuple[Tensor, StreamState]]:
        while True:
            start = time.perf_counter()
            item = self._ready.get()
            self.waited += time.perf_counter() - start
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            batches = torch.split(item.rows, self._batch_size)
            for number, batch in enumerate(batches, 1):
                if number > item.before.taken:
                    yield batch, item.after if number == len(batches) else item.before._replace(taken=number)

    def close(self) -> None:
        """Stop the thread, wait until it no longer uses the model, and let go of the rows.

        Raises:
            SaekitError: this process took part in a harvest for others, and that failed; not while another error is
                on its way.
        """
        self._stop.set()
        if isinstance(self._rows, Reader):
            self._rows.close()  # it may wait for the others, as these may for it
        self._thread.join()
        error, self._error = self._error, None
        self._rows = iter(())  # a harvest that has not ended takes its hooks off the model when it is let go
        if error is not None and sys.exc_info()[0] is None:
            raise error


class _Fill(NamedTuple):
    """Whole batches, one after the other, with the places of the stream before and after them."""

    rows: Tensor
    before: StreamState
    after: StreamState
