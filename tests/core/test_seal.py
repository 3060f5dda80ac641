"""Seals: whichever byte changes is noticed, and other programs read a sealed file as ever."""

from __future__ import annotations

import json

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import saekit
from saekit import SAEConfig, SaekitError, SparseAutoencoder
from saekit.activations import ActivationCache
from saekit.activations.manifest import Manifest
from saekit.activations.resumable import _append, _read_journal
from saekit.activations.staging import JOURNAL
from saekit.seal import BLANK, file_unbroken, stamp, stamp_file, unbroken
from saekit.trainers.checkpoint import load_checkpoints, save_checkpoint

NAME = b"saekit-seal:"
TENSORS = {"a": torch.arange(300.0), "b": torch.ones(3, 4, dtype=torch.int64)}


def sealed_text(length=500):
    return stamp(json.dumps({"seal": BLANK, "rest": "x" * length}).encode())


def sealed_file(path, tensors=TENSORS):
    save_file(tensors, path, {"saekit": BLANK})
    stamp_file(path)
    return path.read_bytes()


def others(content, *changes):
    """The content with one byte changed, each in turn: by one bit, to the other case, by all bits."""
    for place in range(len(content)):
        for change in changes or (1, 0x20, 0xFF):
            yield place, content[:place] + bytes([content[place] ^ change]) + content[place + 1 :]


@pytest.mark.parametrize("length", [0, 1, 500, 5000])
def test_any_changed_byte_of_a_text_is_noticed(length):
    content = sealed_text(length)
    assert unbroken(content) is True
    start = content.index(NAME)
    for place, other in others(content):
        found = unbroken(other)
        assert not found, place
        in_seal = start <= place < start + len(BLANK)
        assert found is False or in_seal, "only a change of the seal itself can hide it"


@pytest.mark.parametrize("block", [300, 1 << 22])
def test_any_changed_byte_of_a_file_is_noticed(tmp_path, monkeypatch, block):
    """Whether it lies in the first block that is read, in a later one, or at their border."""
    monkeypatch.setattr("saekit.seal._BLOCK", block)
    path = tmp_path / "x.safetensors"
    content = sealed_file(path)
    assert len(content) > 3 * 300
    assert file_unbroken(path) is True
    for place, other in others(content, 1):
        path.write_bytes(other)
        assert not file_unbroken(path), place
        assert not unbroken(other), place


def test_the_size_of_blocks_changes_nothing(tmp_path, monkeypatch):
    content = sealed_file(tmp_path / "a")
    for block in (200, 256, 1000, len(content), len(content) + 1):
        monkeypatch.setattr("saekit.seal._BLOCK", block)
        assert sealed_file(tmp_path / "b") == content
        assert file_unbroken(tmp_path / "a") is True


def test_missing_and_added_ends_are_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    content = sealed_file(path)
    for other in (*(content[:length] for length in range(0, len(content), 3)), content + b"\0", content + content):
        path.write_bytes(other)
        assert not file_unbroken(path)
        assert not unbroken(other)


def test_what_has_no_seal_is_told_from_what_is_damaged(tmp_path):
    for content in (b"", b"{}", BLANK.encode()[:-1], b"saekit-seal:" + b"g" * 32, b" " * 5000 + sealed_text()):
        (tmp_path / "x").write_bytes(content)
        assert unbroken(content) is None
        assert file_unbroken(tmp_path / "x") is None
    assert unbroken(BLANK.encode()) is False, "what was never stamped"


def test_a_seal_is_the_checksum_of_the_rest(tmp_path):
    """As the description says, so that other programs can tell it."""
    for content in (sealed_text(), sealed_file(tmp_path / "x")):
        start = content.index(NAME) + len(NAME)
        blank = content[:start] + b"0" * 32 + content[start + 32 :]
        assert content[start : start + 32].decode() == xxhash.xxh3_128(blank).hexdigest()
        assert stamp(blank) == content
        assert stamp(content) == content, "stamped again it is the same"


def test_the_same_content_has_the_same_seal(tmp_path):
    assert sealed_text() == sealed_text()
    assert sealed_file(tmp_path / "a") == sealed_file(tmp_path / "b")
    assert sealed_text(500) != sealed_text(501)
    assert len({sealed_text(n).split(b'"')[3] for n in range(100)}) == 100


def test_the_first_of_two_seals_counts():
    """A text that holds what looks like another seal is sealed like any other."""
    content = stamp(json.dumps({"seal": BLANK, "rest": BLANK, "more": "saekit-seal:" + "a" * 32}).encode())
    assert unbroken(content) is True
    assert json.loads(content)["rest"] == BLANK
    assert not any(unbroken(other) for _, other in others(content))


def test_other_programs_read_sealed_files(tmp_path):
    assert json.loads(sealed_text())["rest"] == "x" * 500
    assert json.loads(sealed_text())["seal"].startswith("saekit-seal:")
    path = tmp_path / "x.safetensors"
    sealed_file(path)
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["saekit"].startswith("saekit-seal:")


def manifest(folder):
    ActivationCache.from_tensor(folder / "cache", torch.ones(10, 2))
    return folder / "cache/manifest.json", lambda: Manifest.read(folder / "cache")


def checkpoint(folder):
    def read():
        found = load_checkpoints([folder], torch.device("cpu"))
        return found[1][0]

    return save_checkpoint(folder, 5, {"a": torch.ones(3), "b": 1.5}), read


def weights(folder):
    SparseAutoencoder(SAEConfig(3, 4, "standard")).save(folder / "sae")
    return folder / "sae/sae_weights.safetensors", lambda: saekit.load(folder / "sae")


def journal(folder):
    """Of a harvest that has written two shards."""
    _append(folder, {"plan": {"tokens": 5}, "provenance": {}, "d_in": 2})
    for number in range(2):
        name = f"shard-0000{number}.safetensors"
        (folder / name).write_bytes(b"abcde")
        facts = {"file": name, "rows": 3, "bytes": 5, "xxh3_128": xxhash.xxh3_128(b"abcde").hexdigest()}
        _append(folder, {"shard": facts, "batch": number, "row": 0, "skipped": 0})
    return folder / JOURNAL, lambda: _read_journal(folder, "cache", lambda line: None)


@pytest.mark.parametrize("made", [manifest, checkpoint, weights, journal])
def test_a_file_whose_seal_is_no_longer_one_is_damaged(tmp_path, made):
    """Each place of the seal in each kind of file that has one; such files are still good JSON or safetensors."""
    path, read = made(tmp_path)
    read()
    content = path.read_bytes()
    start, accepted = content.index(NAME), []
    for place in range(start, start + len(BLANK)):
        path.write_bytes(content[:place] + b"~" + content[place + 1 :])
        assert not unbroken(path.read_bytes())
        try:
            read()
            accepted.append(place - start)
        except SaekitError as error:
            message = str(error)
            assert path.name in message
            assert "damaged" in message
    assert not accepted


def test_a_later_line_of_a_journal_without_seal_ends_it(tmp_path):
    path, read = journal(tmp_path)
    assert len(read()[1]) == 2
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1] + lines[2].replace(b"saekit-seal", b"saekit_seal"))
    assert len(read()[1]) == 1
    assert path.read_bytes() == lines[0] + lines[1]
