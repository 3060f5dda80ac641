"""The stream: every row once an epoch, really mixed, the same for a seed, errors handed on."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saekit.activations import ActivationCache, ActivationSource, ShuffledStream
from saekit.activations.stream import cache_rows, live_rows
from saekit.errors import SaekitError, SaekitWarning


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("saekit.activations.stream._BLOCK", 64)
    return ActivationCache.from_tensor(tmp_path / "c", torch.arange(2000.0)[:, None])  # some 1,800 training rows


def training_rows(cache):
    return torch.cat([b.x for b in cache.batches("train")]).flatten().long().tolist()


def take(stream, batches):
    rows = torch.cat(list(itertools.islice(stream, batches))).flatten().long().tolist()
    stream.close()
    return rows


def test_an_epoch_holds_every_training_row_once(cache):
    pieces = cache_rows(cache, seed=3)
    epochs = [torch.cat(list(itertools.islice(pieces, 32))).flatten().long().tolist() for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(training_rows(cache))
    assert epochs[0] != epochs[1], "each epoch has an order of blocks of its own"


def test_no_row_is_lost_on_the_way_to_the_batches(cache):
    rows = take(ShuffledStream(itertools.islice(cache_rows(cache, 3), 32), 1, 500, seed=3), 2000)
    assert sorted(rows) == sorted(training_rows(cache))
    assert rows != sorted(rows)


def test_the_order_depends_on_the_seed_alone(cache):
    orders = [take(ShuffledStream(cache_rows(cache, s), 90, 500, s), 25) for s in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_a_look_ahead_takes_nothing(cache):
    plain, looked_at = (ShuffledStream(cache_rows(cache, 1), 90, 500, 1) for _ in range(2))
    first = [looked_at.peek(count).flatten().long().tolist() for count in (200, 50)]
    rows = take(plain, 25)
    assert first == [rows[:200], rows[:50]]
    assert take(looked_at, 25) == rows


def test_neighbours_meet_as_rarely_as_chance_says():
    # fills of 64 contexts of 128 tokens, 8,192 rows: two tokens of a context share a batch of 256 with probability
    # 255 / 8191; the harvest comes eight contexts at a time
    piece = torch.arange(8).repeat_interleave(128).float()[:, None]
    pieces = (piece + 8 * (i % 8) for i in range(20 * 8))
    stream = ShuffledStream(pieces, 256, 8192, seed=0)
    together = 0
    for batch in itertools.islice(stream, 20 * 32):
        counts = batch.flatten().long().bincount(minlength=64)
        together += int((counts * (counts - 1) // 2).sum())
    stream.close()
    pairs = 20 * 64 * (128 * 127 // 2)
    # the standard deviation of this share is about 0.6% of it; neighbours left in order would give 30 times as much
    assert together / pairs == pytest.approx(255 / 8191, rel=0.03)


def test_live_activations_are_those_of_the_source(source):
    pieces = live_rows(source)
    found = torch.cat([next(pieces), next(pieces)])
    assert torch.equal(found, torch.cat([b.x for b in source.batches("train", len(found))]))


def test_text_that_runs_out_begins_again_with_a_warning(source, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("".join(f"x = {i} + {i % 7}\n" for i in range(1500)))
    short = ActivationSource.open(dataset=str(text), context_length=64, loaded=source.model)
    once = sum(len(b.x) for b in short.batches("train"))
    pieces = live_rows(short)
    first = next(pieces)
    count = len(first)
    while count < once:
        count += len(next(pieces))
    with pytest.warns(UserWarning, match=f"ran out after {once:,} tokens"):
        again = next(pieces)
    assert torch.equal(again, first)
    mixed = ActivationSource.open(dataset=str(text), context_length=64, loaded=source.model, pool=2 * once)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # more than one pass is told where there is more than one, and once
        assert len(next(live_rows(mixed, wanted=once)))
        with pytest.raises(SaekitWarning, match=f"text holds {once:,} training tokens; .* are 2.5 passes over it"):
            next(live_rows(mixed, wanted=round(2.5 * once)))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        count, pieces = 0, live_rows(mixed, wanted=3 * once)
        while count <= 2 * once:
            count += len(next(pieces))
    assert len(told) == 1


def test_an_error_in_the_thread_reaches_the_consumer():
    def broken():
        yield torch.ones(10, 1)
        raise SaekitError("the disk is on fire")

    stream = ShuffledStream(broken(), 5, 10, seed=0)
    with pytest.raises(SaekitError, match="on fire"):
        list(itertools.islice(stream, 3))
    stream.close()


def test_small_pieces_are_joined():
    fills = (torch.full((3, 1), float(i)) for i in range(10))
    assert sorted(take(ShuffledStream(fills, 10, 10, seed=0), 3)) == sorted([i for i in range(10) for _ in range(3)])


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    batch=st.integers(1, 30),
    buffer=st.integers(1, 100),
    stop=st.integers(0, 40),
    limit=st.integers(1, 700),
)
def test_from_any_place_the_stream_goes_on_as_if_it_had_not_been_left(lengths, batch, buffer, stop, limit):
    ends = list(itertools.accumulate(lengths))
    pieces = [torch.arange(end - n, end).float()[:, None] for n, end in zip(lengths, ends, strict=True)]

    def stream(place=None):
        rows = iter(pieces[place.pieces if place else 0 :])
        return ShuffledStream(rows, batch, buffer, seed=0, limit=limit, place=place)

    whole = stream()
    batches = list(whole)
    whole.close()
    first = stream()
    before = list(itertools.islice(first, stop))
    first.close()
    second = stream(first.place)
    after = list(second)
    second.close()
    assert len(before) == min(stop, len(batches))
    assert len(before) + len(after) == len(batches) == min(sum(lengths), limit) // batch
    assert all(map(torch.equal, before + after, batches))


def test_going_on_reads_nothing_of_what_lies_behind(source, cache, monkeypatch):
    read = ActivationCache.read
    starts = []
    monkeypatch.setattr(
        ActivationCache, "read", lambda self, start, stop, **k: starts.append(start) or read(self, start, stop, **k)
    )
    wanted = list(itertools.islice(cache_rows(cache, 3), 70))
    starts.clear()
    found = list(itertools.islice(cache_rows(cache, 3, first=61), 9))
    assert len(starts) == 9
    assert all(map(torch.equal, found, wanted[61:]))
    live = list(itertools.islice(live_rows(source), 4))
    passes = []
    watch = source.model.original_model.register_forward_pre_hook(lambda *a, **k: passes.append(1), with_kwargs=True)
    assert torch.equal(next(live_rows(source, first=3)), live[3])
    watch.remove()
    assert len(passes) == 1
