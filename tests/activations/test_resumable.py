"""Harvests that go on: the same cache, byte for byte, wherever they were stopped; and what is refused."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saekit import SaekitError
from saekit.activations import ActivationBatch, ActivationCache, ActivationSource
from saekit.activations.repair import repair, verify
from saekit.activations.resumable import HarvestPlan, harvest_cache, resume_cache
from saekit.activations.staging import Place, regrouped
from saekit.files import locked
from saekit.interrupt import Interrupted

PLAN = {"tokens": 9000, "context_length": 64}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch, source):
    """Shards of 700 rows, and the embedded model loaded once."""
    monkeypatch.setattr("saekit.activations.cache.SHARD_ROWS", 700)
    opened = ActivationSource.open.__func__
    monkeypatch.setattr(
        ActivationSource,
        "open",
        classmethod(lambda cls, *a, **k: opened(cls, *a, **{**k, "loaded": source.model})),
    )


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """Harvested without a break; with and without gradients."""
    place = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saekit.activations.cache.SHARD_ROWS", 700)
        for gradients in (False, True):
            harvest_cache(place / str(gradients), HarvestPlan(**PLAN, gradients=gradients))
    return place


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stop_after(monkeypatch, batches, error=MemoryError):
    """The model gives up after some batches of contexts."""
    harvested = ActivationSource.batches

    def some(self, *a, **k):
        for number, batch in enumerate(harvested(self, *a, **k)):
            if number == batches:
                if error is not Interrupted:
                    raise error
                signal.raise_signal(signal.SIGTERM)
            yield batch

    monkeypatch.setattr(ActivationSource, "batches", some)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_harvest_that_dies_again_and_again_ends_as_if_it_had_not(whole, tmp_path, monkeypatch, gradients):
    path, plan = tmp_path / "c", HarvestPlan(**PLAN, gradients=gradients)
    steps = []
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(MemoryError):
            harvest_cache(path, plan, progress=lambda done, total: steps.append(done))
        for _ in range(20):
            try:
                resume_cache(path, {}, progress=lambda done, total: steps.append(done))
                break
            except MemoryError:
                continue
    assert contents(path) == contents(whole / str(gradients))
    assert steps.count(0) <= 2, "it went on, and did not begin again"
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    assert verify(path) == []


def test_a_stopped_harvest_goes_on(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 2, Interrupted)
        with pytest.raises(Interrupted) as stop:
            harvest_cache(tmp_path / "c", HarvestPlan(**PLAN))
    assert stop.value.code == 128 + signal.SIGTERM
    with pytest.raises(SaekitError, match="only an unfinished harvest; `saekit cache --out .* --resume`"):
        ActivationCache.open(tmp_path / "c")
    with pytest.raises(SaekitError, match="an unfinished harvest lies in"):
        harvest_cache(tmp_path / "c", HarvestPlan(**PLAN))
    with pytest.raises(SaekitError, match="an unfinished harvest lies in"):
        ActivationCache.from_tensor(tmp_path / "c", torch.ones(3, 2))
    with pytest.raises(SaekitError, match="begun with another tokens, gradients"):
        resume_cache(tmp_path / "c", {"tokens": 9, "gradients": True})
    told = []
    resume_cache(tmp_path / "c", {"tokens": 9000}, tell=told.append)
    assert told[0].startswith("going on after ")
    assert contents(tmp_path / "c") == contents(whole / "False")
    resume_cache(tmp_path / "c", {}, tell=told.append)
    assert "was finished already" in told[-1]
    with pytest.raises(SaekitError, match="no harvest to resume"):
        resume_cache(tmp_path / "none", {})


def test_what_was_changed_since_is_named(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"value_{i} = {i * i % 97}\n" for i in range(3000)))
    plan = HarvestPlan(**PLAN, dataset=str(text))
    with monkeypatch.context() as patch:
        stop_after(patch, 1, Interrupted)
        with pytest.raises(Interrupted):
            harvest_cache(tmp_path / "c", plan)
    text.write_text(text.read_text() + "more = 1\n")
    with pytest.raises(SaekitError, match="the dataset_fingerprint is not what it was"):
        resume_cache(tmp_path / "c", {})
    harvest_cache(tmp_path / "c", plan, overwrite=True)
    shard = tmp_path / "c/shard-00001.safetensors"
    shard.unlink()
    text.write_text(text.read_text() + "more = 2\n")
    with pytest.raises(SaekitError, match="the dataset_fingerprint has changed"):
        repair(tmp_path / "c")


def test_an_old_cache_stays_until_the_new_one_is_whole(whole, tmp_path, monkeypatch):
    ActivationCache.from_tensor(tmp_path / "c", torch.ones(2000, 2))
    old = contents(tmp_path / "c")
    (tmp_path / "c/notes.txt").write_text("mine")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(MemoryError):
            harvest_cache(tmp_path / "c", HarvestPlan(**PLAN), overwrite=True)
    assert contents(tmp_path / "c") == {**old, "notes.txt": b"mine"}
    resume_cache(tmp_path / "c", {})
    assert contents(tmp_path / "c") == {**contents(whole / "False"), "notes.txt": b"mine"}


def test_the_second_process_is_told(tmp_path):
    (tmp_path / "c.part").mkdir()
    with locked(tmp_path / "c.part", "harvesting"):
        for overwrite in (False, True):
            with pytest.raises(SaekitError, match="another process is harvesting in"):
                harvest_cache(tmp_path / "c", HarvestPlan(**PLAN), overwrite=overwrite)
        with pytest.raises(SaekitError, match="another process is harvesting in"):
            ActivationCache.from_tensor(tmp_path / "c", torch.ones(3, 2))
    ActivationCache.from_tensor(tmp_path / "c", torch.ones(3, 2))


@pytest.mark.parametrize("gradients", [False, True])
def test_damaged_shards_are_harvested_again_as_they_were(whole, tmp_path, gradients):
    for name, content in contents(whole / str(gradients)).items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "shard-00000.safetensors").write_bytes(b"")
    (tmp_path / "shard-00003.safetensors").unlink()
    last = sorted(tmp_path.glob("shard-*"))[-1]
    last.write_bytes(last.read_bytes()[::-1])
    found = verify(tmp_path)
    assert [damage.file for damage in found] == ["shard-00000.safetensors", "shard-00003.safetensors", last.name]
    assert repair(tmp_path) == found
    assert contents(tmp_path) == contents(whole / str(gradients))
    assert repair(tmp_path) == verify(tmp_path) == []


def test_a_shard_that_comes_out_otherwise_is_not_put_in_place(whole, tmp_path, monkeypatch):
    for name, content in contents(whole / "False").items():
        (tmp_path / name).write_bytes(content)
    shard = tmp_path / "shard-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    harvested = ActivationSource.batches
    monkeypatch.setattr(
        ActivationSource, "batches", lambda *a, **k: (b._replace(x=b.x * 1.01) for b in harvested(*a, **k))
    )
    before = contents(tmp_path)
    with pytest.raises(SaekitError, match="'shard-00002.safetensors' came out otherwise"):
        repair(tmp_path)
    assert contents(tmp_path) == before


def test_activations_of_others_cannot_be_harvested_again(tmp_path):
    ActivationCache.from_tensor(tmp_path / "c", torch.ones(2000, 2))
    (tmp_path / "c/shard-00001.safetensors").unlink()
    with pytest.raises(SaekitError, match="not harvested by `saekit cache`: write them again"):
        repair(tmp_path / "c")


def test_a_cache_without_places_is_repaired_by_counting_tokens(source, tmp_path):
    """As written by earlier versions, or by ``ActivationCache.write``."""
    cache = ActivationCache.write(
        tmp_path / "c", source.batches("train", 20_000), source.provenance("train"), dtype="bfloat16"
    )
    before = contents(tmp_path / "c")
    assert "batch" not in cache.shards[0]
    for number in (0, 13, 28):
        (tmp_path / f"c/shard-{number:05d}.safetensors").unlink()
    assert len(repair(tmp_path / "c")) == 3
    assert contents(tmp_path / "c") == before


def test_bad_tokens_are_left_out_the_same_with_and_without_a_break(source, tmp_path, monkeypatch):
    harvested = ActivationSource.batches

    def spoilt(self, part, tokens=None, *, bad=None, first=0, **options):
        found = harvested(self, part, None, first=first, **options)
        left = tokens
        for number, batch in enumerate(found, first):
            batch.x[number % 50 :: 97] = torch.nan
            (batch,) = bad.sift([batch], [self.hook], f"batch {number}")
            yield batch if left is None else batch.rows(0, left)
            left = None if left is None else left - len(batch.x)
            if left is not None and left <= 0:
                return

    monkeypatch.setattr(ActivationSource, "batches", spoilt)
    plan = HarvestPlan(**PLAN, skip_bad_tokens=True)
    harvest_cache(tmp_path / "whole", plan)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(MemoryError):
            harvest_cache(tmp_path / "c", plan)
    resume_cache(tmp_path / "c", {})
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")
    manifest = json.loads((tmp_path / "c/manifest.json").read_text())
    assert sum(shard["rows"] for shard in manifest["shards"]) == 9000
    assert 80 < manifest["skipped"] < 110
    with pytest.raises(SaekitError, match="--skip-bad-tokens"):
        harvest_cache(tmp_path / "strict", HarvestPlan(**PLAN))
    assert not (tmp_path / "strict.part").exists(), "nothing was harvested yet that could be kept"
    shard = tmp_path / "c/shard-00004.safetensors"
    shard.unlink()
    repair(tmp_path / "c")
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=20), rows=st.integers(1, 40), chosen=st.integers(0, 10**6)
)
def test_regrouped_rows_keep_their_order_and_tell_where_to_go_on(lengths, rows, chosen):
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    columns = [torch.arange(end - n, end) for n, end in zip(lengths, ends, strict=True)]
    batches = [ActivationBatch(c.float()[:, None], c, c, c) for c in columns]
    found = list(regrouped(batches, rows))
    order = [i for batch, _ in found for i in batch.tokens.tolist()]
    assert order == list(range(sum(lengths)))
    assert all(len(batch.tokens) == rows for batch, _ in found[:-1])
    if not found:
        return
    batch, (start, after) = found[chosen % len(found)]
    again, places = next(regrouped(batches[start.batch :], rows, start))
    assert (again.tokens.tolist(), places) == (batch.tokens.tolist(), (start, after))
    rest = list(regrouped(batches[after.batch :], rows, after))
    assert [b.tokens.tolist() for b, _ in rest] == [b.tokens.tolist() for b, _ in found[chosen % len(found) + 1 :]]
    assert [places for _, places in rest] == [places for _, places in found[chosen % len(found) + 1 :]]
    assert isinstance(after, Place)
