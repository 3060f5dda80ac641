"""A harvest that several processes share gives each of them the rows of one; threads stand for the processes here."""

from __future__ import annotations

import threading
from itertools import islice

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from saekit.activations.finite import BadTokens
from saekit.activations.spread import Harvester, leave, spread
from saekit.activations.tokens import ContextBatch
from saekit.errors import SaekitError
from saekit.ranks import Ranks, ToldError

_PHASES = [phase for phase in Phase if phase is not Phase.shrink]  # each that fails waits for its barrier


class Together:
    """What processes share: they meet at a barrier, and each reads what all have left."""

    def __init__(self, world):
        self.values, self.barrier = [None] * world, threading.Barrier(world, timeout=5)

    def exchange(self, rank, value):
        self.values[rank] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found


class ThreadRanks(Ranks):
    def __init__(self, rank, world, together):
        super().__init__(rank, world)
        self._together = together

    def told(self, value, *, harvest=False):
        return self._together.exchange(self.rank, value)

    def gather(self, mine, *, harvest=False):
        return self._together.exchange(self.rank, mine)


def in_threads(world, work):
    """What ``work(ranks)`` returns or raises in each of the threads."""
    together, found = Together(world), [None] * world

    def one(rank):
        try:
            found[rank] = work(ThreadRanks(rank, world, together))
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=[rank], daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads), "none waits for another"
    return found


def harvester(total, at_once=0, fails_at=None, passes=None):
    """Batches of four contexts; of batch i, i % 5 rows of i in two columns, and i % 3 that are left out."""

    def contexts(first):
        for number in range(first, total):
            tokens = torch.full((4, 2), number)
            yield ContextBatch(tokens, tokens, torch.ones(4, 2, dtype=torch.bool))

    def run(batches, bad, at_once, numbers):
        for batch, number in zip(batches, numbers, strict=False):
            assert int(batch.tokens[0, 0]) == number, "the number that messages tell is that of the batch"
            if number == fails_at:
                raise SaekitError(f"batch {number} is spoilt")
            if passes is not None:
                passes.append(number)
            bad.count += number % 3
            rows = torch.full((number % 5, 3), float(number))
            yield rows.to(torch.bfloat16), torch.full((number % 5,), number)

    return Harvester(contexts, run, at_once, 4)


def plain(pieces):
    return [tuple(column.tolist() for column in piece) for piece in pieces]


@settings(max_examples=30, phases=_PHASES)
@given(st.integers(1, 4), st.integers(0, 14), st.sampled_from([0, 4, 8, 12]), st.data())
def test_each_process_gets_the_rows_of_one_from_its_place_on(world, total, at_once, data):
    firsts = data.draw(st.lists(st.integers(0, max(0, total - 1)), min_size=world, max_size=world))
    alone = plain(harvester(total, at_once).alone(None, 0))
    skipped = [sum(i % 3 for i in range(stop)) for stop in range(total + 1)]
    passes = []

    def work(ranks):
        bad = BadTokens(count=skipped[firsts[ranks.rank]])
        counts, pieces = [], []
        for piece in spread(ranks, harvester(total, at_once, passes=passes), bad, firsts[ranks.rank]):
            pieces.append(piece)
            counts.append(bad.count)
        return plain(pieces), counts

    for first, found in zip(firsts, in_threads(world, work), strict=True):
        assert found == (alone[first:], skipped[first + 1 :])
    assert sorted(passes) == list(range(min(firsts, default=0), total)), "the model goes over each batch once"


@settings(max_examples=30, phases=_PHASES)
@given(st.integers(2, 4), st.data())
def test_who_has_enough_helps_until_all_have(world, data):
    total = data.draw(st.integers(1, 14))
    wanted = data.draw(st.lists(st.none() | st.integers(0, total), min_size=world, max_size=world))
    alone = plain(harvester(total).alone(None, 0))

    def work(ranks):
        count = wanted[ranks.rank]
        pieces = spread(ranks, harvester(total), BadTokens(), None if count is None else 0)
        found = plain(islice(pieces, count) if count is not None else pieces)
        leave(pieces, ranks)
        return found

    for count, found in zip(wanted, in_threads(world, work), strict=True):
        assert found == alone[: count or 0]


def test_an_error_of_one_is_that_of_all():
    found = in_threads(3, lambda ranks: list(spread(ranks, harvester(20, fails_at=7), BadTokens(), 0)))
    assert [str(error) for error in found] == ["batch 7 is spoilt"] * 3


def test_an_unexpected_error_leaves_nobody_waiting():
    def work(ranks):
        def run(batches, bad, at_once, numbers):
            for piece in harvester(20).run(batches, bad, at_once, numbers):
                if ranks.rank == 1:
                    raise OSError("the disk is gone")
                yield piece

        return list(spread(ranks, harvester(20)._replace(run=run), BadTokens(), 0))

    first, second, third = in_threads(3, work)
    assert [type(error) for error in (first, second, third)] == [ToldError, OSError, ToldError]
    assert str(first) == "the disk is gone"


def test_where_one_is_stopped_the_others_are():
    def work(ranks):
        pieces = spread(ranks, harvester(10**6), BadTokens(), 0)
        if ranks.rank == 1:
            found = next(pieces)
            ranks.stopped = True
            pieces.close()
            return found
        return list(pieces)

    first, second, third = in_threads(3, work)
    for error in (first, third):
        with pytest.raises(SaekitError, match="process 1 was stopped, so this one stopped too; --resume goes on"):
            raise error
    assert len(second) == 2
