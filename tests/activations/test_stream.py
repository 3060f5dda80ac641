"""The stream: every row once an epoch, really mixed, the same for a seed, errors handed on."""

from __future__ import annotations

import itertools

import pytest
import torch

from saekit import SaekitError
from saekit.activations import ActivationCache, ShuffledStream
from saekit.activations.stream import cache_fills, live_fills


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("saekit.activations.stream._BLOCK", 64)
    return ActivationCache.from_tensor(tmp_path / "c", torch.arange(2000.0)[:, None])  # 1,800 training rows


def take(stream, batches):
    rows = torch.cat(list(itertools.islice(stream, batches))).flatten().long().tolist()
    stream.close()
    return rows


def test_an_epoch_holds_every_training_row_once(cache):
    rows = take(ShuffledStream(cache_fills(cache, 500, seed=3), 90, seed=3), 40)  # two epochs
    assert sorted(rows[:1800]) == sorted(rows[1800:]) == list(range(1800))
    assert rows[:1800] != rows[1800:]


def test_the_order_depends_on_the_seed_alone(cache):
    orders = [take(ShuffledStream(cache_fills(cache, 500, s), 90, s), 25) for s in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_neighbours_meet_as_rarely_as_chance_says():
    # 64 contexts of 128 tokens in one fill of 8,192 rows: two tokens of a context share a batch of 256 with
    # probability 255 / 8191
    fill = torch.arange(64).repeat_interleave(128).float()[:, None]
    stream = ShuffledStream(iter([fill] * 20), 256, seed=0)
    together = 0
    for batch in itertools.islice(stream, 20 * 32):
        counts = batch.flatten().long().bincount(minlength=64)
        together += int((counts * (counts - 1) // 2).sum())
    stream.close()
    pairs = 20 * 64 * (128 * 127 // 2)
    # the standard deviation of this share is about 0.6% of it; neighbours left in order would give 30 times as much
    assert together / pairs == pytest.approx(255 / 8191, rel=0.03)


def test_live_activations_are_those_of_the_source(source):
    fills = live_fills(source, buffer=4000)
    first = next(fills)
    assert len(first) >= 4000
    expected = torch.cat([b.x for b in source.batches("train", len(first))])
    assert torch.equal(first, expected)
    assert not torch.equal(next(fills)[:100], first[:100])


def test_an_error_in_the_thread_reaches_the_consumer():
    def broken():
        yield torch.ones(10, 1)
        raise SaekitError("the disk is on fire")

    stream = ShuffledStream(broken(), 5, seed=0)
    with pytest.raises(SaekitError, match="on fire"):
        list(itertools.islice(stream, 3))
    stream.close()


def test_small_fills_are_joined():
    fills = (torch.full((3, 1), float(i)) for i in range(10))
    assert sorted(take(ShuffledStream(fills, 10, seed=0), 3)) == sorted([i for i in range(10) for _ in range(3)])
