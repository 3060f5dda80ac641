"""A run tells on what it ran, and says so where it goes on on something else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from test_step import config

import saekit
from saekit.errors import SaekitWarning
from saekit.machine import differences, this_machine
from saekit.trainers import train, trainer
from saekit.trainers.checkpoint import checkpoints, load_checkpoints, save_checkpoint
from saekit.trainers.trainer import Trainer

CPU = torch.device("cpu")
SCRIPT = """
import json, torch
from saekit.machine import this_machine
print(json.dumps(this_machine(torch.device("cpu"))))
"""


def test_it_is_what_torch_computes_with():
    limits = {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=os.environ | limits, capture_output=True, text=True, timeout=600
    )
    found = json.loads(done.stdout)
    here = this_machine(CPU)
    assert found["threads"] == 1
    assert found["capability"] in ("DEFAULT", "NO AVX")
    for name in ("torch", "processor", "device"):
        assert found[name] == here[name]
    assert here["torch"] == torch.__version__
    assert here["processor"]


def stopped(cache, tmp_path, monkeypatch):
    """The config of a run that is trained and not yet saved."""
    cfg = config(cache, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "finish", lambda self: None)
        train(cfg, quiet=True)
    return cfg


def ran_on(run):
    return saekit.load(run.path).cfg.metadata["saekit"]["ran_on"]


def test_the_dictionary_tells_it(cache, tmp_path, monkeypatch):
    cfg = stopped(cache, tmp_path, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SaekitWarning)
        assert ran_on(train(cfg, resume=True, quiet=True)) == [this_machine(CPU)]


def test_going_on_on_another_machine_is_told(cache, tmp_path, monkeypatch):
    here = this_machine(CPU)
    other = {**here, "torch": "9.9", "threads": 77}
    cfg = stopped(cache, tmp_path, monkeypatch)
    monkeypatch.setattr(trainer, "this_machine", lambda device: other)
    told = rf"another machine \(torch {here['torch']}, now 9.9, threads {here['threads']}, now 77\)"
    with pytest.warns(SaekitWarning, match=told.replace("+", r"\+")):
        run = train(cfg, resume=True, quiet=True)
    assert ran_on(run) == [here, other]
    assert differences(here, here) == ""


def test_checkpoints_of_earlier_versions_do_not_tell_it_and_are_read(cache, tmp_path, monkeypatch):
    cfg = stopped(cache, tmp_path, monkeypatch)
    folder = cfg.out / "checkpoints"
    step, (state,) = load_checkpoints([folder], CPU)
    del state["ran_on"]
    save_checkpoint(folder, step, state)
    assert list(checkpoints(folder))[-1] == step
    with warnings.catch_warnings():
        warnings.simplefilter("error", SaekitWarning)
        assert ran_on(train(cfg, resume=True, quiet=True)) == [{}, this_machine(CPU)]
