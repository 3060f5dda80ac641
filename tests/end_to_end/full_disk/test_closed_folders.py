"""Folders that take no files: refused before any work, and still read."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from disks import COMMANDS, SMALL, held, mounted, stop, told
from safetensors import SafetensorError

from saekit.files import WriteError, replace_file
from saekit.trainers import TrainConfig


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),  # 0.6 and later
        SafetensorError(  # 0.4 and 0.5
            'Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })'
        ),
    ],
    ids=["python", "safetensors", "old safetensors"],
)
def test_whoever_tells_of_a_full_disk_is_understood(error, tmp_path):
    (tmp_path / "file").write_text("older")

    def write(part):
        part.write_text("half")
        raise error

    with pytest.raises(WriteError, match=r"cannot write '.*file': .*No space left on device"):
        replace_file(tmp_path / "file", write)
    assert held(tmp_path) == {Path("file"): b"older"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_output_that_goes_to_a_full_disk(dictionaries, saekit_main, tmp_path, monkeypatch):
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        told(saekit_main("info", dictionaries / "plain", cwd=tmp_path), "No space left on device")


@pytest.fixture(params=["read-only", "/sys", "/proc"])
def closed(request, tmp_path):
    """A folder that takes no files, not even from root; a disk that is mounted read-only holds a cache and runs."""
    if request.param.startswith("/"):
        if not os.path.ismount(request.param):
            pytest.skip(f"{request.param} is no system of its own here")
        yield Path(request.param)
        return
    with mounted(tmp_path / "closed", "size=8m,ro") as folder:
        yield folder


@pytest.mark.parametrize("command", COMMANDS)
def test_folders_that_take_no_files_are_refused_early(
    command, closed, early, dictionaries, cache, saekit_main, tmp_path
):
    words = COMMANDS[command]
    for name, place in {"CLOSED": closed, "SAES": dictionaries, "CACHE": cache}.items():
        words = words.replace(name, str(place))
    told(saekit_main(*words.split(), cwd=tmp_path), str(closed))


@pytest.fixture
def archive(harvested, undisturbed, dictionaries, tmp_path):
    """A disk, mounted read-only, that holds a cache, a finished run, one that can be resumed, and a dictionary."""
    with mounted(tmp_path / "archive", "size=8m") as folder:
        shutil.copytree(harvested, folder / "cache")
        shutil.copytree(harvested, folder / "damaged")
        with (folder / "damaged/shard-00001.safetensors").open("rb+") as file:
            file.seek(-1, 2)
            file.write(b"\x01")
        for name in ("finished", "begun"):
            shutil.copytree(undisturbed, folder / name)
        shutil.rmtree(folder / "begun/sae")
        (folder / "begun/checkpoints/step-50.safetensors.part").write_text("left by a process that was killed")
        shutil.copytree(dictionaries / "plain", folder / "run/sae")
        (folder / "run/config.yaml").write_text(TrainConfig().to_yaml())
        (folder / "empty").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        yield folder


def test_what_is_read_only_can_be_read(archive, saekit_main, tmp_path):
    for words in (
        ["cache", "verify", archive / "cache", "--quiet"],
        ["info", archive / "cache"],
        ["convert", archive / "finished", tmp_path / "plain", "--lossy"],
        ["eval", archive / "finished", "--tokens", 256, "--out", tmp_path / "report.json", "--quiet"],
        ["train", "--cache", archive / "cache", "--out", tmp_path / "run", *SMALL],
    ):
        done = saekit_main(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "command",
    [
        "cache --out ARCHIVE/cache --overwrite",
        "cache --out ARCHIVE/empty",
        "cache repair ARCHIVE/damaged",
        "train --out ARCHIVE/begun --resume",
        "train --out ARCHIVE/finished --overwrite",
        "eval ARCHIVE/run --suite dark_matter",  # its figures would join the run's
        "convert ARCHIVE/finished ARCHIVE/finished/sae --overwrite",
    ],
)
def test_what_is_read_only_is_not_written_to(archive, early, saekit_main, tmp_path, command):
    before = held(archive)
    line = told(saekit_main(*command.replace("ARCHIVE", str(archive)).split(), cwd=tmp_path))
    assert str(archive) in line
    assert held(archive) == before


@pytest.mark.parametrize("options", ["size=8m", "size=8m,ro", "bind"])
def test_a_harvest_into_a_disk_of_its_own(options, harvest, harvested, tmp_path):
    """A cache is written beside its place, which for a whole disk is on another disk: told early, or done."""
    with mounted(tmp_path / "cache", options) as out, pytest.MonkeyPatch.context() as patch:
        if "ro" in options:
            patch.setattr("saekit.activations.resumable.open_source", lambda *_: stop("too late"))
        done = harvest(out)
        if done.returncode:
            assert "too late" not in told(done, f"'{out}")
            assert {path.name for path in tmp_path.iterdir()} <= {"cache", "other"}, "nothing was harvested in vain"
        else:
            assert held(out) == held(harvested)
