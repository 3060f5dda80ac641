"""One shuffled, prefetching stream of training batches, from a cache or from a live harvest.

A thread collects rows in *fills* of ``buffer`` tokens, permutes each fill as a whole and cuts it into batches, so two
tokens of one context meet in a batch as often as chance within a fill says. The order depends on the seed alone.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.activations.cache import ActivationCache
from saekit.activations.harvest import ActivationBatch, Harvest, check_finite, harvest_hooks
from saekit.activations.source import ActivationSource

_BLOCK = 2048  # rows read from a cache in one piece


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed + 1 << 24) + number)


def _row(batch: ActivationBatch) -> Float[Tensor, "m w"]:
    """Activations, with gradients beside them where there are any."""
    x = batch.x.float().cpu()
    return x if batch.gradients is None else torch.cat([x, batch.gradients.float().cpu()], dim=1)


def cache_rows(cache: ActivationCache, seed: int, gradients: bool = False) -> Iterator[Float[Tensor, "m w"]]:
    """The training rows of a cache in blocks, without end; each epoch has a random order of blocks of its own.

    Rows are activations [m, d] or, with ``gradients``, activations and gradients side by side [m, 2·d].

    Raises:
        SaekitError: a shard is damaged, or an activation is not finite.
    """
    rows = cache.rows_of("train").stop
    starts = torch.arange(0, rows, _BLOCK)
    epoch = 0
    while True:
        for start in starts[torch.randperm(len(starts), generator=_generator(seed, -1 - epoch))].tolist():
            batch = cache.read(start, min(start + _BLOCK, rows), gradients=gradients)
            check_finite(batch, str(cache.passport.get("hook", cache.path)), f"cache rows from {start}")
            yield _row(batch)
        epoch += 1


def live_rows(source: ActivationSource, gradients: bool = False) -> Iterator[Float[Tensor, "m w"]]:
    """Rows, as in ``cache_rows``, of the training text as the model makes them.

    Text that runs out begins again, with a warning.

    Raises:
        SaekitError: the text does not fill one context, or an activation is not finite.
    """
    return _endless(lambda: map(_row, source.batches("train", gradients=gradients)))


def live_rows_of_hooks(source: ActivationSource, hooks: Sequence[str]) -> Iterator[Float[Tensor, "m w"]]:
    """Rows of the training text as in ``live_rows``, the activations at several hook points side by side.

    Each token has one row [d₁ + d₂ + ...], the hooks in the order asked for; the model goes over the text once.

    Raises:
        SaekitError: as ``live_rows``.
    """

    def row(found: Harvest) -> Tensor:
        return torch.cat([_row(batch) for batch in found.batches.values()], dim=1)

    return _endless(lambda: map(row, harvest_hooks(source.model, hooks, source.contexts("train"))))


def _endless(text: Callable[[], Iterator[Float[Tensor, "m w"]]]) -> Iterator[Float[Tensor, "m w"]]:
    while True:
        total = 0
        for rows in text():
            yield rows
            total += len(rows)
        warnings.warn(f"the text ran out after {total:,} tokens and begins again", stacklevel=2)


def first_rows(pieces: Iterator[Float[Tensor, "m w"]], count: int) -> Iterator[Float[Tensor, "m w"]]:
    """The first ``count`` rows of the pieces, in pieces."""
    for piece in pieces:
        yield piece[:count]
        count -= len(piece)
        if count <= 0:
            return


class ShuffledStream:
    """Shuffled batches [batch_size, w] of float32 rows, prepared by a thread of its own.

    Attributes:
        waited: seconds that the consumer has waited for data.
    """

    def __init__(self, rows: Iterator[Float[Tensor, "m w"]], batch_size: int, buffer: int, seed: int) -> None:
        """Start to prepare batches.

        Args:
            rows: pieces of any length; where they end, rows that do not fill a batch are left out.
            batch_size: rows a batch.
            buffer: rows that are permuted together, at least; what does not fill a batch joins the next fill.
            seed: of the permutations.
        """
        self.waited = 0.0
        self._rows, self._batch_size, self._buffer, self._seed = rows, batch_size, max(buffer, batch_size), seed
        self._ready: queue.Queue[Tensor | BaseException | None] = queue.Queue(maxsize=1)
        self._stop = threading.Event()
        self._batches: Iterator[Tensor] = self._take()
        self._thread = threading.Thread(target=self._prepare, daemon=True)
        self._thread.start()

    def _prepare(self) -> None:
        try:
            parts: list[Tensor] = []
            count = fills = 0
            for piece in self._rows:
                if self._stop.is_set():
                    return
                parts.append(piece)
                count += len(piece)
                if count >= self._buffer:
                    parts = [self._deliver(parts, fills)]
                    count, fills = len(parts[0]), fills + 1
            self._deliver(parts, fills)
            self._put(None)
        except BaseException as error:  # handed to the consumer, who raises it
            self._put(error)

    def _deliver(self, parts: list[Tensor], number: int) -> Tensor:
        """Permute a fill and hand on its whole batches; returns the rest."""
        rows = torch.cat(parts)
        rows = rows[torch.randperm(len(rows), generator=_generator(self._seed, number))]
        whole = len(rows) // self._batch_size * self._batch_size
        if whole:
            self._put(rows[:whole])
        return rows[whole:].clone()

    def _put(self, item: Tensor | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.2)
                break
            except queue.Full:
                continue

    def __iter__(self) -> Iterator[Float[Tensor, "b w"]]:
        """The batches that were not taken yet, in an order that the seed decides."""
        return self._batches

    def peek(self, rows: int) -> Float[Tensor, "m w"]:
        """The first ``rows`` rows, or as many as there are; no batch is taken by that."""
        first: list[Tensor] = []
        for batch in self._batches:
            first.append(batch)
            if sum(map(len, first)) >= rows:
                break
        self._batches = itertools.chain(first, self._batches)
        return torch.cat(first)[:rows]

    def _take(self) -> Iterator[Tensor]:
        while True:
            start = time.perf_counter()
            item = self._ready.get()
            self.waited += time.perf_counter() - start
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield from torch.split(item, self._batch_size)

    def close(self) -> None:
        """Stop the thread, wait until it no longer uses the model, and let go of the rows."""
        self._stop.set()
        self._thread.join()
        self._rows = iter(())  # a harvest that has not ended takes its hooks off the model when it is let go
