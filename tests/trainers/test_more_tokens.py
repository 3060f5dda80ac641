"""A finished run goes on with more tokens."""

from __future__ import annotations

import json

import pytest
import torch
from test_step import config

import saekit
from saekit import SaekitError
from saekit.trainers import TrainConfig, train, train_many
from saekit.trainers.checkpoint import checkpoints
from saekit.trainers.trainer import Trainer

SHORT, LONG = 128 * 20 + 60, 128 * 44  # neither fills of 1,024 rows nor pieces of 2,048 end with the first


def _steps(run):
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def _same(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.fixture(params=["cache", "live"])
def run_of(request, cache, live, tmp_path):
    """Configs of runs of so many tokens, from a cache or from a model."""

    def make(name, tokens, **changes):
        if request.param == "cache":
            return config(cache, tmp_path, out=tmp_path / name, tokens=tokens, checkpoint_every=6, **changes)
        changes = {"batch_size": 128, "buffer": 1024, "checkpoint_every": 6, "tokens": tokens, **changes}
        return live(tmp_path / name, **changes)

    return make


def test_it_is_the_same_run_stopped_or_not(run_of, tmp_path, stopped_at, capsys):
    first = train(run_of("whole", SHORT), quiet=True)
    (first.path / "eval.json").write_text("{}")
    longer = train(run_of("whole", LONG), resume=True)
    told = capsys.readouterr().err
    assert "goes on from 2,620 to 5,632 tokens; the learning rate is that of a run of so many" in told
    assert not (first.path / "eval.json").exists(), "it was of another dictionary"
    assert longer.sae.cfg.metadata["saekit"]["training_tokens"] == LONG
    assert max(checkpoints(longer.path / "checkpoints")) == 44
    assert not _same(first.sae, longer.sae)
    assert longer.config.lr == first.config.lr
    assert longer.config.dead_after == first.config.dead_after
    assert _steps(longer.path) == sorted(set(_steps(longer.path)))

    train(run_of("parts", SHORT), quiet=True)
    for step, with_tokens in ((20, True), (29, False)):  # at once, and between two checkpoints
        asked = run_of("parts", LONG) if with_tokens else TrainConfig(out=tmp_path / "parts")
        with stopped_at(step), pytest.raises(SaekitError, match="stopped"):
            train(asked, resume=True, quiet=True)
        assert saekit.load(tmp_path / "parts").cfg.metadata["saekit"]["training_tokens"] == 128 * 20, "stays until then"
    parts = train(TrainConfig(out=tmp_path / "parts"), resume=True, quiet=True)
    assert _same(parts.sae, longer.sae)
    again = train(TrainConfig(out=tmp_path / "parts"), resume=True, quiet=True)  # nothing is done
    assert _same(again.sae, longer.sae)


def test_the_rows_that_follow_are_new(run_of, monkeypatch):
    advance, seen = Trainer.advance, []

    def watched(self, rows):
        seen.append(rows.clone())
        return advance(self, rows)

    monkeypatch.setattr(Trainer, "advance", watched)
    train(run_of("run", SHORT), quiet=True)
    before = {row.numpy().tobytes() for rows in seen for row in rows}
    seen.clear()
    train(run_of("run", 128 * 24), resume=True, quiet=True)
    after = {row.numpy().tobytes() for rows in seen for row in rows}
    assert len(seen) == 4
    assert len(after - before) > 0.95 * 4 * 128, "but for what occurs twice in the data"


def test_the_schedule_is_that_of_the_longer_run(cache, tmp_path):
    train(config(cache, tmp_path, tokens=128 * 20, log_every=1), quiet=True)
    run = train(config(cache, tmp_path, tokens=128 * 40, log_every=1), resume=True, quiet=True)
    other = train(config(cache, tmp_path, tokens=128 * 40, log_every=1, out=tmp_path / "other"), quiet=True)
    rates = [
        [json.loads(line)["lr"] for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (run.path, other.path)
    ]
    assert rates[0][20:] == rates[1][20:]
    assert rates[0][19] < 0.2 * rates[0][20]


def test_only_what_is_finished_has_more(cache, tmp_path, stopped_at):
    cfg = config(cache, tmp_path, checkpoint_every=10)
    with stopped_at(25), pytest.raises(SaekitError, match="stopped"):
        train(cfg, quiet=True)
    more = config(cache, tmp_path, checkpoint_every=10, tokens=128 * 60)
    told = (cfg.out / "config.yaml").read_text()
    with pytest.raises(SaekitError, match="has not come to its 6,400 tokens; --resume without --tokens goes on with"):
        train(more, resume=True, quiet=True)
    assert (cfg.out / "config.yaml").read_text() == told
    train(cfg, resume=True, quiet=True)
    with pytest.raises(SaekitError, match="was started with tokens = 6400, not 3200"):
        train(config(cache, tmp_path, tokens=3200), resume=True, quiet=True)
    with pytest.raises(SaekitError, match="was started with k = 4, not 5"):
        train(config(cache, tmp_path, tokens=128 * 60, k=5), resume=True, quiet=True)
    assert train(more, resume=True, quiet=True).sae.cfg.metadata["saekit"]["training_tokens"] == 128 * 60


def test_runs_that_share_a_stream_go_on_together(cache, tmp_path, stopped_at):
    def several(tokens):
        return [config(cache, tmp_path, out=tmp_path / "many" / f"k={k}", k=k, tokens=tokens) for k in (2, 4)]

    train_many(several(SHORT), home=tmp_path / "many", quiet=True)
    (tmp_path / "many/k=4/sae/cfg.json").unlink()  # one was stopped before its end
    with pytest.raises(SaekitError, match="k=4' has not come to its 2,620 tokens"):
        train_many(several(LONG), home=tmp_path / "many", resume=True, quiet=True)
    train_many(several(SHORT), home=tmp_path / "many", resume=True, quiet=True)
    runs = train_many(several(LONG), home=tmp_path / "many", resume=True, quiet=True)
    for k, run in zip((2, 4), runs, strict=True):
        alone = config(cache, tmp_path, out=tmp_path / f"alone{k}", k=k, tokens=SHORT)
        train(alone, quiet=True)
        longer = config(cache, tmp_path, out=tmp_path / f"alone{k}", k=k, tokens=LONG)
        assert _same(train(longer, resume=True, quiet=True).sae, run.sae)
