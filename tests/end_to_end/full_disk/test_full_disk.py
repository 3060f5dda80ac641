"""A disk that is full: refused early where it can be foreseen, else a clean stop that goes on.

Each test of a full disk runs twice: on a small disk of its own (a tmpfs, where the system lets it be mounted), and
with writes that are cut off in this process as a full disk cuts them off.
"""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from disks import MODEL, SHARDS, SMALL, TRAIN, Disk, check_same_dictionary, held, mounted, stop, told, train_with

import saekit
from saekit import SAEConfig, SparseAutoencoder
from saekit.activations import ActivationCache
from saekit.files import PART, WriteError
from saekit.seal import file_unbroken
from saekit.trainers.trainer import Trainer

NEEDED = 2250 * (256 * 2 + 16)  # bytes of such a cache: bfloat16, token, document and position


RUNS = 10 * 4 * (2 * 512 * 12 + 512 + 12)  # bytes of a run as TRAIN asks for: weights, and thrice with two moments


@pytest.fixture
def loaded(source, monkeypatch):
    """The embedded model is not loaded again."""
    monkeypatch.setattr(MODEL, lambda *_, **__: source.model)


def test_too_little_space_is_told_before_a_harvest_begins(disk, harvest, harvested):
    disk.fill(left=1 << 20)
    before = held(disk.folder)
    told(harvest(disk.folder / "cache"), "a cache of 2,250 tokens needs 1.1 MiB, of 1.0 MiB free", f"'{disk.folder}'")
    assert held(disk.folder) == before
    disk.empty()
    disk.fill(left=NEEDED + (96 << 10))  # and what is told is enough
    done = harvest(disk.folder / "cache")
    assert done.returncode == 0, done.stderr
    assert "needs 1.1 MiB, of 1.2 MiB free" in done.stdout
    assert held(disk.folder / "cache") == held(harvested)


@pytest.mark.parametrize(
    ("file", "left", "time", "overwrite"),
    [
        ("shard-00002.safetensors", 150_000, 1, False),
        ("shard-00002.safetensors", 0, 1, True),
        ("harvest.jsonl", 100, 3, False),
        ("manifest.json", 0, 1, False),
    ],
)
def test_a_harvest_goes_on_after_the_disk_was_full(disk, harvest, harvested, file, left, time, overwrite):
    out, part = disk.folder / "cache", disk.folder / ("cache" + PART)
    if overwrite:
        ActivationCache.from_tensor(out, torch.randn(100, 8))
    older = held(out)
    disk.opened.clear()
    disk.fill_before(file, left=left, time=time)
    told(harvest(out, *["--overwrite"] * overwrite), "cannot write", "No space left on device")
    assert held(out) == older
    assert out.exists() == overwrite
    kept = held(part)
    shards = {name: kept[name] for name in kept if name.match("shard-*")}
    assert shards
    assert shards.items() <= held(harvested).items(), "what was finished is whole"
    assert kept.keys() == {Path("harvest.jsonl"), *shards}
    assert b"shard-00000" in kept[Path("harvest.jsonl")], "and known to be"

    told(harvest(out, "--resume"))  # the disk is still full
    assert held(part).keys() == kept.keys()
    assert shards.items() <= held(part).items()

    disk.empty()
    done = harvest(out, "--resume")
    assert done.returncode == 0, done.stderr
    assert held(out) == held(harvested)
    assert [path.name for path in disk.folder.iterdir()] == ["cache"]


def test_a_harvest_that_the_full_disk_stopped_twice(disk, harvest, harvested):
    """A journal that broke off is mended: what comes after it counts at the next start."""
    out = disk.folder / "cache"
    disk.fill_before("harvest.jsonl", left=100, time=3)
    told(harvest(out), "cannot write")
    disk.empty()
    disk.fill_before("manifest.json")
    told(harvest(out, "--resume"), "cannot write", "manifest.json")
    disk.empty()
    done = harvest(out, "--resume")
    assert "going on after 2,250 of 2,250 tokens" in done.stdout, done.stderr
    assert held(out) == held(harvested)


def test_a_harvest_that_the_full_disk_stopped_at_once_leaves_nothing(disk, harvest):
    disk.fill_before("shard-00000.safetensors")
    told(harvest(disk.folder / "cache"), "cannot write")
    assert [path.name for path in disk.folder.iterdir()] == ["balloon"]


