"""The processes of a run that torchrun launched: which of them this is, and what they tell each other.

One process is a case of many: nothing is told then, and ``torch.distributed`` is not touched.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from saekit.errors import SaekitError, SaekitWarning, first_line

_PATIENCE = timedelta(days=2)  # one process may judge for hours while others wait; one that dies is noticed at once


class ToldError(SaekitError):
    """What one process raised, raised by all; the first alone tells the user."""


class Ranks:
    """Processes that run the same command.

    Attributes:
        rank: number of this one, from 0.
        world: how many there are.
        stopped: whether this one was asked to stop, which the others are told where they wait for it.
    """

    def __init__(self, rank: int = 0, world: int = 1, groups: tuple[Any, Any] = (None, None)) -> None:
        self.rank, self.world, self._groups = rank, world, groups
        self.stopped = False

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes what belongs to all, and speaks for them."""
        return self.rank == 0

    def agree(self, error: SaekitError | None = None) -> None:
        """Go on together, or not at all; every process must ask.

        Raises:
            ToldError: a process has this error.
        """
        if self.world == 1:
            if error is not None:
                raise error
            return
        if errors := [each for each in self.told(None if error is None else str(error)) if each is not None]:
            raise ToldError(errors[0])

    def told(self, value: Any, *, harvest: bool = False) -> list[Any]:
        """What every process tells, in their order; every process must ask, in the same order of questions.

        Args:
            value: of what JSON holds.
            harvest: whether the threads that harvest ask, which have a group of their own: collectives of two threads
                never share one.

        Raises:
            SaekitError: a process has ended.
        """
        if self.world == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        found = self.gather(text, harvest=harvest)
        return [json.loads(bytes(each.tolist())) for each in found]

    def gather(self, mine: Tensor, *, harvest: bool = False) -> list[Tensor]:
        """The bytes [m] of every process, each as many as it likes.

        Raises:
            SaekitError: a process has ended.
        """
        group = self._groups[harvest]
        try:
            sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.world)]
            dist.all_gather(sizes, torch.tensor([len(mine)]), group=group)
            padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
            padded[: len(mine)] = mine
            every = [torch.empty_like(padded) for _ in range(self.world)]
            dist.all_gather(every, padded, group=group)
        except RuntimeError as error:
            raise SaekitError(f"process {self.rank} lost the others, one of which ended: {first_line(error)}") from None
        return [each[: int(size)] for each, size in zip(every, sizes, strict=True)]


@contextmanager
def agreeing(ranks: Ranks) -> Iterator[None]:
    """A part of the work that all processes do, after which all go on or none.

    Raises:
        ToldError: one of them failed.
    """
    error = None
    try:
        yield
    except SaekitError as raised:
        if ranks.world == 1:
            raise
        error = raised
    ranks.agree(error)


ALONE = Ranks()
_current = ALONE


def current() -> Ranks:
    """The processes of this run."""
    return _current


def launched() -> bool:
    """Whether torchrun launched this process, beside others or alone."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def restarted() -> bool:
    """Whether torchrun has started this process again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def together() -> Iterator[Ranks]:
    """Join the other processes while this is entered; nothing happens where there are none.

    Raises:
        SaekitError: they do not find each other.
    """
    global _current
    if not launched() or int(os.environ["WORLD_SIZE"]) == 1 or _current is not ALONE:
        yield _current
        return
    try:
        store, rank, world = next(rendezvous("env://", timeout=timedelta(minutes=10)))
        # what an earlier attempt left in the store would be taken for this one's
        attempt = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group("gloo", store=attempt, rank=rank, world_size=world, timeout=_PATIENCE)
        groups = (dist.new_group(backend="gloo", timeout=_PATIENCE), dist.new_group(backend="gloo", timeout=_PATIENCE))
    except (RuntimeError, ValueError) as error:
        raise SaekitError(f"the processes do not find each other: {first_line(error)}") from None
    _current = Ranks(rank, world, groups)
    try:
        with warnings.catch_warnings():
            if rank:
                warnings.simplefilter("ignore", SaekitWarning)  # the first tells them
            yield _current
    finally:
        _current = ALONE
        dist.destroy_process_group()
