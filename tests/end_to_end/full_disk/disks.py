"""Disks of a limited size, real and simulated, and what the tests ask of commands."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shlex
import shutil
import subprocess
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
from safetensors import SafetensorError

from saekit.files import PART, WriteError

SAVES = ("activations.shards", "trainers.checkpoint", "trainers.trainer", "formats.tensor_files")  # have save_file


MODEL = "saekit.activations.source.load_model"


SHARDS = "saekit.activations.cache.SHARD_ROWS"


SPACE = 8 << 20


PLAN = {"tokens": 2250, "context_length": 16}


TRAIN = shlex.split(
    "--width 512 --k 4 --batch-size 128 --tokens 6400 --buffer 1024 --lr 3e-3 --device cpu --log-every 1 "
    "--checkpoint-every 10 --eval-tokens 256 --quiet"
)


def train_with(option, value):
    """The flags of TRAIN with another value of one."""
    at = TRAIN.index(option) + 1
    return [*TRAIN[:at], str(value), *TRAIN[at + 1 :]]


STEPS = {"width": 512, "k": 4, "batch_size": 128, "tokens": 6400, "buffer": 1024, "lr": 3e-3, "device": "cpu"}


SMALL = shlex.split("--tokens 256 --batch-size 64 --width 64 --k 4 --buffer 256 --eval-tokens 0 --device cpu --quiet")


WORDS = shlex.split("def return self import for in if else None True class value index list name path file")


@contextmanager
def mounted(folder, options):
    """An empty disk of its own at a folder, or ("bind") another folder; skipped where the system refuses."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "saekit-test", str(folder)]
    if options == "bind":
        (other := folder.parent / "other").mkdir()
        command = ["mount", "--bind", str(other), str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this system does not let a disk be mounted")
    try:
        yield folder
    finally:
        if subprocess.run(["umount", str(folder)], capture_output=True).returncode:
            subprocess.run(["umount", "-l", str(folder)], check=True)


class Disk:
    """A small disk that a test fills and empties, at once or when a certain file is about to be written."""

    def __init__(self, folder, simulated):
        self.folder, self.simulated = folder, simulated
        self.balloon = folder / "balloon"
        self.opened = Counter()
        self.planned = None

    def free(self):
        if not self.simulated:
            return shutil.disk_usage(self.folder).free
        used = 0
        for place, _, names in os.walk(self.folder):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    used += os.stat(os.path.join(place, name)).st_size
        return max(0, SPACE - used)

    def fill(self, left=0):
        """Let something else take all but so many bytes."""
        if self.simulated:
            self.balloon.touch()
            os.truncate(self.balloon, self.balloon.stat().st_size + self.free() - left)
            return
        number = os.open(self.balloon, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        with contextlib.suppress(OSError):
            while (spare := self.free() - left) >= 4096:
                os.write(number, bytes(min(spare, 1 << 20)))
        os.close(number)

    def empty(self):
        self.balloon.unlink(missing_ok=True)

    def fill_before(self, name, *, left=0, time=1):
        """Fill it just before a file of that name is opened for writing for the n-th time."""
        self.planned = (name, time, left)

    def opening(self, path):
        name = Path(path).name.removesuffix(PART)
        self.opened[name] += 1
        if self.planned is not None and self.planned[:2] == (name, self.opened[name]):
            self.fill(self.planned[2])
            self.before = {p: p.read_bytes() for p in self.folder.rglob("step-*.safetensors")}


class CutOff(io.FileIO):
    """A file on a simulated disk."""

    def __init__(self, disk, path, mode):
        super().__init__(str(path), mode)
        self.disk = disk

    def write(self, data):
        fits = min(len(data), self.disk.free())
        if not fits:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(bytes(data)[:fits])


def saving(disk):
    def save_file(tensors, path, metadata=None):
        disk.opening(path)
        whole = safetensors.torch.save(tensors, metadata) if disk.simulated else b""
        if len(whole) > (free := disk.free()):
            with io.FileIO(str(path), "w") as file:
                file.write(whole[:free])
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        safetensors.torch.save_file(tensors, path, metadata)

    return save_file


def opening(disk):
    plain = Path.open

    def open_(path, mode="r", *args, **options):
        if disk.folder not in path.parents or not set(mode) & set("wax"):
            return plain(path, mode, *args, **options)
        disk.opening(path)
        if not disk.simulated:
            return plain(path, mode, *args, **options)
        file = io.BufferedWriter(CutOff(disk, path, mode.strip("bt")))
        return file if "b" in mode else io.TextIOWrapper(file, encoding="utf-8")

    return open_


def held(folder):
    """Each file's bytes, and the folders."""
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def told(done, *words):
    """The one line that says what is wrong."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("saekit: ")
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


def stop(message):
    raise WriteError(message)


def check_same_dictionary(out, undisturbed):
    for name in ("sae/sae_weights.safetensors", "sae/cfg.json", "statistics.safetensors"):
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes(), name


COMMANDS = {
    "cache": "cache --out CLOSED/new --tokens 1000",
    "cache deep": "cache --out CLOSED/some/new --tokens 1000",
    "cache, resumed": "cache --out CLOSED/new --resume",
    "train": "train --out CLOSED/new",
    "train on a cache": "train --cache CACHE --out CLOSED/some/new",
    "train, overwriting": "train --out CLOSED/new --overwrite",
    "train, resumed": "train --out CLOSED/new --resume",
    "train, several": "train --hook blocks.0.hook_resid_post --hook blocks.1.hook_resid_post --out CLOSED/new",
    "eval": "eval SAES/plain --out CLOSED/report.json",
    "eval, figures": "eval SAES/plain SAES/scaled --suite dark_matter --figures CLOSED/figures",
    "eval, dark matter": "eval SAES/plain --suite dark_matter --out CLOSED/report.json",
    "convert": "convert SAES/plain CLOSED/new",
    "convert, lossy": "convert SAES/scaled CLOSED/new --lossy",
}