@pytest.mark.parametrize("more", [["--resume"], ["--overwrite"]])
def test_what_safetensors_leaves_when_it_is_killed(more, harvest, harvested, tmp_path):
    """It writes under a name of its own first, which a process that is killed leaves there."""
    out, part = tmp_path / "cache", tmp_path / ("cache" + PART)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saekit.activations.staging.Manifest.write", lambda *_: stop("the disk is full"))
        told(harvest(out), "the disk is full")
    (part / ".tmpA1b2C3").write_bytes(bytes(1000))
    done = harvest(out, *more)
    assert done.returncode == 0, done.stderr
    assert held(out) == held(harvested)
    assert not part.exists()


def test_a_cache_from_python_is_whole_or_not_there(disk, monkeypatch):
    x = torch.randn(5000, 64)
    out = disk.folder / "cache"
    monkeypatch.setattr(SHARDS, 1000)
    old = ActivationCache.from_tensor(out, x)
    before = held(out)
    for file in ("shard-00003.safetensors", "manifest.json"):
        disk.opened.clear()
        disk.fill_before(file)  # the shard before may be on its way, and fail in its place
        with pytest.raises(WriteError, match=f"cannot write '.*{file[:5]}.*'.*No space left on device"):
            ActivationCache.from_tensor(out, x + 1, overwrite=True)
        assert held(out) == before
        assert not out.with_name("cache" + PART).exists()
        disk.empty()
    assert torch.equal(ActivationCache.open(out).read(0, 5000).x, x)
    assert len(old) == 5000


@pytest.mark.parametrize(
    ("file", "left", "newest"),
    [
        ("step-10.safetensors", 50_000, []),
        ("step-30.safetensors", 50_000, [10, 20]),
        ("step-30.safetensors", 0, [10, 20]),
        ("statistics.safetensors", 3000, [40, 50]),
        ("sae_weights.safetensors", 20_000, [40, 50]),
        ("cfg.json", 0, [40, 50]),
        ("eval.json", 0, [40, 50]),
    ],
)
def test_a_run_goes_on_after_the_disk_was_full(disk, cache, undisturbed, saekit_main, file, left, newest):
    out = disk.folder / "run"
    disk.fill_before(file, left=left)
    done = saekit_main("train", "--cache", cache, "--out", out, *TRAIN, cwd=disk.folder)
    told(done, f"cannot write '{out}", f"{file}': ", "No space left on device")
    assert {path.name for path in disk.before} == {f"step-{step}.safetensors" for step in newest}
    assert {path: path.read_bytes() for path in out.glob("checkpoints/*")} == disk.before
    assert all(file_unbroken(path) for path in disk.before)
    assert not [*out.rglob("*" + PART)]
    check_that_it_goes_on(disk, out, undisturbed, saekit_main)


def test_a_run_that_the_full_disk_stopped_at_once_begins_anew(disk, cache, undisturbed, saekit_main):
    out = disk.folder / "run"
    begin = ["train", "--cache", cache, "--out", out, *TRAIN]
    disk.fill_before("config.yaml")
    told(saekit_main(*begin, cwd=disk.folder), f"cannot write '{out / 'config.yaml'}': No space left on device")
    assert not [*out.rglob("*")]
    disk.empty()
    assert saekit_main(*begin, cwd=disk.folder).returncode == 0
    check_same_dictionary(out, undisturbed)


def test_a_run_goes_on_after_its_metrics_could_not_be_written(disk, cache, undisturbed, saekit_main, monkeypatch):
    out = disk.folder / "run"
    save = Trainer.save

    def save_and_fill(trainer, place):
        save(trainer, place)
        if trainer.step == 20:
            disk.fill(left=100)
            disk.before = held(out / "checkpoints")

    monkeypatch.setattr(Trainer, "save", save_and_fill)
    every = train_with("--checkpoint-every", 20)  # the metrics meet the full disk first
    done = saekit_main("train", "--cache", cache, "--out", out, *every, cwd=disk.folder)
    monkeypatch.setattr(Trainer, "save", save)
    told(done, f"cannot write '{out / 'metrics.jsonl'}': No space left on device")
    assert disk.before == held(out / "checkpoints")
    assert not [*out.rglob("*" + PART)]
    check_that_it_goes_on(disk, out, undisturbed, saekit_main)


