"""One source of rows for several readers, so that a model goes over the text once for all of them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.activations.finite import BadTokens
from saekit.activations.spread import leave

_GONE = float("inf")  # the place of a reader that wants no more


class Tee:
    """Pieces of rows for several readers, each in a thread of its own; a piece goes once all have had it.

    Whoever comes first to a piece has it made; a reader that is more than ``window`` rows before the last waits.
    """

    def __init__(
        self,
        rows: Callable[[int | None], Iterator[Float[Tensor, "m w"]]],
        firsts: Sequence[int],
        window: int,
        bad: BadTokens,
    ) -> None:
        """Readers begin at the pieces of these numbers.

        Args:
            rows: makes the pieces from that of a number on.
            firsts: for each reader, the number of its first piece.
            window: rows that are held at most while the readers are at different places, nearly.
            bad: counts the tokens that ``rows`` leaves out.
        """
        self._at: list[float] = list(firsts)
        self._head = min(firsts)  # number of the piece that comes next
        self._pieces, self._bad, self._window = rows(self._head), bad, window
        self._held: deque[tuple[Tensor, int]] = deque()
        self._error: BaseException | None = None
        self._closed = False
        self._moved = threading.Condition()

    def reader(self, number: int, bad: BadTokens, columns: Sequence[slice] = ()) -> Reader:
        """One of the readers.

        Args:
            number: which.
            bad: its count is set to that of the tokens left out before the end of the newest piece.
            columns: the parts of each row that it takes, side by side; all if none are given.
        """
        return Reader(self, number, bad, columns)

    def close(self) -> None:
        """End all readers and let go of the rows."""
        with self._moved:  # so no reader is having a piece made
            self._closed = True
            if isinstance(self._pieces, Generator):
                leave(self._pieces)
            self._moved.notify_all()

    def next_of(self, number: int) -> tuple[Float[Tensor, "m w"], int] | None:
        """The next piece of a reader and the tokens left out up to its end; None at the end or when all is closed.

        Raises:
            BaseException: whatever ``rows`` raised, for every reader that comes to that place.
        """
        with self._moved:
            while not self._closed and self._at[number] != _GONE:
                behind = self._head - self._at[number]
                if behind > 0:
                    found = self._held[-int(behind)]
                elif self._is_last(number) or (behind == 0 and self._has_room()):
                    made = self._make()
                    if made is None:
                        return None
                    if behind < 0:  # nobody else is left who would read up to its place
                        self._move(number, self._at[number])
                        continue
                    found = made
                else:
                    self._moved.wait()
                    continue
                self._move(number, self._at[number] + 1)
                return found
        return None

    def leave(self, number: int) -> None:
        """One reader wants no more."""
        with self._moved:
            self._move(number, _GONE)

    def _is_last(self, number: int) -> bool:
        return self._at[number] == min(self._at)

    def _has_room(self) -> bool:
        return sum(len(each) for each, _ in self._held) < self._window

    def _make(self) -> tuple[Tensor, int] | None:
        """The piece that comes next; errors come to every reader."""
        if self._error is not None:
            raise self._error
        try:
            piece = next(self._pieces, None)
        except BaseException as error:
            self._error = error
            raise
        if piece is None:
            return None
        self._held.append((piece, self._bad.count))
        self._head += 1
        return self._held[-1]

    def _move(self, number: int, place: float) -> None:
        """One reader is at another piece; those that all have had are let go."""
        self._at[number] = place
        while self._held and self._head - len(self._held) < min(self._at):
            self._held.popleft()
        self._moved.notify_all()


class Reader:
    """An iterator over the pieces of one reader of a ``Tee``."""

    def __init__(self, tee: Tee, number: int, bad: BadTokens, columns: Sequence[slice]) -> None:
        self._tee, self._number, self._bad, self._columns = tee, number, bad, columns

    def __iter__(self) -> Reader:
        return self

    def __next__(self) -> Float[Tensor, "m w"]:
        found = self._tee.next_of(self._number)
        if found is None:
            raise StopIteration
        piece, self._bad.count = found
        return torch.cat([piece[:, part] for part in self._columns], dim=1) if self._columns else piece

    def close(self) -> None:
        """Let the other readers go on without this one."""
        self._tee.leave(self._number)
