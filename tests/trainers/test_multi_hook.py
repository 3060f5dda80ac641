"""Several hook points at once: the same dictionaries as one at a time, from one pass over the text."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
from weakref import WeakKeyDictionary

import pytest
import torch
import yaml

import saekit
from saekit import SaekitError
from saekit.activations import ActivationSource
from saekit.activations.attention import try_quick_attention
from saekit.interrupt import Interrupted
from saekit.trainers import data, many, train, train_hooks
from saekit.trainers.checkpoint import checkpoints
from saekit.trainers.optimizer import DictionaryAdam
from saekit.trainers.trainer import Trainer

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"]
STEPS = 24


@pytest.fixture
def config(live, tmp_path):
    return lambda name, **changes: live(tmp_path / name, **changes)


@pytest.fixture
def whole(config):
    return train_hooks(config("whole"), HOOKS, quiet=True)


def assert_same(found, expected):
    assert set(found) == set(expected)
    for hook, run in found.items():
        state = expected[hook].sae.state_dict()
        for name, value in run.sae.state_dict().items():
            assert torch.equal(value, state[name]), (hook, name)


def steps_logged(run):
    return [json.loads(line)["step"] for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def newest(folder, hook):
    return [path.name for path in checkpoints(folder / hook / "checkpoints").values()][-1:]


def test_each_hook_gets_the_dictionary_of_a_run_of_its_own(whole, config, tmp_path):
    for hook, run in whole.items():
        alone = train(config(f"alone/{hook}", hook=hook), quiet=True)
        assert_same({hook: run}, {hook: alone})
        written, expected = (yaml.safe_load((each.path / "config.yaml").read_text()) for each in (run, alone))
        assert {**written, "out": None} == {**expected, "out": None}
        assert written["hook"] == run.sae.cfg.metadata["hook_name"] == hook
        assert run.path == tmp_path / "whole" / hook
        assert run.sae.cfg.metadata["saekit"]["provenance"] == alone.sae.cfg.metadata["saekit"]["provenance"]
        figures = ("loss", "fvu", "l0", "dead_share", "grad_norm")
        lines = [
            [{name: json.loads(line)[name] for name in figures} for line in (each.path / "metrics.jsonl").open()]
            for each in (run, alone)
        ]
        assert lines[0] == lines[1]
        assert torch.equal(saekit.load(run.path).W_dec, run.sae.W_dec)


def test_gradients_are_taken_at_each_hook_apart(config):
    found = train_hooks(config("two", variant="gradient_topk", tokens=2048), HOOKS, quiet=True)
    for hook, run in found.items():
        alone = train(config(f"alone/{hook}", hook=hook, variant="gradient_topk", tokens=2048), quiet=True)
        assert_same({hook: run}, {hook: alone})


def test_a_hook_inside_attention_changes_only_the_rounding_of_others(whole, config):
    inside = "blocks.1.attn.hook_z"
    found = train_hooks(config("three"), [*HOOKS, inside], quiet=True)
    assert_same({inside: found[inside]}, {inside: train(config("alone", hook=inside), quiet=True)})
    for hook, run in whole.items():
        # of the fourth step: rounding has not grown yet, as it does in weights whose gradient is near 0
        losses = [json.loads((each.path / "metrics.jsonl").open().readline())["loss"] for each in (found[hook], run)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_model_goes_over_the_text_once(source, text, config, monkeypatch):
    seen = []
    try_quick_attention(source.model)  # which is once for a model
    monkeypatch.setattr(data, "_known_widths", WeakKeyDictionary())
    watch = source.model.original_model.register_forward_pre_hook(
        lambda module, arguments, options: seen.append(options.get("input_ids", arguments[0] if arguments else None)),
        with_kwargs=True,
    )
    monkeypatch.setattr(Trainer, "finish", lambda self: None)  # which goes over calibration text, for each hook
    train_hooks(config("run"), HOOKS, quiet=True)
    watch.remove()
    wanted, rows = [], 0
    for contexts in ActivationSource.open(dataset=str(text), context_length=64, pool=256 * STEPS).mixed("train"):
        wanted.append(contexts.tokens)
        rows += int(contexts.kept.sum())
        if rows >= 256 * STEPS:
            break
    assert len(seen) == len(wanted) + 1, "and one context of the calibration text, that tells the widths"
    assert len(seen[0]) == 1
    assert all(torch.equal(found, tokens) for found, tokens in zip(seen[1:], wanted, strict=True))


def test_stopped_runs_go_on_as_if_they_had_not_been_stopped(source, whole, config, tmp_path, monkeypatch):
    step, calls = DictionaryAdam.step, itertools.count()

    def interrupted(self, lr):
        if next(calls) == 2 * 10:
            signal.raise_signal(signal.SIGTERM)  # in the first trainer's eleventh step; the second has yet to take it
        return step(self, lr)

    monkeypatch.setattr(DictionaryAdam, "step", interrupted)
    with pytest.raises(Interrupted) as stop:
        train_hooks(config("parts"), HOOKS, quiet=True)
    assert stop.value.code == 128 + signal.SIGTERM
    assert not any(point.fwd_hooks for point in source.model.hook_dict.values()), "the model is left as it was"
    assert [newest(tmp_path / "parts", hook) for hook in HOOKS] == [["step-11.safetensors"]] * 2
    monkeypatch.setattr(DictionaryAdam, "step", step)
    resumed = train_hooks(config("parts"), resume=True, quiet=True)
    assert_same(resumed, whole)
    assert [steps_logged(run) for run in resumed.values()] == [steps_logged(run) for run in whole.values()]
    monkeypatch.setattr(Trainer, "train_step", None)  # finished: nothing is done
    assert_same(train_hooks(config("parts"), HOOKS, resume=True, quiet=True), whole)


@pytest.mark.parametrize(("behind", "at"), [(0, 8), (1, 0)])
def test_runs_go_on_from_the_newest_step_that_all_have(whole, config, tmp_path, monkeypatch, behind, at):
    """The process was killed between two checkpoints: one hook has that of step 16, the other that of ``at``."""
    parts = tmp_path / "parts"
    save = Trainer.save

    def killed(self, place):
        if self.step > at and self.config.hook == HOOKS[behind]:
            return
        save(self, place)
        if self.step == 16:
            raise MemoryError

    monkeypatch.setattr(Trainer, "save", killed)
    order = HOOKS[::-1] if behind == 0 else HOOKS
    with pytest.raises(MemoryError):
        train_hooks(config("parts"), order, quiet=True)
    assert newest(parts, HOOKS[behind]) == ([f"step-{at}.safetensors"] if at else [])
    assert newest(parts, HOOKS[1 - behind]) == ["step-16.safetensors"]
    monkeypatch.undo()
    taken = []
    advance = Trainer.advance
    monkeypatch.setattr(Trainer, "advance", lambda self, rows: taken.append(self.config.hook) or advance(self, rows))
    resumed = train_hooks(config("parts"), HOOKS, resume=True, quiet=True)
    steps = {HOOKS[behind]: STEPS - at, HOOKS[1 - behind]: STEPS - (at or 16)}  # what has begun nothing catches up
    assert {hook: taken.count(hook) for hook in HOOKS} == steps
    assert_same(resumed, whole)


def test_a_start_that_was_killed_between_two_folders_is_begun_again(whole, config, tmp_path, monkeypatch):
    prepared = many.prepared_folder

    def killed(config, overwrite):
        if config.hook == HOOKS[1]:
            raise MemoryError
        return prepared(config, overwrite=overwrite)

    monkeypatch.setattr(many, "prepared_folder", killed)
    with pytest.raises(MemoryError):
        train_hooks(config("parts"), HOOKS, quiet=True)
    monkeypatch.undo()
    assert list(many.resumable(config("parts"))) == HOOKS
    with pytest.raises(SaekitError, match="begun with another k"):
        train_hooks(config("parts", k=3), resume=True, quiet=True)
    resumed = train_hooks(config("parts", log="none"), resume=True, quiet=True)  # where loggers go may change
    assert_same(resumed, whole)
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == sorted([*HOOKS, "sweep.yaml"])


def test_a_finished_hook_is_left(whole, config, tmp_path, monkeypatch):
    """The process was stopped while the second dictionary was calibrated."""
    second = whole[HOOKS[1]].path
    shutil.rmtree(second / "sae")
    before = (whole[HOOKS[0]].path / "sae/cfg.json").stat().st_mtime_ns
    monkeypatch.setattr(Trainer, "train_step", None)  # no further step is taken
    assert_same(train_hooks(config("whole"), resume=True, quiet=True), whole)
    assert (whole[HOOKS[0]].path / "sae/cfg.json").stat().st_mtime_ns == before


def test_a_folder_that_holds_something_is_refused_or_overwritten(whole, config, tmp_path):
    with pytest.raises(SaekitError, match="holds something already"):
        train_hooks(config("whole"), HOOKS, quiet=True)
    with pytest.raises(SaekitError, match=r"started with seed = \d+, not \d+"):
        train_hooks(config("whole", seed=7), HOOKS, resume=True, quiet=True)
    with pytest.raises(SaekitError, match="is the folder of one run"):
        train_hooks(config(f"whole/{HOOKS[0]}"), HOOKS, overwrite=True, quiet=True)
    with pytest.raises(SaekitError, match="no run to resume"):
        train_hooks(config("none"), resume=True, quiet=True)
    again = train_hooks(config("whole", seed=7), HOOKS, overwrite=True, quiet=True)
    assert {run.config.seed for run in again.values()} == {7}
    assert not torch.equal(again[HOOKS[0]].sae.W_dec, whole[HOOKS[0]].sae.W_dec)


@pytest.mark.parametrize(
    ("hooks", "changes", "message"),
    [
        ([], {}, "no hook point is named"),
        ([HOOKS[0]] * 2, {}, f"'{HOOKS[0]}' is named twice"),
        ([HOOKS[0], "blocks.1.hook_mlp_uot"], {}, "no hook 'blocks.1.hook_mlp_uot'.*did you mean"),
        (HOOKS, {"cache": "nowhere"}, "there is no activation cache at 'nowhere'"),
        (HOOKS, {"k": 129}, "larger than the width of 128"),
    ],
)
def test_what_cannot_be_trained_together_is_refused(config, tmp_path, hooks, changes, message):
    with pytest.raises(SaekitError, match=message):
        train_hooks(config("run", **changes), hooks, quiet=True)
    assert not (tmp_path / "run").exists(), "a refused run leaves no folder"


def test_the_command(saekit_main, text, tmp_path):
    flags = ["--tokens", 4096, "--batch-size", 256, "--expansion", 0.5, "--k", 8, "--context-length", 64, "--quiet"]
    flags += ["--buffer", 2048, "--dataset", text, "--eval-tokens", 600, "--out", tmp_path / "x"]
    done = saekit_main("train", "--hook", HOOKS[0], "--hook", HOOKS[1], *flags)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [*HOOKS, "sweep.yaml"]
    for hook in HOOKS:
        report = json.loads((tmp_path / "x" / hook / "eval.json").read_text())
        assert report["about"]["hook"] == hook
        assert f"run: {tmp_path / 'x' / hook} " in done.stdout
    (tmp_path / "x" / HOOKS[1] / "eval.json").unlink()
    done = saekit_main("train", "--out", tmp_path / "x", "--resume", "--eval-tokens", 600, "--quiet")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("was finished already") == 2
    assert (tmp_path / "x" / HOOKS[1] / "eval.json").is_file()
