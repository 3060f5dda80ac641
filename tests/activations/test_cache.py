"""Caches: what is written is read again, the provenance is kept, damage is named."""

from __future__ import annotations

import json

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from saekit import SaekitError
from saekit.activations import ActivationBatch, ActivationCache

PARTS = ("train", "calibration", "heldout")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_tensor_comes_back(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr("saekit.activations.cache.SHARD_ROWS", 64)
    x = torch.randn(300, 5)
    written = ActivationCache.from_tensor(tmp_path / "c", x, dtype=dtype)
    cache = ActivationCache.open(tmp_path / "c")
    assert len(cache) == len(written) == 300
    assert (cache.d_in, cache.dtype, len(cache.shards)) == (5, dtype, 5)
    assert torch.equal(cache.read(0, 300).x, x.to(getattr(torch, dtype)))
    assert torch.equal(cache.read(60, 200).x, x[60:200].to(getattr(torch, dtype)))
    assert cache.read(60, 70).documents.tolist() == list(range(60, 70)), "blocks of one row, as there are few"


def test_the_parts_of_a_cache_are_disjoint_and_whole(tmp_path):
    cache = ActivationCache.from_tensor(tmp_path / "c", torch.arange(1000.0)[:, None])
    rows = [torch.cat([b.x for b in cache.batches(part, 16)]).flatten().tolist() for part in PARTS]
    assert [len(r) for r in rows] == [cache.count(part) for part in PARTS]
    assert len(rows[1]), len(rows[2]) == (pytest.approx(50, abs=2), pytest.approx(50, abs=2))
    assert sorted(sum(rows, [])) == list(range(1000))
    assert [len(b.x) for b in cache.batches("train", 16)][:-1] == [16] * (len(rows[0]) // 16)


def test_a_harvest_is_what_the_source_gives(tmp_path, source):
    batches = list(source.batches("train", 3000))
    ActivationCache.write(tmp_path / "c", iter(batches), source.provenance("train"), dtype="float32")
    cache = ActivationCache.open(tmp_path / "c")
    assert len(cache) == 3000
    everything = cache.read(0, 3000)
    whole = ActivationBatch.concatenate(batches)
    for name in ("x", "tokens", "documents", "positions"):
        assert torch.equal(getattr(everything, name), getattr(whole, name).to(getattr(everything, name).dtype))
    assert everything.gradients is None
    provenance = json.loads((tmp_path / "c/manifest.json").read_text())["provenance"]
    assert provenance["model"] == "embedded"
    assert provenance["hook"] == "blocks.1.hook_resid_post"
    for fact in ("revision", "dataset_fingerprint", "tokenizer", "context_length", "mask", "part", "prepend_bos"):
        assert provenance[fact], fact


def test_nothing_is_overwritten_unasked(tmp_path):
    ActivationCache.from_tensor(tmp_path / "c", torch.ones(10, 2))
    with pytest.raises(SaekitError, match="holds something"):
        ActivationCache.from_tensor(tmp_path / "c", torch.zeros(10, 2))
    assert ActivationCache.open(tmp_path / "c").read(0, 10).x.sum() == 20
    ActivationCache.from_tensor(tmp_path / "c", torch.zeros(4, 2), overwrite=True)
    assert len(ActivationCache.open(tmp_path / "c")) == 4


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(3), "matrix"),
        (torch.ones(3, 2, dtype=torch.int64), "matrix"),
        (torch.ones(0, 2), "no activations"),
        (torch.tensor([[1.0], [float("nan")]]), "NaN or inf .* row 1"),
    ],
)
def test_tensors_that_are_no_activations_are_refused(tmp_path, x, message):
    with pytest.raises(SaekitError, match=message):
        ActivationCache.from_tensor(tmp_path / "c", x)


def test_what_float16_cannot_hold_is_refused(tmp_path):
    with pytest.raises(SaekitError, match="float16's range"):
        ActivationCache.from_tensor(tmp_path / "c", torch.tensor([[1e6]]), dtype="float16")