def check_that_it_goes_on(disk, out, undisturbed, saekit_main):
    disk.empty()
    done = saekit_main("train", "--out", out, "--resume", "--eval-tokens", 256, "--quiet", cwd=disk.folder)
    assert done.returncode == 0, done.stderr
    assert "damaged" not in done.stderr
    check_same_dictionary(out, undisturbed)
    lines = [[json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()] for run in (out, undisturbed)]
    assert [x["step"] for x in lines[0]] == list(range(1, 51))
    assert [x["loss"] for x in lines[0]] == [x["loss"] for x in lines[1]]
    assert json.loads((out / "eval.json").read_text())["sparsity"]["tokens"] > 0
    assert not [*out.rglob("*" + PART)]


@pytest.mark.parametrize("overwrite", [False, True])
def test_too_little_space_is_told_before_a_run_begins(disk, cache, undisturbed, saekit_main, overwrite):
    out = disk.folder / "run"
    if overwrite:
        shutil.copytree(undisturbed, out)
    disk.fill(left=200_000)
    before = held(disk.folder)
    more = [*train_with("--width", 2048), *["--overwrite"] * overwrite]
    done = saekit_main("train", "--cache", cache, "--out", out, *more, cwd=disk.folder)
    told(done, "the run with its checkpoints needs ", " MiB, of ", "KiB free", f"'{out}'")
    assert held(disk.folder) == before, "nothing is written, and an older run is as it was"


def test_a_run_resumes_in_the_space_that_it_began_in(disk, cache, undisturbed, saekit_main):
    """What is told to be needed is enough, and what a stopped run has written already is not asked for again."""
    out, space = disk.folder / "run", RUNS + (200 << 10)
    disk.fill(left=space)
    disk.fill_before("step-30.safetensors")
    told(saekit_main("train", "--cache", cache, "--out", out, *TRAIN, cwd=disk.folder), "cannot write")
    disk.empty()
    disk.fill(left=space - sum(path.stat().st_size for path in out.rglob("*") if path.is_file()))
    done = saekit_main("train", "--out", out, "--resume", "--eval-tokens", 0, "--quiet", cwd=disk.folder)
    assert done.returncode == 0, done.stderr
    check_same_dictionary(out, undisturbed)


def test_runs_at_several_hooks_need_space_for_all_of_them(disk, loaded, text, saekit_main):
    hooks = shlex.split("--hook blocks.0.hook_resid_post --hook blocks.1.hook_resid_post --context-length 16")
    one = 10 * 4 * (2 * 64 * 256 + 64 + 256)
    disk.fill(left=one * 3 // 2)
    before = held(disk.folder)
    out = disk.folder / "runs"
    done = saekit_main("train", *hooks, "--dataset", text, "--out", out, *SMALL, cwd=disk.folder)
    told(done, "needs", "free", f"'{out}")
    assert held(disk.folder) == before


def test_an_older_dictionary_or_report_outlives_a_full_disk(disk, undisturbed, cache, saekit_main):
    plain = saekit.load(undisturbed)
    plain.cfg = SAEConfig(12, 512, "jumprelu", metadata={"saekit": plain.cfg.metadata["saekit"]})
    target = plain.save(disk.folder / "converted")
    (disk.folder / "other").mkdir()
    other = SparseAutoencoder(SAEConfig(12, 600, "standard")).save(disk.folder / "other/sae")
    for file in ("sae_weights.safetensors", "cfg.json"):
        before = held(target)
        disk.opened.clear()
        disk.fill_before(file)
        told(saekit_main("convert", other, target, "--overwrite", cwd=disk.folder), "cannot write", file)
        assert held(target) == before
        disk.empty()
    disk.fill_before("report.json")
    done = saekit_main("eval", undisturbed, "--out", disk.folder / "report.json", "--quiet", cwd=disk.folder)
    told(done, "cannot write", "report.json")
    assert not [*disk.folder.glob("report*")]


def test_an_older_figure_outlives_a_full_disk(tmp_path):
    from saekit.evals.dark_matter.figures import draw

    with mounted(tmp_path / "disk", "size=256k") as folder:
        figures = {"one": {"document": {"plain": {"r2_pooled": 0.5}}}}
        for path in draw(figures, {}, folder):
            path.write_text("older")
        before = held(folder)
        Disk(folder, simulated=False).fill(left=8192)
        with pytest.raises(WriteError, match=r"cannot write '.*\.png': No space left on device"):
            draw(figures, {}, folder)
        (folder / "balloon").unlink()
        assert held(folder) == before
