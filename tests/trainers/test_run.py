"""Whole runs: stopped and resumed, refused, judged, written down."""

from __future__ import annotations

import itertools
import json
import signal

import pytest
import torch
from test_step import config

import saekit
from saekit import SaekitError
from saekit.activations import ActivationCache
from saekit.evals import Evaluator
from saekit.interrupt import Interrupted
from saekit.trainers import TrainConfig, train
from saekit.trainers.checkpoint import checkpoints
from saekit.trainers.optimizer import DictionaryAdam
from saekit.trainers.trainer import Trainer


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(cache, tmp_path, monkeypatch, number):
    whole = train(config(cache, tmp_path, out=tmp_path / "whole"), quiet=True)
    projected_step = DictionaryAdam.step
    calls = itertools.count()

    def interrupted(self, lr):
        if next(calls) == 23:
            signal.raise_signal(number)  # in the middle of the 24th step
        return projected_step(self, lr)

    cfg = config(cache, tmp_path, out=tmp_path / "parts")
    monkeypatch.setattr(DictionaryAdam, "step", interrupted)
    with pytest.raises(Interrupted) as stop:
        train(cfg, quiet=True)
    assert stop.value.code == 128 + number
    assert [p.name for p in (tmp_path / "parts/checkpoints").iterdir()] == ["step-24.safetensors"]
    monkeypatch.setattr(DictionaryAdam, "step", projected_step)
    resumed = train(cfg, resume=True, quiet=True)
    for name, value in whole.sae.state_dict().items():
        assert torch.equal(value, resumed.sae.state_dict()[name]), name
    lines = [
        [json.loads(line)["step"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "parts")
    ]
    assert lines[0] == lines[1]
    again = train(cfg, resume=True, quiet=True)  # finished: nothing is done
    assert torch.equal(again.sae.W_dec, resumed.sae.W_dec)


def test_a_run_stopped_while_calibrating_is_not_lost(cache, tmp_path, monkeypatch):
    cfg = config(cache, tmp_path)
    monkeypatch.setattr(Trainer, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(cfg, quiet=True)
    monkeypatch.undo()
    monkeypatch.setattr(Trainer, "train_step", None)  # no further step is taken
    assert train(cfg, resume=True, quiet=True).sae.cfg.d_sae == 64


@pytest.mark.parametrize("change", ["format", "old"])
def test_a_checkpoint_of_another_version_is_refused(cache, tmp_path, monkeypatch, change):
    cfg = config(cache, tmp_path)
    if change == "format":
        monkeypatch.setattr("saekit.trainers.checkpoint._FORMAT", 99)
    monkeypatch.setattr(Trainer, "finish", lambda self: None)
    train(cfg, quiet=True)
    monkeypatch.undo()
    if change == "old":
        (newest,) = checkpoints(cfg.out / "checkpoints").values()
        newest.rename(newest.with_suffix(".pt"))
    with pytest.raises(SaekitError, match="another version of saekit"):
        train(cfg, resume=True, quiet=True)


def test_resuming_on_other_data_is_refused(cache, tmp_path, monkeypatch):
    x = torch.randn(6000, 3)
    ActivationCache.from_tensor(tmp_path / "lm", x, provenance={"revision": "a"})
    cfg = config(tmp_path / "lm", tmp_path)
    monkeypatch.setattr(Trainer, "finish", lambda self: None)
    train(cfg, quiet=True)
    monkeypatch.undo()
    ActivationCache.from_tensor(tmp_path / "lm", x, provenance={"revision": "b"}, overwrite=True)
    with pytest.raises(SaekitError, match="another revision"):
        train(cfg, resume=True, quiet=True)
    ActivationCache.from_tensor(tmp_path / "lm", torch.randn(6000, 5), provenance={"revision": "a"}, overwrite=True)
    with pytest.raises(SaekitError, match="another cache_fingerprint"):
        train(cfg, resume=True, quiet=True)
    with pytest.raises(SaekitError, match="not both"):
        train(cfg, resume=True, overwrite=True, quiet=True)


def test_a_cache_judges_only_dictionaries_that_kept_its_rows_apart(cache, tmp_path):
    train(config(cache, tmp_path), quiet=True)
    report = Evaluator(cache=cache)(tmp_path / "run")
    assert report["sparsity"]["tokens"] == ActivationCache.open(cache).count("heldout")
    rows = ActivationCache.open(cache).read(0, 5000).x
    other = ActivationCache.from_tensor(tmp_path / "other", rows, provenance={"part": "train"})
    with pytest.raises(SaekitError, match="may have seen them"):
        Evaluator(cache=other.path)(tmp_path / "run")
    mine = ActivationCache.from_tensor(tmp_path / "mine", torch.randn(200, 12))
    assert Evaluator(cache=mine.path)(tmp_path / "run")["sparsity"]["tokens"] == 10
    ActivationCache.from_tensor(cache, rows, overwrite=True)
    with pytest.raises(SaekitError, match="may have seen them"):
        Evaluator(cache=cache)(tmp_path / "run")
    run = saekit.load(tmp_path / "run").with_metadata(hook_name="blocks.0.hook_resid_post")
    run.save(tmp_path / "named")
    ActivationCache.from_tensor(
        tmp_path / "hooked", torch.randn(100, 12), provenance={"hook": "blocks.9.hook_resid_post"}
    )
    with pytest.raises(SaekitError, match=r"has hook 'blocks.9.hook_resid_post', the dictionary 'blocks.0"):
        Evaluator(cache=tmp_path / "hooked")(tmp_path / "named")


def test_the_written_config_is_whole_and_starts_the_same_run(cache, tmp_path):
    x = ActivationCache.open(cache).read(0, 6000).x
    provenance = {"model": "gpt2", "hook": "blocks.3.hook_resid_post", "dataset": "a.txt", "context_length": 64}
    ActivationCache.from_tensor(tmp_path / "lm", x, provenance=provenance)
    first = train(config(tmp_path / "lm", tmp_path, width=None, expansion=4), quiet=True)
    written = TrainConfig.from_yaml(tmp_path / "run/config.yaml")
    assert (written.model, written.hook, written.context_length) == ("gpt2", "blocks.3.hook_resid_post", 64)
    assert (written.width, written.dataset) == (48, "a.txt")
    second = train(written.replace(out=tmp_path / "again"), quiet=True)
    assert torch.equal(first.sae.W_dec, second.sae.W_dec)


def test_resuming_with_another_config_is_refused(cache, tmp_path):
    train(config(cache, tmp_path), quiet=True)
    with pytest.raises(SaekitError, match=r"started with k = \d+, not \d+, seed = \d+, not \d+"):
        train(config(cache, tmp_path, k=5, seed=9), resume=True, quiet=True)
    with pytest.raises(SaekitError, match="no run to resume"):
        train(config(cache, tmp_path, out=tmp_path / "none"), resume=True, quiet=True)
    with pytest.raises(SaekitError, match="holds something"):
        train(config(cache, tmp_path), quiet=True)
    assert saekit.load(tmp_path / "run").cfg.d_sae == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 3}, "k = 4 is larger than the width of 3"),
        ({"width": None, "expansion": 0.1}, "k = 4 is larger than the width of 1"),
        ({"batch_size": 6000, "tokens": 6000}, "too small for a batch_size"),
        ({"hook": "blocks.1.hook_resid_post", "cache": "LM"}, "has hook"),
    ],
)
def test_what_does_not_fit_the_data_is_refused(cache, tmp_path, changes, message):
    if changes.get("cache") == "LM":
        ActivationCache.from_tensor(
            tmp_path / "lm", torch.randn(6000, 3), provenance={"hook": "blocks.0.hook_resid_post"}
        )
        changes = {**changes, "cache": tmp_path / "lm"}
    with pytest.raises(SaekitError, match=message):
        train(config(cache, tmp_path, **changes), quiet=True)
    assert not (tmp_path / "run").exists(), "a refused run leaves no folder"


def test_activations_of_zeros_are_refused(tmp_path):
    ActivationCache.from_tensor(tmp_path / "zeros", torch.zeros(6000, 3))
    with pytest.raises(SaekitError, match="all zero"):
        train(config(tmp_path / "zeros", tmp_path), quiet=True)
