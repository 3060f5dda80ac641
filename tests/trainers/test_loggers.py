"""Loggers beside metrics.jsonl: what they hold, whatever ended the run in between."""

from __future__ import annotations

import json
import struct
import warnings
from collections import Counter

import pytest
import torch
from test_step import config

from saekit import SaekitError
from saekit.files import WriteError
from saekit.trainers import TrainConfig, loggers, progress, train
from saekit.trainers.trainer import Trainer


def crash(monkeypatch, at):
    """Let the run die after so many steps, without a word to anybody."""
    advance = Trainer.advance

    def dying(self, rows):
        if self.step == at:
            raise RuntimeError("dead")
        return advance(self, rows)

    monkeypatch.setattr(Trainer, "advance", dying)


def crashed_and_resumed(cache, tmp_path, monkeypatch, **changes):
    """A run that logged steps 5 to 30, has a checkpoint of step 20, and went on; the lines of its metrics by step."""
    cfg = config(cache, tmp_path, checkpoint_every=20, **changes)
    with monkeypatch.context() as patch:
        crash(patch, 34)
        with pytest.raises(RuntimeError, match="dead"):
            train(cfg, quiet=True)
    train(cfg, resume=True, quiet=True)
    lines = map(json.loads, (cfg.out / "metrics.jsonl").read_text().splitlines())
    found = {line.pop("step"): line for line in lines}
    assert list(found) == list(range(5, 55, 5))
    return cfg, found


def test_tensorboard(cache, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    cfg, lines = crashed_and_resumed(cache, tmp_path, monkeypatch, log=["tensorboard"])

    def scalars():
        events = EventAccumulator(str(cfg.out / "tensorboard"))
        events.Reload()
        return {tag: {each.step: each.value for each in events.Scalars(tag)} for tag in events.Tags()["scalars"]}, {
            tag: Counter(each.step for each in events.Scalars(tag)) for tag in events.Tags()["scalars"]
        }

    values, counts = scalars()
    assert values.keys() == lines[5].keys()
    assert all(set(each.values()) == {1} for each in counts.values())  # no step twice
    for tag, found in values.items():
        assert found == {step: pytest.approx(line[tag]) for step, line in lines.items()}, tag

    train(config(cache, tmp_path, log="tensorboard", seed=1, tokens=128 * 10), overwrite=True, quiet=True)
    assert list(scalars()[0]["fvu"]) == [5, 10]  # nothing of the run before


def records(path):
    """What Weights & Biases keeps when offline: a log in blocks, as LevelDB writes them, of protobuf messages."""
    from wandb.proto import wandb_internal_pb2

    content, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32_768 - at % 32_768 < 7:
            at += 32_768 - at % 32_768
            continue
        _, size, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def test_wandb(cache, tmp_path, monkeypatch):
    """Offline: two starts are two folders of one run."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    cfg, lines = crashed_and_resumed(cache, tmp_path, monkeypatch, log=["wandb"])
    starts = sorted(cfg.out.glob("wandb/offline-run-*/*.wandb"))
    assert len(starts) == 2
    kinds = [[(each.WhichOneof("record_type"), each) for each in records(path)] for path in starts]
    runs = [each.run for start in kinds for kind, each in start if kind == "run"]
    assert {(run.run_id, run.project) for run in runs} == {
        (json.loads((cfg.out / "wandb.json").read_text())["id"], "mine")
    }
    settings = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert settings["width"] == 64
    history = [each.history for start in kinds for kind, each in start if kind == "history"]
    assert [each.step.num for each in history] == list(lines)
    for each in history:
        logged = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in each.item}
        line = dict(lines[each.step.num])
        if each.step.num <= 30:  # logged by the first start, whose lines beyond the checkpoint were written again
            for clock in ("seconds", "tokens_per_second", "waited_seconds", "waited_share"):
                del line[clock]
        assert {name: logged[name] for name in line} == pytest.approx(line)
    assert [each.exit.exit_code for start in kinds for kind, each in start if kind == "exit"] == [1, 0]


def test_a_logger_that_fails_ends_nothing(cache, tmp_path, monkeypatch, capfd):
    got = []

    class Broken:
        package = None
        where = "nowhere"

        def __init__(self, config, step, logged): ...

        def log(self, step, line):
            got.append(step)
            if step == 10:
                raise ConnectionError("the network is down")

        def close(self, failed):
            raise AssertionError("it is closed although it failed")

    monkeypatch.setitem(loggers.LOGGERS, "broken", Broken)
    run = train(config(cache, tmp_path, log=["broken"]), quiet=True)
    told = capfd.readouterr().err
    assert told == "saekit: broken fails (the network is down); metrics.jsonl has everything\n"
    assert got == [5, 10]
    plain = train(config(cache, tmp_path, out=tmp_path / "plain"), quiet=True)
    assert torch.equal(run.sae.W_dec, plain.sae.W_dec)
    assert {path.name for path in run.path.iterdir()} == {path.name for path in plain.path.iterdir()}


def test_a_missing_package_is_told_before_anything_starts(cache, tmp_path, monkeypatch, saekit_main):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    done = saekit_main("train", "--cache", cache, "--log", "wandb", "--out", tmp_path / "run", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--log wandb needs the package wandb: pip install saekit[wandb]" in done.stderr
    assert not (tmp_path / "run").exists()


def test_one_that_cannot_be_started(cache, tmp_path, monkeypatch):
    """The run is begun by then, and goes on without it."""

    class Absent:
        package = None

        def __init__(self, config, step, logged):
            raise OSError("no route.")

    monkeypatch.setitem(loggers.LOGGERS, "absent", Absent)
    cfg = config(cache, tmp_path, log=["absent"])
    with pytest.raises(SaekitError, match="absent cannot be started: no route; .*--resume --log none"):
        train(cfg, quiet=True)
    run = train(cfg.replace(log=[]), resume=True, quiet=True)
    assert run.config.log == []
    assert TrainConfig.from_yaml(run.path / "config.yaml").log == []


def test_where_metrics_cannot_be_written_loggers_are_closed(cache, tmp_path, monkeypatch):
    closed = []

    class Watched:
        package, where = None, "nowhere"

        def __init__(self, config, step, logged): ...

        def close(self, failed):
            closed.append(failed)

    def full(path, write):
        raise WriteError(f"cannot write '{path}': No space left on device")

    monkeypatch.setitem(loggers.LOGGERS, "watched", Watched)
    monkeypatch.setattr(progress, "replace_file", full)
    with pytest.raises(WriteError, match="No space left"):
        train(config(cache, tmp_path, log=["watched"]), quiet=True)
    assert closed == [True]


def test_names():
    assert TrainConfig(log="wandb").log == ["wandb"]
    assert TrainConfig(log=["tensorboard", "wandb", "tensorboard"]).log == ["tensorboard", "wandb"]
    assert TrainConfig(log="none").log == []
    assert TrainConfig().log == []
    with pytest.raises(SaekitError, match=r"unknown logger 'wandbb'; did you mean 'wandb'\?"):
        TrainConfig(log=["wandbb"])
    for nonsense in (5, [5], [["wandb"]], {"wandb": 1}):
        with pytest.raises(SaekitError, match="log"):
            TrainConfig(log=nonsense)