def test_damage_is_named(tmp_path):
    cache = ActivationCache.from_tensor(tmp_path / "c", torch.ones(100, 2))
    shard = tmp_path / "c" / cache.shards[0]["file"]
    content = shard.read_bytes()
    shard.write_bytes(content[:-8])
    with pytest.raises(SaekitError, match="shard-00000.*missing or damaged"):
        ActivationCache.open(tmp_path / "c")
    shard.write_bytes(content)
    manifest = tmp_path / "c/manifest.json"
    manifest.write_text(manifest.read_text()[:-20])
    with pytest.raises(SaekitError, match="manifest.json' is damaged"):
        ActivationCache.open(tmp_path / "c")
    manifest.unlink()
    with pytest.raises(SaekitError, match="no manifest.json"):
        ActivationCache.open(tmp_path / "c")


def test_a_failed_rewrite_leaves_the_old_cache(tmp_path):
    ActivationCache.from_tensor(tmp_path / "c", torch.ones(10, 2))
    with pytest.raises(SaekitError, match="NaN"):
        ActivationCache.from_tensor(tmp_path / "c", torch.full((10, 2), float("nan")), overwrite=True)
    assert ActivationCache.open(tmp_path / "c").read(0, 10).x.sum() == 20


def test_a_users_folder_is_not_taken_for_an_unfinished_cache(tmp_path):
    (tmp_path / "c.part").mkdir()
    (tmp_path / "c.part/mine.txt").write_text("precious")
    with pytest.raises(SaekitError, match=r"holds 'mine.txt'"):
        ActivationCache.from_tensor(tmp_path / "c", torch.ones(10, 2))
    assert (tmp_path / "c.part/mine.txt").read_text() == "precious"


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(SaekitError, match="NaN"):
        ActivationCache.from_tensor(tmp_path / "new", torch.full((10, 2), float("nan")))
    with pytest.raises(SaekitError, match="no activation cache"):
        ActivationCache.open(tmp_path / "new")
    assert list(tmp_path.iterdir()) == [], "what cannot go on is not left"


def test_the_checksum_of_a_shard_is_that_of_its_bytes(tmp_path):
    cache = ActivationCache.from_tensor(tmp_path / "c", torch.randn(100, 3))
    (shard,) = cache.shards
    content = (tmp_path / "c" / shard["file"]).read_bytes()
    assert shard["xxh3_128"] == xxhash.xxh3_128(content).hexdigest()
    assert shard["bytes"] == len(content)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_any_rows_are_read_as_safetensors_reads_them(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("saekit.activations.cache.SHARD_ROWS", 40)
    x, gradients = torch.randn(100, 3), torch.randn(100, 3)
    cache = ActivationCache.from_tensor(tmp_path / "c", x, gradients=gradients, dtype=dtype)
    whole = [load_file(tmp_path / "c" / shard["file"]) for shard in cache.shards]
    for low, high in ((0, 100), (5, 6), (39, 81), (80, 100)):
        found = cache.read(low, high, gradients=True)
        for name, column in (("activations", found.x), ("documents", found.documents), ("gradients", found.gradients)):
            assert torch.equal(column, torch.cat([part[name] for part in whole])[low:high])


def test_a_shard_whose_header_lies_is_named(tmp_path):
    cache = ActivationCache.from_tensor(tmp_path / "c", torch.randn(100, 2))
    shard = tmp_path / "c" / cache.shards[0]["file"]
    content = shard.read_bytes()
    huge = b'{"activations":{"dtype":"F32","shape":[100,1000000000000],"data_offsets":[0,400000000000000]}}'
    shard.write_bytes(len(huge).to_bytes(8, "little") + huge + b"x" * 100)
    with pytest.raises(SaekitError, match="shard-00000.safetensors' .* is missing or damaged"):
        cache.read(50, 60)
    for old, new in (
        (b"[100,2]", b"[10,-2]"),
        (b"[100,2]", b"[900,2]"),
        (b"F32", b"F99"),
        (b'{"', b"{{"),
        (b"[100,2]", b"[-10,2]"),
    ):
        assert old in content
        shard.write_bytes(content.replace(old, new, 1))
        with pytest.raises(SaekitError, match="shard-00000.safetensors' .* is missing or damaged"):
            cache.read(50, 60)
