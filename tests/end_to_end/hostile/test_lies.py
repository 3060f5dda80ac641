"""Headers, manifests, numbers and small files that grow: refused before any memory is taken."""

from __future__ import annotations

import json
import resource
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hostile import ends, vouch_for, write_manifest

import saekit
from saekit import SaekitError
from saekit.activations import ActivationCache
from saekit.activations.repair import verify
from saekit.seal import BLANK, stamp, stamp_file
from saekit.trainers import TrainConfig, train
from saekit.trainers.checkpoint import checkpoints


@contextmanager
def little_memory(extra=1 << 30):
    """Let the process grow by no more than this many bytes while it is entered, whether it uses them or not."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:  # not Linux
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_little_memory_is_little():
    if sys.platform != "linux":
        pytest.skip("only Linux limits it")
    with little_memory(), pytest.raises((RuntimeError, MemoryError)):
        torch.empty(1 << 32)


HUGE = (  # of a tensor in a header: shape, and where its data lies
    ([10**13 // 4], [0, 10**13]),
    ([2**40, 2**40], [0, 2**82]),
    ([2**62], [0, 2**64]),
    ([2**63, 2], [0, 0]),
    ([-4, 16], [0, 384]),
    ([-6, -16], [0, 384]),
    ([6, -16], [0, -384]),
    ([6, 16], [-384, 0]),
    ([6, 16], [2**63, 2**63 + 384]),
    ([6, 16], [384, 0]),
    ([6, 16, 0], [0, 0]),
    ([6, 2**31, 2**31], [0, 384]),
)


def with_header(path, change, metadata=None):
    """A safetensors file with a changed header; the data stay."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    if metadata is not None:
        header["__metadata__"] = metadata
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.parametrize(("shape", "offsets"), HUGE)
def test_a_header_that_lies(shape, offsets, place):
    """Of weights, of a shard that the manifest vouches for, and of a checkpoint with a good seal."""

    def lie(name):
        return lambda header: header[name].update(shape=shape, data_offsets=offsets)

    with little_memory():
        with_header(place / "sae/sae_weights.safetensors", lie("W_enc"), {})
        with pytest.raises(SaekitError, match=r"sae_weights.safetensors"):
            saekit.load(place / "sae")

        shard = place / "cache/shard-00000.safetensors"
        with_header(shard, lie("activations"))
        vouch_for(place / "cache", 0)
        cache = ActivationCache.open(place / "cache")
        with pytest.raises(SaekitError, match=r"shard-00000.safetensors"):
            cache.read(0, 10)

        for path in checkpoints(place / "stopped/checkpoints").values():
            with_header(path, lie("sae.W_enc"), {"saekit": json.dumps({"seal": BLANK, "format": 3, "state": {}})})
            stamp_file(path)
        with pytest.raises(SaekitError, match="every checkpoint is damaged"):
            train(TrainConfig(out=place / "stopped"), resume=True, quiet=True)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 10**13, 10**8 + 1, 10**8, 0, 1, 7])
def test_the_length_of_a_header_that_lies(length, place):
    with little_memory():
        for name in ("sae/sae_weights.safetensors", "cache/shard-00000.safetensors"):
            content = (place / name).read_bytes()
            (place / name).write_bytes(length.to_bytes(8, "little") + content[8:])
        with pytest.raises(SaekitError, match=r"sae_weights.safetensors"):
            saekit.load(place / "sae")
        vouch_for(place / "cache", 0)
        with pytest.raises(SaekitError, match=r"shard-00000.safetensors"):
            ActivationCache.open(place / "cache").read(0, 10)


@pytest.mark.parametrize("rows", [401, 2**30, 2**41, 2**47])
def test_a_manifest_that_tells_of_rows_that_are_not_there(rows, place, saekit_main):
    vouch_for(place / "cache", 0, rows=rows)
    with little_memory():
        command = "train --cache cache --out new --tokens 640 --batch-size 64 --width 16 --k 2 --quiet"
        done = saekit_main(*command.split(), cwd=place)
        ends(done, 2)
        assert "not enough memory" not in done.stderr
        assert "shard-00000.safetensors" in done.stderr or "manifest.json" in done.stderr


