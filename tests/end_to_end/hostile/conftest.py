"""Caches, runs, models and datasets that the tests of this folder spoil."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hostile import EMBEDDED, read_all

from saekit import SAEConfig, SparseAutoencoder
from saekit.activations import ActivationCache
from saekit.formats import FORMATS
from saekit.trainers import TrainConfig, train
from saekit.trainers.trainer import Trainer


@pytest.fixture
def marker(tmp_path):
    """A folder that is there if a pickle was executed."""
    path = tmp_path / "EXECUTED"
    yield path
    assert not path.exists(), "code in a file was run"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What the commands read: a dictionary, a cache, a finished and a stopped run, a begun harvest, a model, text."""
    home = tmp_path_factory.mktemp("made")
    SparseAutoencoder(SAEConfig(6, 16, "jumprelu")).save(home / "sae")
    for name in ("dictionary_learning", "sparsify"):
        FORMATS[name].write(SparseAutoencoder(SAEConfig(6, 16, "topk", 2)), home / name)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saekit.activations.cache.SHARD_ROWS", 400)
        ActivationCache.from_tensor(home / "cache", torch.randn(1000, 6), gradients=torch.randn(1000, 6))
        patch.chdir(home)
        base = {"cache": "cache", "variant": "topk", "width": 16, "k": 2, "device": "cpu", "calibration_tokens": 50}
        base |= {"batch_size": 64, "tokens": 64 * 8, "checkpoint_every": 2}
        train(TrainConfig(**base, out="finished"), quiet=True)
        patch.setattr(Trainer, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(TrainConfig(**base, out="stopped"), quiet=True)
        (home / "several").mkdir()
        hook = "blocks.0.hook_resid_post"
        (home / "several/sweep.yaml").write_text(f"runs: {{{hook}: {{hook: {hook}, tokens: 10000}}}}\n")
    (home / "text.txt").write_text("\n".join(f"line {i} says that {i * i} is a square" for i in range(2000)))
    (home / "begun.part").mkdir()
    shutil.copytree(EMBEDDED, home / "model", ignore=shutil.ignore_patterns("__*"))
    return home


@pytest.fixture
def place(made, tmp_path):
    """A copy of it, that a command runs in."""
    return Path(shutil.copytree(made, tmp_path / "place", ignore=shutil.ignore_patterns("model.safetensors")))


@pytest.fixture
def saved(tmp_path):
    """Datasets that the datasets library saved: one, and one of a dictionary of splits."""
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_dict({"text": [f"document {i}" for i in range(50)]})
    rows.save_to_disk(str(tmp_path / "saved"))
    DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "splits"))
    assert len(read_all(tmp_path / "saved")) == len(read_all(tmp_path / "splits")) == 50
    return tmp_path
