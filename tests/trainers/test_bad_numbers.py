"""NaN, inf and losses that run away: named, left out where that is asked for, never saved over a good state."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_step import config

from saekit import SaekitError
from saekit.activations import ActivationBatch, ActivationCache
from saekit.activations.finite import BadTokens
from saekit.activations.shards import write_shard
from saekit.seal import BLANK, stamp
from saekit.trainers import train
from saekit.trainers.checkpoint import checkpoints
from saekit.trainers.divergence import Divergence
from saekit.trainers.optimizer import DictionaryAdam


@pytest.fixture
def spoilt(cache, tmp_path):
    """The cache with some bad tokens, as a model may make them; a cache itself is only written whole."""
    opened = ActivationCache.open(cache)
    whole = opened.read(0, len(opened), gradients=True)
    whole.x[[100, 3000]] = math.nan
    whole.x[4000, 5] = math.inf
    whole.gradients[200, 1] = math.nan
    ActivationCache.from_tensor(tmp_path / "spoilt", torch.zeros(6000, 12), gradients=torch.zeros(6000, 12))
    made = write_shard(tmp_path / "spoilt/shard-00000.safetensors", whole, torch.float32, {})
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest |= {"seal": BLANK, "shards": [made]}
    (tmp_path / "spoilt/manifest.json").write_bytes(stamp(json.dumps(manifest).encode()))
    return tmp_path / "spoilt"


@pytest.mark.parametrize(("variant", "count"), [("topk", 3), ("gradient_topk", 4)])
def test_bad_tokens_are_left_out_and_counted(cache, spoilt, tmp_path, variant, count):
    cfg = config(spoilt, tmp_path, variant=variant, tokens=128 * 60, skip_bad_tokens=True)  # more than one epoch
    run = train(cfg, quiet=True)
    last = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])
    assert all(math.isfinite(value) for value in last.values())
    assert run.sae.cfg.metadata["saekit"]["skipped_tokens"] == last["skipped_tokens"] >= count
    assert all(bool(value.isfinite().all()) for value in run.sae.state_dict().values())


def test_a_bad_token_stops_the_run_and_a_flag_lets_it_go_on(spoilt, tmp_path, monkeypatch):
    monkeypatch.setattr("saekit.trainers.lanes.SAMPLE", 256)
    whole = train(config(spoilt, tmp_path, out=tmp_path / "whole", skip_bad_tokens=True), quiet=True)
    cfg = config(spoilt, tmp_path)  # by its seed, the first block of rows is the one that has no bad ones
    with pytest.raises(SaekitError, match=r"NaN or inf in the activations .* row \d+ .*position .*--skip-bad-tokens"):
        train(cfg, quiet=True)
    found = list(checkpoints(cfg.out / "checkpoints"))
    cache = ActivationCache.open(spoilt)
    good = cache.division.holds("train", 4096, cache.read(4096, 6000).documents).sum()
    assert found == [int(good) // 128], "what was learned before it is kept"
    with pytest.raises(SaekitError, match="--skip-bad-tokens"):
        train(cfg, resume=True, quiet=True)
    assert list(checkpoints(cfg.out / "checkpoints")) == found
    resumed = train(cfg.replace(skip_bad_tokens=True), resume=True, quiet=True)
    assert resumed.config.skip_bad_tokens
    assert "skip_bad_tokens: true" in (cfg.out / "config.yaml").read_text()
    assert torch.equal(resumed.sae.W_dec, whole.sae.W_dec)


def test_tokens_are_counted_once_however_often_a_run_is_resumed(spoilt, tmp_path, monkeypatch):
    base = {"skip_bad_tokens": True, "tokens": 128 * 100, "checkpoint_every": 7}
    whole = train(config(spoilt, tmp_path, out=tmp_path / "whole", **base), quiet=True)
    cfg = config(spoilt, tmp_path, **base)
    step, calls = DictionaryAdam.step, iter(range(10**6))

    def killed(self, lr):
        if next(calls) % 23 == 22:
            raise MemoryError
        return step(self, lr)

    monkeypatch.setattr(DictionaryAdam, "step", killed)
    for attempt in range(50):
        try:
            resumed = train(cfg, resume=attempt > 0, quiet=True)
            break
        except MemoryError:
            continue
    assert attempt >= 4
    assert torch.equal(resumed.sae.W_dec, whole.sae.W_dec)
    facts = [run.sae.cfg.metadata["saekit"]["skipped_tokens"] for run in (whole, resumed)]
    assert facts[0] == facts[1] > 3


def test_a_loss_that_is_no_number_leaves_the_last_checkpoint(cache, tmp_path, monkeypatch):
    cfg = config(cache, tmp_path, checkpoint_every=10)
    step = DictionaryAdam.step

    def spoilt(self, lr):
        norm = step(self, lr)
        if self.steps == 25:
            self.sae.W_dec.data[3] = math.nan
        return norm

    monkeypatch.setattr(DictionaryAdam, "step", spoilt)
    with pytest.raises(SaekitError, match=r"the loss is nan at step \d+, in row .*the last good checkpoint is kept"):
        train(cfg, quiet=True)
    assert list(checkpoints(cfg.out / "checkpoints")) == [10, 20]


def test_a_loss_that_runs_away_is_not_saved_over_a_good_one(cache, tmp_path, monkeypatch):
    cfg = config(cache, tmp_path, tokens=128 * 200, checkpoint_every=2)
    step = DictionaryAdam.step

    def worse(self, lr):
        norm = step(self, lr)
        if self.steps > 60:
            self.sae.W_enc.data *= 1.2
        return norm

    monkeypatch.setattr(DictionaryAdam, "step", worse)
    with pytest.raises(SaekitError, match=r"the loss diverges: .* at step \d+, after .*last good checkpoint"):
        train(cfg, quiet=True)
    kept = list(checkpoints(cfg.out / "checkpoints"))
    assert len(kept) == 2
    assert kept[1] <= 70, "states that had begun to diverge are not saved"
    monkeypatch.undo()
    whole = train(config(cache, tmp_path, tokens=128 * 200, out=tmp_path / "whole"), quiet=True)
    assert whole.sae.cfg.d_sae == 64


@given(st.lists(st.floats(0.01, 0.4), min_size=1, max_size=200), st.integers(0, 199))
def test_losses_that_only_wander_below_a_half_are_no_divergence(losses, start):
    watch = Divergence()
    for step, fvu in enumerate([3.0, 1.5, 0.9, *losses]):
        watch.update(fvu, step)


def test_a_harsh_start_is_no_divergence_but_hopeless_growth_is():
    watch = Divergence()
    for step in range(100):
        watch.update(20 * 0.95**step, step)
    watch = Divergence()
    growing = (watch.update(1.1 * 1.05**step, step) for step in range(100))
    with pytest.raises(SaekitError, match="diverges"):
        list(growing)


def test_a_change_that_stays_is_got_used_to():
    watch = Divergence()
    for step in range(200):
        watch.update(0.08, step)
    assert not watch.suspect
    for step in range(200, 240):
        watch.update(0.3, step)
    assert watch.suspect
    for step in range(240, 700):
        watch.update(0.3, step)
    assert not watch.suspect


def test_most_tokens_bad_is_an_error_even_where_they_are_skipped():
    bad = BadTokens(skip=True)
    x = torch.full((5000, 2), math.nan)
    rows = torch.arange(5000)
    with pytest.raises(SaekitError, match="5,000 of 5,000 tokens at 'hook' are NaN or inf"):
        bad.sift([ActivationBatch(x, rows, rows, rows)], ["hook"], "here")


def test_a_token_bad_at_one_hook_is_left_out_at_all():
    rows = torch.arange(4)
    a, b = torch.randn(4, 2), torch.randn(4, 3)
    a[1, 0], b[2, 2] = math.nan, -math.inf
    bad = BadTokens(skip=True)
    found = bad.sift([ActivationBatch(x, rows, rows, rows) for x in (a, b)], ["one", "other"], "here")
    assert [batch.tokens.tolist() for batch in found] == [[0, 3]] * 2
    assert torch.equal(found[1].x, b[[0, 3]])
    assert bad.count == 2
    with pytest.raises(SaekitError, match="'other' at here, row 2"):
        BadTokens().sift(
            [ActivationBatch(x, rows, rows, rows) for x in (torch.ones(4, 2), b)], ["one", "other"], "here"
        )
