"""Two processes at one folder: the second is told, the first is unharmed."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import safetensors.torch
from disks import COMMANDS, PLAN, STEPS, TRAIN, check_same_dictionary, held, told

from saekit.activations.resumable import HarvestPlan, harvest_cache
from saekit.files import PART, locked
from saekit.trainers import TrainConfig, train

LOCKER = """
import sys
from contextlib import ExitStack
from pathlib import Path
from saekit.files import locked
with ExitStack() as stack:
    for line in sys.stdin:
        stack.enter_context(locked(Path(line.rstrip()), "busy"))
        print("held", flush=True)
"""


@contextmanager
def nobody():
    """Not root, whom no permission stops."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.name != "posix", reason="permissions are another matter there")
@pytest.mark.parametrize("command", ["cache", "train", "train, several", "eval", "convert", "convert, lossy"])
def test_permission_denied(command, early, dictionaries, saekit_main):
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(dictionaries, folder / "saes")
        (folder / "saes").chmod(0o755)
        for path in (folder / "saes").rglob("*"):
            path.chmod(0o755)
        (folder / "closed").mkdir(0o555)
        words = COMMANDS[command].replace("CLOSED", f"{folder}/closed").replace("SAES", f"{folder}/saes").split()
        stack.enter_context(nobody())
        told(saekit_main(*words, cwd=folder), f"{folder}/closed", "Permission denied")
        assert not [*(folder / "closed").iterdir()]


@pytest.mark.skipif(os.name != "posix", reason="permissions are another matter there")
def test_files_are_as_open_to_others_as_the_user_wants_them(harvested, undisturbed):
    mask = os.umask(0)
    os.umask(mask)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (*harvested.iterdir(), *undisturbed.rglob("*.*"))}
    assert modes == dict.fromkeys(modes, 0o666 & ~mask)


@pytest.fixture(scope="module")
def lock():
    """Lock a folder in another process."""
    with subprocess.Popen(
        [sys.executable, "-c", LOCKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def hold(folder):
            process.stdin.write(f"{folder}\n")
            process.stdin.flush()
            assert process.stdout.readline() == "held\n"

        yield hold
        process.stdin.close()


@pytest.mark.parametrize("more", [[], ["--resume"], ["--overwrite"]])
def test_where_another_process_harvests(more, lock, early, saekit_main, tmp_path, harvested):
    part = tmp_path / "cache.part"
    part.mkdir()
    (part / "harvest.jsonl").write_text("of the other process")
    (part / "shard-00000.safetensors.part").write_text("of the other process")
    lock(part)
    before = held(tmp_path)
    told(saekit_main("cache", "--out", tmp_path / "cache", *more, cwd=tmp_path), "another process", str(part))
    assert held(tmp_path) == before


def test_where_another_process_trains(lock, early, cache, undisturbed, saekit_main, tmp_path):
    run = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    (run / "sae/cfg.json").unlink()
    for name in ("metrics.jsonl", "statistics.safetensors", "sae/cfg.json", "checkpoints/step-60.safetensors"):
        (run / (name + PART)).write_text("of the other process")
    lock(run)
    before = held(tmp_path)
    for more in (["--resume"], ["--resume", "--skip-bad-tokens"], ["--cache", cache, "--overwrite", *TRAIN]):
        told(saekit_main("train", "--out", run, *more, cwd=tmp_path), "another process is training", f"'{run}'")
        assert held(tmp_path) == before, "not even what is unfinished is touched"


@contextmanager
def paused(where, monkeypatch, work):
    """Work in a thread, halted as it has written a file and not yet put it in place; then it goes on to its end."""
    written, go_on, failed = threading.Event(), threading.Event(), []
    plain = safetensors.torch.save_file

    def save_file(*arguments):
        plain(*arguments)
        written.set()
        assert go_on.wait(600)

    def run():
        try:
            work()
        except BaseException as error:
            failed.append(error)
            written.set()

    with monkeypatch.context() as patch:
        patch.setattr(where, save_file)
        thread = threading.Thread(target=run)
        thread.start()
        try:
            assert written.wait(600)
            yield
        finally:
            go_on.set()
            thread.join()
    assert not failed, failed


def test_the_first_of_two_harvests_is_unharmed(harvest, harvested, text, tmp_path, monkeypatch):
    out, plan = tmp_path / "cache", HarvestPlan(dataset=str(text), **PLAN)
    with paused("saekit.activations.shards.save_file", monkeypatch, lambda: harvest_cache(out, plan)):
        for more in ([], ["--resume"], ["--overwrite"]):
            told(harvest(out, *more), "another process is harvesting")
    assert held(out) == held(harvested)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize("where", ["trainers.checkpoint", "trainers.trainer", "formats.tensor_files"])
def test_the_first_of_two_trainings_is_unharmed(where, cache, undisturbed, saekit_main, tmp_path, monkeypatch):
    out = tmp_path / "run"
    config = TrainConfig(cache=cache, out=out, log_every=1, checkpoint_every=10, **STEPS)
    with paused(f"saekit.{where}.save_file", monkeypatch, lambda: train(config, quiet=True)):
        for more in (["--resume"], ["--overwrite"]):
            done = saekit_main("train", "--cache", cache, "--out", out, *TRAIN, *more, cwd=tmp_path)
            told(done, "another process is training")
    check_same_dictionary(out, undisturbed)
    assert not [*out.rglob("*" + PART)]


def test_a_lock_goes_with_its_process(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", LOCKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        process.stdin.write(f"{tmp_path}\n")
        process.stdin.flush()
        assert process.stdout.readline() == "held\n"
        process.kill()
    with locked(tmp_path, "busy"):
        pass
