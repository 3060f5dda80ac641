"""Many runs on one stream: each is what it would be alone, and what is done is not done again."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import yaml

from saekit import SaekitError
from saekit.activations import harvesting
from saekit.activations.model import hooks_matching
from saekit.files import in_bytes
from saekit.trainers import TrainConfig, lanes, memory, train, train_many
from saekit.trainers.checkpoint import checkpoints
from saekit.trainers.loggers import OpenLoggers
from saekit.trainers.memory import Memory, free_bytes, groups_that_fit
from saekit.trainers.plan import combined, name_of, read_plan
from saekit.trainers.trainer import Trainer

pytestmark = pytest.mark.usefixtures("text")
CELLS: dict[str, dict[str, Any]] = {
    "small": {"k": 4},
    "wide": {"k": 16, "width": 300, "variant": "topk"},
    "seed": {"k": 4, "seed": 1},
    "batch": {"k": 4, "batch_size": 128},
    "short": {"k": 8, "tokens": 256 * 10, "pool": 6144, "aux": "aux_k"},
    "hook": {"k": 4, "hook": "blocks.1.hook_mlp_out", "seed": 1},
    "choice": {"k": 4, "variant": "feature_choice", "buffer": 1024},
    "gradients": {"k": 4, "variant": "gradient_topk"},
}


@pytest.fixture(scope="module")
def alone(live, tmp_path_factory):
    """Each cell as a run of its own."""
    home = tmp_path_factory.mktemp("alone")
    return {name: train(live(home / name, **cell), quiet=True) for name, cell in CELLS.items()}


def cells(live, home, names=tuple(CELLS)):
    return [live(home / name, **CELLS[name]) for name in names]


def assert_alike(runs, alone):
    for run in runs:
        one = alone[run.path.name]
        for name in ("sae/sae_weights.safetensors", "statistics.safetensors"):
            assert (run.path / name).read_bytes() == (one.path / name).read_bytes(), (run.path.name, name)
        lines = [
            [{k: v for k, v in json.loads(line).items() if k in ("step", "loss", "fvu", "l0")} for line in file]
            for file in ((each.path / "metrics.jsonl").open() for each in (run, one))
        ]
        assert lines[0] == lines[1]


def test_each_is_what_it_would_be_alone_and_the_model_goes_over_the_text_once(live, alone, tmp_path, monkeypatch):
    passes, harvest = [], harvesting.truncated
    monkeypatch.setattr(
        harvesting,
        "truncated",
        lambda *arguments: _counted(harvest(*arguments), passes),
    )
    names = [name for name in CELLS if name != "gradients"]
    train(live(tmp_path / "one", **CELLS["small"]), quiet=True)
    of_one = len(passes)
    passes.clear()
    assert_alike(train_many(cells(live, tmp_path, names), quiet=True), alone)
    assert len(passes) < 2.5 * of_one, "training text once, and the calibration text once at each hook"


class _counted:  # noqa: N801
    """A context manager of a function, whose calls are noted."""

    def __init__(self, inner, calls):
        self.inner, self.calls = inner, calls

    def __enter__(self):
        function = self.inner.__enter__()
        return lambda tokens: self.calls.append(1) or function(tokens)

    def __exit__(self, *error):
        return self.inner.__exit__(*error)


def test_a_run_without_a_hook_has_the_model_s_own_whichever_comes_first(live, alone, tmp_path):
    assert_alike(train_many(cells(live, tmp_path, ["hook", "small"]), quiet=True), alone)


def test_gradients_have_a_pass_of_their_own(live, alone, tmp_path):
    assert_alike(train_many(cells(live, tmp_path, ["gradients", "small"]), quiet=True), alone)


def test_from_a_cache(cache, tmp_path):
    def make(home, name, **cell):
        return TrainConfig(
            cache=cache, out=home / name, tokens=256 * 12, batch_size=256, width=48, device="cpu", buffer=1500, **cell
        )

    grid = {"a": {"k": 2}, "b": {"k": 4, "variant": "topk"}, "c": {"k": 2, "seed": 1}, "d": {"k": 2, "lr": 0.002}}
    grid["e"] = {"k": 2, "variant": "gradient_topk"}
    one = {name: train(make(tmp_path / "alone", name, **cell), quiet=True) for name, cell in grid.items()}
    assert_alike(train_many([make(tmp_path / "many", name, **cell) for name, cell in grid.items()], quiet=True), one)


@pytest.mark.parametrize("save", [2, 9, 13])
def test_killed_anywhere_and_resumed(live, alone, tmp_path, monkeypatch, save):
    """While it writes its ``save``-th checkpoint, runs standing at different steps."""
    names, count = ["small", "wide", "seed", "batch", "hook"], []
    write = Trainer.save

    def killed(self, place):
        count.append(1)
        if len(count) == save:
            raise MemoryError
        write(self, place)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", killed)
        with pytest.raises(MemoryError):
            train_many(cells(live, tmp_path, names), quiet=True)
    assert_alike(train_many(cells(live, tmp_path, names), resume=True, quiet=True), alone)


def test_an_added_run_costs_nothing_that_is_done(live, alone, tmp_path, monkeypatch):
    names = ["small", "wide"]
    home = tmp_path / "home"
    train_many(cells(live, home, names), quiet=True, home=home)
    taken, advance = [], Trainer.advance
    monkeypatch.setattr(
        Trainer, "advance", lambda self, rows: taken.append(self.config.out.name) or advance(self, rows)
    )
    runs = train_many(cells(live, home, [*names, "seed"]), resume=True, quiet=True, home=home)
    assert set(taken) == {"seed"}
    assert_alike(runs, alone)
    assert list(read_plan(home)) == [*names, "seed"]


def test_one_that_fails_leaves_the_others(live, alone, tmp_path, monkeypatch):
    advance = Trainer.advance

    def spoilt(self, rows):
        return advance(self, rows * float("nan") if (self.config.out.name, self.step) == ("wide", 9) else rows)

    monkeypatch.setattr(Trainer, "advance", spoilt)
    with pytest.raises(SaekitError, match="1 of 3 runs failed, the first in '.*wide': the loss is nan at step 10"):
        train_many(cells(live, tmp_path, ["small", "wide", "seed"]), quiet=True)
    monkeypatch.undo()
    assert list(checkpoints(tmp_path / "wide/checkpoints")) == [8]
    resumed = train_many(cells(live, tmp_path, ["small", "wide", "seed"]), resume=True, quiet=True)
    assert_alike(resumed, alone)


def test_one_that_fails_alone_on_its_stream_does_not_hold_the_others_back(live, tmp_path, monkeypatch):
    """Its rows are read no further, and the others go more than the window of the tee beyond its place."""
    monkeypatch.setattr(lanes, "SAMPLE", 256)
    advance, ends = Trainer.advance, []
    monkeypatch.setattr(OpenLoggers, "close", lambda self, failed: ends.append(failed))

    def spoilt(self, rows):
        return advance(self, rows * float("nan") if self.config.out.name == "bad" else rows)

    monkeypatch.setattr(Trainer, "advance", spoilt)
    settings = {"k": 4, "tokens": 256 * 60, "buffer": 256}
    runs = [live(tmp_path / "good", **settings), live(tmp_path / "bad", **settings, seed=1)]
    with pytest.raises(SaekitError, match="1 of 2 runs failed, the first in '.*bad'"):
        train_many(runs, quiet=True)
    assert (tmp_path / "good/sae/cfg.json").is_file()
    assert sorted(ends) == [False, True], "loggers are told which one failed"


def test_two_with_one_folder_are_refused(live, tmp_path):
    with pytest.raises(SaekitError, match="two of the runs would have the folder"):
        train_many([live(tmp_path / "a", k=2), live(tmp_path / "a", k=4)], quiet=True)
    train(live(tmp_path / "run", k=2), quiet=True)
    with pytest.raises(SaekitError, match="is the folder of one run"):
        train_many([live(tmp_path / "run/a", k=2)], home=tmp_path / "run", quiet=True)


def test_the_grid():
    found = combined({"k": [16, 32], "seed": [0, 1], "log": ["csv"], "lr": 0.1})
    assert list(found) == ["k=16,seed=0", "k=16,seed=1", "k=32,seed=0", "k=32,seed=1"]
    assert found["k=32,seed=0"] == {"k": 32, "seed": 0, "log": ["csv"], "lr": 0.1}
    assert combined({"k": 3}) == {"": {"k": 3}}
    assert list(combined({"hook": ["a.b", "c"]})) == ["a.b", "c"]
    runs = combined({"k": 4, "runs": [{"variant": "topk"}, {"k": [8, 16], "lr": 1e-3}]})
    assert list(runs) == ["variant=topk", "k=8,lr=0.001", "k=16,lr=0.001"]
    assert runs["variant=topk"] == {"k": 4, "variant": "topk"}
    assert name_of({"hook": "a", "dataset": "org/name, 2"}) == "hook=a,dataset=org_name__2"
    for wrong, message in (
        ({"runs": 5}, "runs: is not a list"),
        ({"runs": []}, "runs: is not a list"),
        ({"runs": [{"k": 2, "out": "x"}]}, "runs: names an out"),
        ({"k": []}, "k: is a list without values"),
        ({"k": [2, 2]}, "the k '2' is named twice"),
    ):
        with pytest.raises(SaekitError, match=message):
            combined(wrong)


def test_the_command(saekit_main, text, live, tmp_path):
    flags = [
        "--tokens",
        2560,
        "--batch-size",
        256,
        "--width",
        128,
        "--context-length",
        64,
        "--quiet",
        "--device",
        "cpu",
    ]
    flags += ["--buffer", 2048, "--dataset", text, "--eval-tokens", 600, "--out", tmp_path / "x"]
    done = saekit_main("train", "--k", "4,8", "--seed", "0,1", *flags)
    assert done.returncode == 0, done.stderr
    names = ["k=4,seed=0", "k=4,seed=1", "k=8,seed=0", "k=8,seed=1"]
    assert {yaml.safe_load((tmp_path / "x" / name / "config.yaml").read_text())["pool"] for name in names} == {2560}
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [*names, "sweep.yaml"]
    assert all((tmp_path / "x" / name / "eval.json").is_file() for name in names)
    again = saekit_main("train", "--out", tmp_path / "x", "--resume", "--eval-tokens", 600, "--quiet")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("was finished already") == 4
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump({"k": [4, 8], "variant": "topk"}))
    done = saekit_main("train", "--config", file, *flags[:-1], tmp_path / "y")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "y").iterdir()) == ["k=4", "k=8", "sweep.yaml"]
    wrong = saekit_main("train", "--k", "4,x", *flags[:-1], tmp_path / "z")
    assert wrong.returncode == 2
    assert "--k takes whole numbers, not '4,x'" in wrong.stderr


def test_hooks_by_a_pattern(source, saekit_main, text, tmp_path):
    every = [f"blocks.{layer}.hook_resid_post" for layer in range(source.model.cfg.n_layers)]
    assert hooks_matching(source.model, "blocks.*.hook_resid_post") == every
    flags = ["--tokens", 512, "--batch-size", 256, "--width", 32, "--k", 4, "--context-length", 64, "--quiet"]
    flags += ["--buffer", 512, "--dataset", text, "--eval-tokens", 0, "--out", tmp_path / "x"]
    done = saekit_main("train", "--hook", "blocks.*.hook_resid_post", *flags)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "x").glob("*/")) == every
    wrong = saekit_main("train", "--hook", "blocks.*.hook_resid_pots", *flags[:-1], tmp_path / "y")
    assert wrong.returncode == 2
    assert "no hook point of the model fits 'blocks.*.hook_resid_pots'" in wrong.stderr


def test_what_memory_does_not_hold_at_once_is_trained_in_groups(live, alone, tmp_path, monkeypatch, capsys):
    names = ["small", "seed", "batch", "choice"]
    configs = cells(live, tmp_path, names)
    two = [Memory.of(configs[m : m + 2], [256, 256]).total for m in range(3)]
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(max(two) / 0.8) + 1)
    runs = train_many(configs)
    assert_alike(runs, alone)
    told = capsys.readouterr().err
    assert f"4 runs in 2 groups, each with a pass of its own over the data: {in_bytes(max(two[0], two[2]))}" in told
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1)
    found = groups_that_fit(configs, [256] * 4, torch.device("cpu"))
    assert [group for group, _ in found] == [[0], [1], [2], [3]], "a run that does not fit is tried alone"


def test_memory_of_runs_grows_with_runs_and_is_that_of_one_alone(live, tmp_path):
    configs = cells(live, tmp_path)
    d_in = [256] * len(configs)
    alone = [Memory.of([config], [256]) for config in configs]
    every = Memory.of(configs, d_in)
    assert max(each.total for each in alone) < every.total < sum(each.total for each in alone)
    assert 0 < free_bytes(torch.device("cpu")) < 2**44


def test_a_dry_run_tells_and_leaves_nothing(saekit_main, text, tmp_path):
    flags = ["--tokens", 8192, "--batch-size", 256, "--width", 32, "--context-length", 64, "--quiet"]
    flags += ["--buffer", 512, "--dataset", text, "--out", tmp_path / "x"]
    done = saekit_main("train", "--k", "4,8", "--seed", "0,1", "--dry-run", *flags)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:4]] == [f"k={k},seed={seed}" for k in (4, 8) for seed in (0, 1)]
    assert "mutual_choice, k 8, 32 features at blocks.1.hook_resid_post, 32 steps of" in lines[2]
    # weights, gradients and two moments of 2·256·32 + 32 + 256 numbers each, three batches of pre-activations, three
    # fills for each of two seeds, the pool
    held = 4 * 16 * 16_672 + 3 * 256 * 32 * 4 + 2 * 3 * 512 * 256 * 4 + 9 * 8192
    assert lines[4].startswith(f"4 runs from 1 pass over the data: {in_bytes(held)} beside the model; about")
    assert not (tmp_path / "x").exists()
    assert saekit_main("train", "--dry-run", "--k", 33, *flags).returncode == 2
