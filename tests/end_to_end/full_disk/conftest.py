"""Disks, texts, caches and runs that the tests of this folder share."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from disks import MODEL, PLAN, SAVES, SHARDS, SPACE, STEPS, WORDS, Disk, mounted, opening, saving

from saekit import SAEConfig, SparseAutoencoder
from saekit.activations import ActivationCache
from saekit.activations.resumable import HarvestPlan, harvest_cache
from saekit.trainers import TrainConfig, train


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """What is computed here is tiny: threads would wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["tmpfs", "simulated"])
def disk(request, tmp_path, monkeypatch):
    """Eight mebibytes at ``disk.folder``."""
    folder = tmp_path / "disk"
    folder.mkdir()
    disk = Disk(folder, request.param == "simulated")
    for name in SAVES:
        monkeypatch.setattr(f"saekit.{name}.save_file", saving(disk))
    monkeypatch.setattr(Path, "open", opening(disk))
    if disk.simulated:
        monkeypatch.setattr("saekit.files.free_space", lambda folder: disk.free())
        yield disk
        return
    with mounted(folder, f"size={SPACE}"):
        yield disk


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A file of nonsense."""
    chosen = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(" ".join(chosen.choices(WORDS, k=60)) for _ in range(120)))
    return path


@pytest.fixture
def harvest(text, saekit_main, source, monkeypatch):
    """``saekit cache`` in shards of 500 rows; the embedded model is not loaded again."""
    monkeypatch.setattr(MODEL, lambda *_, **__: source.model)
    monkeypatch.setattr(SHARDS, 500)

    def run(out, *more):
        plan = [] if "--resume" in more else ["--dataset", text, "--tokens", 2250, "--context-length", 16]
        return saekit_main("cache", "--out", out, *plan, *more, "--quiet", cwd=out.parent)

    return run


@pytest.fixture
def early(monkeypatch):
    """No model may be loaded: what is wrong shows before."""

    def refuse(*_, **__):
        raise AssertionError("a model was loaded before it was refused")

    monkeypatch.setattr(MODEL, refuse)


@pytest.fixture(scope="module")
def harvested(source, text, tmp_path_factory):
    """A cache of five shards, harvested undisturbed."""
    path = tmp_path_factory.mktemp("undisturbed") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SHARDS, 500)
        patch.setattr(MODEL, lambda *_, **__: source.model)
        harvest_cache(path, HarvestPlan(dataset=str(text), **PLAN))
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Activations to train on."""
    torch.manual_seed(0)
    x = torch.relu(torch.randn(9000, 40) - 1) @ torch.nn.functional.normalize(torch.randn(40, 12), dim=1)
    return ActivationCache.from_tensor(tmp_path_factory.mktemp("data") / "cache", x).path


@pytest.fixture(scope="module")
def undisturbed(cache, tmp_path_factory):
    """The run that the disturbed ones must equal."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    train(TrainConfig(cache=cache, out=out, log_every=1, checkpoint_every=10, **STEPS), quiet=True)
    return out


@pytest.fixture(scope="module")
def dictionaries(tmp_path_factory):
    """Two that name their model: one plain, one with thresholds that only ``convert --lossy`` can write."""
    folder = tmp_path_factory.mktemp("dictionaries")
    for name, scale in (("plain", "none"), ("scaled", "token_norm")):
        sae = SparseAutoencoder(SAEConfig(256, 64, "jumprelu", affinity_scale=scale))
        sae.with_metadata(model_name="embedded", hook_name="blocks.1.hook_resid_post", dataset_path="python")
        sae.save(folder / name)
    return folder