@pytest.mark.parametrize(
    "name",
    [
        *("../x", "/etc/passwd", "..", ".", "", "a/shard-00000.safetensors", "shard-00000.safetensors/", "~/x"),
        *(
            "../cache/shard-00000.safetensors",
            "shard-00000.safetensors\0",
            "shard-00000.safetensors\n",
            "shard-1.safetensors",
        ),
        *("shard-00000.safetensors/../../x", "C:\\x", "\\\\host\\x", None, 5, ["a"]),
    ],
)
def test_a_manifest_that_names_other_files(name, place):
    (place / "x").write_bytes((place / "cache/shard-00000.safetensors").read_bytes())
    manifest = json.loads((place / "cache/manifest.json").read_text())
    manifest["shards"][0]["file"] = name
    write_manifest(place / "cache", manifest)
    for reads in (ActivationCache.open, verify):
        with pytest.raises(SaekitError, match=r"manifest.json' is damaged: shards.0.file"):
            reads(place / "cache")


@pytest.mark.parametrize("size", [2**20, 2**30, 2**31 - 1])
def test_a_config_that_asks_for_memory(size, place):
    cfg = json.loads((place / "sae/cfg.json").read_text())
    with little_memory():
        for change in ({"d_in": size}, {"d_sae": size}, {"d_in": size, "d_sae": size}):
            (place / "sae/cfg.json").write_text(json.dumps({**cfg, **change}))
            with pytest.raises(SaekitError, match=r"sae_weights.safetensors' holds"):
                saekit.load(place / "sae")


NUMBERS = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-1e999",
    "1" * 1_000_000,
    "-" + "9" * 5000,
    "0.5",
    "-1",
    "true",
    '"6"',
)


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number[:12])
def test_odd_numbers(number, place):
    """As they are in JSON, in place of each number that matters."""
    for key in ("d_in", "d_sae", "k", "dtype", "architecture"):
        cfg = {"architecture": "topk", "d_in": 6, "d_sae": 16, "dtype": "float32", "k": 2, key: "HERE"}
        (place / "sae/cfg.json").write_text(json.dumps(cfg).replace('"HERE"', number))
        with pytest.raises(SaekitError, match="cfg.json'|unknown architecture"):
            saekit.load(place / "sae")
    manifest = json.loads((place / "cache/manifest.json").read_text())
    for facts in (manifest, *manifest["shards"][:1]):
        for key, before in facts.items():
            if type(before) is int:
                facts[key] = "HERE"
                text = json.dumps({**manifest, "seal": BLANK}).replace('"HERE"', number)
                (place / "cache/manifest.json").write_bytes(stamp(text.encode()))
                facts[key] = before
                with pytest.raises(SaekitError, match="manifest.json'"):
                    ActivationCache.open(place / "cache")
    (place / "new.yaml").write_text(f"k: {number}\nlr: {number}\n")
    if number not in ('"6"', "true"):
        with pytest.raises(SaekitError):
            TrainConfig.from_yaml(place / "new.yaml")


BOMBS = {
    "brackets": "[" * (1 << 20),
    "braces": '{"a":' * (1 << 18),
    "some brackets": "[" * 60_000,
    "closed brackets": "[" * 30_000 + "]" * 30_000,
    "digits": "9" * (1 << 20),
    "a long name": '"' + "a" * (1 << 20),
    "aliases": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "an alias of itself": "a: &a [*a]",
    "merged": "a: &a {x: 1}\n" + "".join(f"b{i}: &b{i} {{<<: [*a, *a]}}\n" for i in range(9)),
    "NUL": "\0" * (1 << 16),
    "spaces": " " * (1 << 22),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_small_files_that_grow(bomb, place):
    text = BOMBS[bomb]
    with little_memory():
        for whole in (text, f"k: {text}", f"metadata: {text}"):
            (place / "new.yaml").write_text(whole)
            with pytest.raises(SaekitError, match="aliases" if whole == text and "*a" in text else None):
                TrainConfig.from_yaml(place / "new.yaml")
        for whole in (text, f'{{"architecture": "topk", "metadata": {text}'):
            (place / "sae/cfg.json").write_text(whole)
            with pytest.raises(SaekitError, match="cfg.json'"):
                saekit.load(place / "sae")
            (place / "cache/manifest.json").write_text(whole)
            with pytest.raises(SaekitError, match="manifest.json'"):
                ActivationCache.open(place / "cache")


def test_deep_metadata_is_refused_or_read(place):
    for depth in (10, 100, 100_000):
        deep = "[" * depth + "]" * depth
        cfg = json.loads((place / "sae/cfg.json").read_text())
        (place / "sae/cfg.json").write_text(json.dumps({**cfg, "metadata": {"a": "HERE"}}).replace('"HERE"', deep))
        if depth < 500:
            assert saekit.load(place / "sae").cfg.metadata["a"]
        else:
            with pytest.raises(SaekitError, match="cfg.json'"):
                saekit.load(place / "sae")
        (place / "sae/cfg.json").write_text(json.dumps(cfg))
