"""Random damage of caches, checkpoints, unfinished harvests and dictionaries: all of it is noticed and named."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import saekit
from saekit import SAEConfig, SaekitError, SparseAutoencoder
from saekit.activations import ActivationCache
from saekit.activations.manifest import MANIFEST
from saekit.activations.repair import repair, verify
from saekit.activations.resumable import HarvestPlan, harvest_cache, open_source, resume_cache
from saekit.activations.staging import JOURNAL
from saekit.seal import BLANK, stamp
from saekit.trainers import TrainConfig, train
from saekit.trainers.checkpoint import checkpoints
from saekit.trainers.trainer import Trainer

D_IN, ROWS, SHARD_ROWS = 6, 1400, 300
ANYWHERE = ("a bit", "a byte", "a byte of the header", "cut off", "emptied", "gone")
SEALED = ("a letter of the seal's name", *ANYWHERE)
TARGETS = {  # what is damaged, how often, and in which ways
    "shard for topk": (48, ANYWHERE),
    "shard for gradient_topk": (36, ANYWHERE),
    "manifest": (21, SEALED),
    "newest checkpoint": (24, SEALED),
    "both checkpoints": (14, SEALED),
    "journal": (14, SEALED),
    "shard of a harvest": (15, ANYWHERE),
    "weights": (28, SEALED),
}
ran: Counter[tuple[str, str]] = Counter()


def cases(*targets):
    """What is damaged, how, and a number."""
    return [
        pytest.param(what, kind, n, id=f"{what}-{kind}-{n}")
        for what, (number, kinds) in TARGETS.items()
        for n, kind in zip(range(number), cycle(kinds), strict=False)
        if what in targets
    ]


def damage(path: Path, kind: str, rng: random.Random) -> None:
    """Spoil a file."""
    if kind == "gone":
        path.unlink()
        return
    content = bytearray(path.read_bytes())
    if kind == "emptied":
        content.clear()
    elif kind == "cut off":
        del content[rng.randrange(len(content)) :]
    elif kind == "a bit":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "a letter of the seal's name":
        content[content.index(b"saekit-seal:") + rng.randrange(12)] ^= 1
    else:
        header = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else 500
        place = rng.randrange(min(header, len(content)) if "header" in kind else len(content))
        content[place] = (content[place] + rng.randrange(1, 256)) % 256
    path.write_bytes(content)


def note(what, kind, number):
    """Count a case; returns its source of chance."""
    ran[what, kind] += 1
    return random.Random(f"{what}, {number}")


def in_small_pieces(patch):
    """Small shards, read little by little, so that damage may show at any step of a training."""
    patch.setattr("saekit.trainers.lanes.SAMPLE", 128)
    patch.setattr("saekit.activations.stream._BLOCK", 100)
    patch.setattr("saekit.activations.shards._ROWS", 64)
    patch.setattr("saekit.activations.cache.SHARD_ROWS", SHARD_ROWS)


def recorded_steps(patch):
    """A list that receives the rows of each step that a trainer takes."""
    taken, advance = [], Trainer.advance

    def recorded(self, rows):
        taken.append(rows.clone())
        return advance(self, rows)

    patch.setattr(Trainer, "advance", recorded)
    return taken


def settings(home, out, **changes):
    base = {"cache": home / "cache", "out": out, "variant": "topk", "width": 24, "k": 3, "device": "cpu"}
    base |= {"batch_size": 64, "tokens": 64 * 19, "buffer": 256, "lr": 3e-3, "log_every": 4, "checkpoint_every": 4}
    return TrainConfig(**{**base, **changes})


def everything(folder):
    """Each file's bytes."""
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def steps(monkeypatch):
    """The rows of each step that the trainers of a test take."""
    in_small_pieces(monkeypatch)
    return recorded_steps(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A cache with gradients, what trainings on it read and give, a run and a harvest that were stopped, a dictionary.

    Nothing of it is left damaged.
    """
    home = tmp_path_factory.mktemp("damage")
    with pytest.MonkeyPatch.context() as patch:
        in_small_pieces(patch)
        torch.manual_seed(0)
        x = torch.relu(torch.randn(ROWS, 20) - 1) @ torch.randn(20, D_IN) + 3
        ActivationCache.from_tensor(home / "cache", x, gradients=torch.randn(ROWS, D_IN))
        runs, steps = {}, recorded_steps(patch)
        for variant in ("topk", "gradient_topk"):
            run = train(settings(home, home / variant, variant=variant), quiet=True)
            runs[variant] = SimpleNamespace(rows=list(steps), state=run.sae.state_dict())
            steps.clear()
        advance = Trainer.advance
        patch.setattr(Trainer, "advance", lambda self, rows: stop() if self.step == 14 else advance(self, rows))
        with pytest.raises(KeyboardInterrupt):
            train(settings(home, home / "stopped"), quiet=True)
        assert list(checkpoints(home / "stopped/checkpoints")) == [8, 12]

        (home / "text.txt").write_text("\n".join(f"line {i} says that {i * i} is a square" for i in range(2000)))
        plan = HarvestPlan(dataset=str(home / "text.txt"), tokens=1300, context_length=8, dtype="float32")
        source = open_source(plan, "cpu", False)
        patch.setattr("saekit.activations.resumable.open_source", lambda *_: source)
        harvest_cache(home / "harvest", plan)
        harvested = everything(home / "harvest")
        with pytest.raises(KeyboardInterrupt):
            harvest_cache(home / "begun", plan, progress=lambda done, total: stop() if done >= 900 else None)
        assert len(list((home / "begun.part").glob("shard-*"))) in (3, 4)
    SparseAutoencoder(SAEConfig(8, 32, "topk", k=2)).save(home / "sae")
    yield SimpleNamespace(home=home, runs=runs, source=source, harvested=harvested)
    print(f"\n{sum(ran.values())} cases of damage")
    for (what, kind), number in ran.items():
        print(f"{number:4} {what}: {kind}")


def stop():
    raise KeyboardInterrupt


@pytest.mark.parametrize(("what", "kind", "n"), cases("shard for topk", "shard for gradient_topk"))
def test_a_shard(whole, tmp_path, steps, what, kind, n):
    rng, variant = note(what, kind, n), what.split()[-1]
    file = whole.home / f"cache/shard-{n % 5:05d}.safetensors"
    content, expected = file.read_bytes(), whole.runs[variant]
    damage(file, kind, rng)
    state, told = None, ""
    try:
        assert [found.file for found in verify(whole.home / "cache")] == [file.name]
        state = train(settings(whole.home, tmp_path / "run", variant=variant), quiet=True).sae.state_dict()
    except SaekitError as error:
        told = str(error)
    finally:
        file.write_bytes(content)
    if state is None:
        assert f"the shard '{file.name}' of the cache '{whole.home / 'cache'}' is missing or damaged" in told
    else:  # the damage is where this training reads nothing
        assert kind in ("a bit", "a byte", "a byte of the header")
        assert len(steps) == len(expected.rows)
        assert all(torch.equal(state[name], value) for name, value in expected.state.items())
    assert all(torch.equal(*rows) for rows in zip(steps, expected.rows, strict=False)), "no wrong number gets through"


@pytest.mark.parametrize(("what", "kind", "n"), cases("manifest"))
def test_a_manifest(whole, tmp_path, steps, what, kind, n):
    rng, file = note(what, kind, n), whole.home / "cache/manifest.json"
    content = file.read_bytes()
    damage(file, kind, rng)
    try:
        for reads in (
            lambda: ActivationCache.open(whole.home / "cache"),
            lambda: verify(whole.home / "cache"),
            lambda: repair(whole.home / "cache"),
            lambda: train(settings(whole.home, tmp_path / "run"), quiet=True),
        ):
            with pytest.raises(SaekitError, match="manifest.json"):
                reads()
    finally:
        file.write_bytes(content)
    assert not steps


@pytest.mark.parametrize(("what", "kind", "n"), cases("newest checkpoint"))
def test_the_newest_checkpoint(whole, tmp_path, steps, capfd, what, kind, n):
    rng, run = note(what, kind, n), shutil.copytree(whole.home / "stopped", tmp_path / "run")
    damage(run / "checkpoints/step-12.safetensors", kind, rng)
    state = train(settings(whole.home, run), resume=True, quiet=True).sae.state_dict()
    assert len(steps) == 19 - 8
    assert all(torch.equal(state[name], value) for name, value in whole.runs["topk"].state.items())
    told = capfd.readouterr().err
    assert ("step-12.safetensors' is damaged" in told) == (kind != "gone")
    assert "step-8" not in told


@pytest.mark.parametrize(("what", "kind", "n"), cases("both checkpoints"))
def test_both_checkpoints(whole, tmp_path, steps, what, kind, n):
    rng, run = note(what, kind, n), shutil.copytree(whole.home / "stopped", tmp_path / "run")
    other = rng.choice(SEALED[:-1])
    damage(run / "checkpoints/step-12.safetensors", kind, rng)
    damage(run / "checkpoints/step-8.safetensors", other, rng)
    with pytest.raises(SaekitError, match="every checkpoint is damaged") as error:
        train(settings(whole.home, run), resume=True, quiet=True)
    assert ("step-12.safetensors" in str(error.value)) == (kind != "gone")
    assert "step-8.safetensors" in str(error.value)
    assert not steps
    assert not (run / "sae").exists()


@pytest.mark.parametrize(("what", "kind", "n"), cases("journal", "shard of a harvest"))
def test_an_unfinished_harvest(whole, tmp_path, monkeypatch, what, kind, n):
    rng, folder = note(what, kind, n), shutil.copytree(whole.home / "begun.part", tmp_path / "begun.part")
    monkeypatch.setattr("saekit.activations.resumable.open_source", lambda *_: whole.source)
    shards = sorted(folder.glob("shard-*"))
    damage(folder / JOURNAL if what == "journal" else rng.choice(shards), kind, rng)
    before, told, refusal = everything(folder), [], ""
    try:
        resume_cache(tmp_path / "begun", {}, tell=told.append)
    except SaekitError as error:
        refusal = str(error)
    if refusal:
        assert what == "journal"
        assert f"{JOURNAL}' is damaged" in refusal or (kind == "gone" and "no harvest to resume" in refusal)
        assert everything(folder) == before
    else:
        assert everything(tmp_path / "begun") == whole.harvested
        assert not folder.exists()
        assert what == "journal" or any("missing or damaged" in line for line in told)


@pytest.mark.parametrize(("what", "kind", "n"), cases("weights"))
def test_the_weights_of_a_dictionary(whole, tmp_path, what, kind, n):
    rng, folder = note(what, kind, n), shutil.copytree(whole.home / "sae", tmp_path / "sae")
    damage(folder / "sae_weights.safetensors", kind, rng)
    with pytest.raises(SaekitError, match=r"no dictionary" if kind == "gone" else r"sae_weights.safetensors"):
        saekit.load(folder)


def test_no_byte_of_a_shards_header_leads_to_other_numbers(whole):
    """The checksums of rows are of bytes; what those mean stands in the header, which has none of its own."""
    cache, wrong = ActivationCache.open(whole.home / "cache"), []
    file, rows = cache.path / cache.shards[1]["file"], (SHARD_ROWS + 10, SHARD_ROWS + 20)
    content, right = file.read_bytes(), cache.read(*rows, gradients=True)
    try:
        for place in range(8 + int.from_bytes(content[:8], "little")):
            for byte in {*b"FI1", content[place] ^ 1} - {content[place]}:
                file.write_bytes(content[:place] + bytes([byte]) + content[place + 1 :])
                os.utime(file, ns=(place * 1000 + byte, place * 1000 + byte))  # headers are remembered
                try:
                    found = cache.read(*rows, gradients=True)
                except SaekitError:
                    continue
                if any(a.dtype != b.dtype or not torch.equal(a, b) for a, b in zip(found, right, strict=True)):
                    wrong.append((content[place - 12 : place].decode(), chr(byte), content[place + 1 :][:12].decode()))
    finally:
        file.write_bytes(content)
    assert not wrong


@pytest.fixture
def harvested(tmp_path, saekit_main):
    """A cache of three shards, harvested from the embedded model by the command line."""
    (tmp_path / "text.txt").write_text("\n".join(f"line {i} says that {i * i} is a square" for i in range(2000)))
    done = saekit_main(
        "cache", "--out", "c", "--tokens", 800, "--dataset", "text.txt", "--context-length", 8, "--quiet", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert sorted(everything(tmp_path / "c")) == ["manifest.json", *(f"shard-0000{i}.safetensors" for i in range(3))]
    return tmp_path / "c"


def refused(done, message):
    """One line on standard error that says so."""
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert message in done.stderr


def test_verify_and_repair_by_the_command_line(harvested, saekit_main):
    place, before, rng = harvested.parent, everything(harvested), random.Random(0)
    damage(harvested / "shard-00000.safetensors", "a bit", rng)
    damage(harvested / "shard-00002.safetensors", "gone", rng)
    done = saekit_main("cache", "verify", "c", "--quiet", cwd=place)
    refused(done, "2 of the 3 shards of 'c' are missing or damaged")
    named = [line.split()[0] for line in done.stdout.splitlines()]
    assert named == ["shard-00000.safetensors", "shard-00002.safetensors"]
    refused(saekit_main("train", "--cache", "c", cwd=place), "shard-00002.safetensors' of the cache")

    done = saekit_main("cache", "repair", "c", "--quiet", cwd=place)
    assert done.returncode == 0, done.stderr
    assert everything(harvested) == before
    done = saekit_main("cache", "verify", "c", "--quiet", cwd=place)
    assert (done.returncode, done.stderr) == (0, "")

    text = place / "text.txt"
    text.write_text(text.read_text().replace("line 7", "line 8"))
    done = saekit_main("cache", "repair", "c", "--quiet", cwd=place)
    assert (done.returncode, done.stderr) == (0, ""), "there is nothing to repair"
    damage(harvested / "shard-00001.safetensors", "a byte", rng)
    refused(saekit_main("cache", "repair", "c", "--quiet", cwd=place), "dataset_fingerprint has changed")


def test_a_tensors_cache_cannot_be_repaired(tmp_path, saekit_main):
    ActivationCache.from_tensor(tmp_path / "c", torch.randn(100, 3))
    done = saekit_main("cache", "repair", "c", "--quiet", cwd=tmp_path)
    assert done.returncode == 0
    damage(tmp_path / "c/shard-00000.safetensors", "a bit", random.Random(0))
    refused(saekit_main("cache", "repair", "c", "--quiet", cwd=tmp_path), "were not harvested by `saekit cache`")


def test_a_cache_from_before_the_first_release(tmp_path, saekit_main):
    ActivationCache.from_tensor(tmp_path / "c", torch.randn(100, 3))
    manifest = json.loads((tmp_path / "c" / MANIFEST).read_text())
    for version in (1, 2):
        old = {key: value for key, value in manifest.items() if key not in ("seal", "division")}
        (tmp_path / "c" / MANIFEST).write_text(json.dumps({**old, "format": version}))
        refused(saekit_main("cache", "verify", "c", "--quiet", cwd=tmp_path), "was written before the first release")


def test_what_was_trained_before_damage_showed_is_not_lost(whole, tmp_path, steps):
    """The run goes on, to the same bits, once the cache is whole again."""
    file = whole.home / "cache/shard-00004.safetensors"
    content, cfg = file.read_bytes(), settings(whole.home, tmp_path / "run")
    damage(file, "a byte", random.Random(2))
    try:
        with pytest.raises(SaekitError, match=file.name):
            train(cfg, quiet=True)
    finally:
        file.write_bytes(content)
    before = len(steps)
    assert before > 0
    state = train(cfg, resume=True, quiet=True).sae.state_dict()
    assert len(steps) == 19
    assert all(torch.equal(state[name], value) for name, value in whole.runs["topk"].state.items())


@pytest.mark.parametrize("form", [1, 2])
def test_a_repair_that_finds_no_text_for_a_shard_says_so(whole, tmp_path, form):
    """As where the manifest is of another cache: it tells of a place that the text does not reach."""
    folder = shutil.copytree(whole.home / "harvest", tmp_path / "c")
    facts = json.loads((folder / MANIFEST).read_text())
    shards = [{**shard, "batch": 10**6} for shard in facts["shards"]]
    if form == 1:
        like = {key: facts["shards"][0][key] for key in ("rows", "bytes", "xxh3_128")}
        shards = [{"file": f"shard-{number:05d}.safetensors", **like} for number in range(120)]
        for shard in shards[1:]:
            (folder / shard["file"]).unlink(missing_ok=True)
            (folder / shard["file"]).hardlink_to(folder / shards[0]["file"])
    (folder / MANIFEST).write_bytes(
        stamp(json.dumps({**facts, "seal": BLANK, "format": form, "shards": shards, "division": None}).encode())
    )
    last = folder / shards[-1]["file"]
    last.unlink()
    with pytest.raises(SaekitError):
        repair(folder, device="cpu")
    assert not last.exists()


def test_a_shard_that_comes_out_otherwise_is_not_put_in_place(whole, tmp_path):
    """As on another machine: what was there stays, damaged as it is."""
    folder = shutil.copytree(whole.home / "harvest", tmp_path / "c")
    facts = json.loads((folder / MANIFEST).read_text())
    facts["shards"][1]["xxh3_128"] = "0" * 32
    (folder / MANIFEST).write_bytes(stamp(json.dumps({**facts, "seal": BLANK}).encode()))
    before = everything(folder)
    with pytest.raises(SaekitError, match=r"shard-00001.safetensors' came out otherwise"):
        repair(folder, device="cpu")
    assert everything(folder) == before
