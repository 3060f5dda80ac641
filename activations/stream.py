"""One shuffled, prefetching stream of training batches, from a cache or from a live harvest.

Rows come in *fills* of up to ``buffer`` tokens. Each fill is permuted as a whole and cut into batches while a thread
prepares the next, so two tokens of one context meet in a batch as often as chance within a fill says. The order depends
on the seed alone.
"""

from __future__ import annotations

import queue
import threading
import time
import warnings
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.activations.cache import ActivationCache
from saekit.activations.harvest import check_finite
from saekit.activations.source import ActivationSource

_BLOCK = 2048  # rows read from a cache in one piece


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed + 1 << 24) + number)


def cache_fills(cache: ActivationCache, buffer: int, seed: int) -> Iterator[Float[Tensor, "m d"]]:
    """The training rows of a cache, epoch after epoch without end, in blocks of a new random order each epoch."""
    rows = cache.rows_of("train").stop
    starts = torch.arange(0, rows, _BLOCK)
    epoch = 0
    while True:
        parts: list[Tensor] = []
        count = 0
        for start in starts[torch.randperm(len(starts), generator=_generator(seed, -1 - epoch))].tolist():
            batch = cache.read(start, min(start + _BLOCK, rows))
            check_finite(batch, str(cache.passport.get("hook", cache.path)), f"cache rows from {start}")
            parts.append(batch.x.float())
            count += len(batch.x)
            if count >= buffer:
                yield torch.cat(parts)
                parts, count = [], 0
        if parts:
            yield torch.cat(parts)
        epoch += 1


def live_fills(source: ActivationSource, buffer: int) -> Iterator[Float[Tensor, "m d"]]:
    """Activations of the training text as the model makes them; text that runs out begins again, with a warning.

    Raises:
        SaekitError: the text does not fill one context, or an activation is not finite.
    """
    while True:
        parts: list[Tensor] = []
        count = total = 0
        for batch in source.batches("train"):
            parts.append(batch.x.float().cpu())
            count += len(batch.x)
            if count >= buffer:
                yield torch.cat(parts)
                total, parts, count = total + count, [], 0
        if parts:
            yield torch.cat(parts)
        warnings.warn(f"the text ran out after {total + count:,} tokens and begins again", stacklevel=2)


class ShuffledStream:
    """Shuffled batches [batch_size, d] of float32 activations, without end, prepared by a thread of its own.

    Attributes:
        waited: seconds that the consumer has waited for data.
    """

    def __init__(self, fills: Iterator[Float[Tensor, "m d"]], batch_size: int, seed: int) -> None:
        """Start to prepare batches.

        Args:
            fills: blocks of rows; rows that do not fill a batch join the next block.
            batch_size: rows a batch.
            seed: of the permutations.
        """
        self.waited = 0.0
        self._batch_size, self._seed = batch_size, seed
        self._ready: queue.Queue[Tensor | BaseException] = queue.Queue(maxsize=1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._prepare, args=(fills,), daemon=True)
        self._thread.start()

    def _prepare(self, fills: Iterator[Tensor]) -> None:
        rest: Tensor | None = None
        try:
            for number, fill in enumerate(fills):
                rows = fill if rest is None else torch.cat([rest, fill])
                rows = rows[torch.randperm(len(rows), generator=_generator(self._seed, number))]
                whole = len(rows) // self._batch_size * self._batch_size
                rest = rows[whole:]
                if whole and not self._put(rows[:whole]):
                    return
        except BaseException as error:  # handed to the consumer, who raises it
            self._put(error)

    def _put(self, item: Tensor | BaseException) -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[Float[Tensor, "b d"]]:
        """Batches, in an order that the seed decides."""
        while True:
            start = time.perf_counter()
            item = self._ready.get()
            self.waited += time.perf_counter() - start
            if isinstance(item, BaseException):
                raise item
            yield from torch.split(item, self._batch_size)

    def close(self) -> None:
        """Stop the thread."""
        self._stop.set()
        self._thread.join(timeout=10)
