"""Several readers of one source: each gets every piece from its own place on, made once."""

import threading
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saekit import SaekitError
from saekit.activations import ShuffledStream
from saekit.activations.finite import BadTokens
from saekit.activations.tee import Tee


class Source:
    """Numbered pieces of two rows; counts what it made."""

    def __init__(self, pieces=50, broken=None):
        self.pieces, self.broken, self.made, self.closed, self.bad = pieces, broken, [], False, BadTokens()

    def __call__(self, first):
        try:
            for number in range(first, self.pieces):
                if number == self.broken:
                    raise SaekitError("the disk is on fire")
                self.made.append(number)
                self.bad.count = 10 * number
                yield torch.full((2, 1), float(number))
        finally:
            self.closed = True


def read_all(tee, firsts, stops):
    """What each reader got, in threads that run at once."""
    found, bads = [[] for _ in firsts], [BadTokens() for _ in firsts]
    errors = [None] * len(firsts)

    def read(number):
        try:
            for piece in islice(reader := tee.reader(number, bads[number]), stops[number]):
                found[number].append((int(piece[0, 0]), bads[number].count))
            reader.close()
        except SaekitError as error:
            errors[number] = str(error)

    threads = [threading.Thread(target=read, args=[number]) for number in range(len(firsts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "a reader waits for ever"
    return found, errors


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60)), min_size=1, max_size=4), st.integers(1, 30))
def test_every_reader_gets_all_from_its_place_on(readers, window):
    source = Source()
    firsts, stops = zip(*readers, strict=True)
    tee = Tee(source, firsts, window, source.bad)
    found, errors = read_all(tee, firsts, stops)
    for number, (first, stop) in enumerate(readers):
        assert found[number] == [(n, 10 * n) for n in range(first, min(50, first + stop))]
    assert errors == [None] * len(readers)
    assert source.made == list(range(min(firsts), min(firsts) + len(source.made))), "each piece is made once, in order"
    tee.close()
    assert source.closed or not source.made


def test_one_that_is_far_ahead_waits():
    source = Source(1000)
    tee = Tee(source, [0, 0], 20, source.bad)
    fast = tee.reader(0, BadTokens())
    slow = tee.reader(1, BadTokens())
    assert [int(next(fast)[0, 0]) for _ in range(10)] == list(range(10))
    waiting = threading.Thread(target=lambda: next(fast))
    waiting.start()
    waiting.join(timeout=0.3)
    assert waiting.is_alive()
    next(slow)
    waiting.join(timeout=60)
    assert not waiting.is_alive()
    slow.close()
    assert len(list(fast)) == 989, "without the slow one it goes on to the end"


def test_an_error_reaches_all():
    source = Source(broken=7)
    tee = Tee(source, [0, 3], 100, source.bad)
    found, errors = read_all(tee, [0, 3], [60, 60])
    assert [len(each) for each in found] == [7, 4]
    assert errors == ["the disk is on fire"] * 2


@pytest.mark.parametrize("taken", [0, 3])
def test_streams_that_are_closed_early_end(taken):
    source = Source(10_000)
    tee = Tee(source, [0, 0], 100, source.bad)
    bads = [BadTokens(), BadTokens()]
    streams = [ShuffledStream(tee.reader(i, bads[i]), 4, 40, seed=i, bad=bads[i]) for i in range(2)]
    for stream in streams:
        for _ in range(taken):
            next(iter(stream))
    tee.close()
    for stream in streams:
        stream.close()
    assert source.closed
    assert len(source.made) < 1000
