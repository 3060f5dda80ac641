"""Under torchrun: the same bytes as on one process, whatever becomes of the others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

_RUN = ["--batch-size", 256, "--width", 64, "--calibration-tokens", 1000, "--features-shown", 0, "--buffer", 2048]
_RUN += ["--context-length", 64, "--checkpoint-every", 10, "--variant", "topk", "--seed", 0]
_GRID = [*_RUN, "--k", "4,8,16"]


def command(processes, *arguments):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    return [str(each) for each in (sys.executable, *(launcher if processes > 1 else ()), "-m", "saekit", *arguments)]


def started(processes, *arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # torchrun's own choice, with which one process is compared
    return subprocess.Popen(command(processes, *arguments), env=environment, text=True, **options)


def done(processes, *arguments):
    process = started(processes, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def lines(err):
    return [line for line in err.splitlines() if line.startswith("saekit: ")]


def same(one, other):
    found = {path.relative_to(one): path.read_bytes() for path in one.glob("**/sae_weights.safetensors")}
    assert found
    return all((other / name).read_bytes() == content for name, content in found.items())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    home = tmp_path_factory.mktemp("alone") / "grid"
    code, _, err = done(1, "train", *_GRID, "--tokens", 20_000, "--eval-tokens", 0, "--out", home, "--quiet")
    assert code == 0, err
    return home


def test_runs_and_their_harvest_are_shared_out(alone, tmp_path):
    code, out, err = done(2, "train", *_GRID, "--tokens", 20_000, "--eval-tokens", 500, "--out", tmp_path / "grid")
    assert code == 0, err
    assert same(alone, tmp_path / "grid")
    assert out.count("dictionary: ") == 3, "the first process speaks for all"
    assert all((path / "eval.json").is_file() for path in (tmp_path / "grid").glob("k=*"))
    assert "3 runs" not in err
    code, _, err = done(2, "train", *_GRID, "--tokens", 20_000, "--out", tmp_path / "grid")
    assert code != 0
    assert len(lines(err)) == 1, err
    assert "holds something already" in lines(err)[0]


@pytest.mark.slow
def test_dictionaries_are_dealt_out_to_judge(alone, tmp_path):
    paths = sorted(str(path) for path in alone.glob("k=*"))
    for processes in (1, 2):
        done_here = done(processes, "eval", *paths, "--tokens", 500, "--out", tmp_path / f"{processes}.json", "--quiet")
        assert done_here[0] == 0, done_here[2]
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()
    code, _, err = done(2, "eval", *paths, "--tokens", 500, "--suite", "dark_matter")
    assert code != 0
    assert lines(err) == ["saekit: --html and --suite dark_matter run on one process, not under torchrun"]


def test_a_cache_that_several_write_is_that_of_one(tmp_path):
    flags = ["cache", "--tokens", 30_000, "--context-length", 64, "--quiet", "--out"]
    for processes in (1, 2):
        code, _, err = done(processes, *flags, tmp_path / str(processes))
        assert code == 0, err
    found = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("1", "2")]
    assert found[0] == found[1]


def test_a_command_for_one_process_says_so(tmp_path):
    code, _, err = done(2, "info", tmp_path)
    assert code != 0
    assert lines(err) == ["saekit: 'saekit info' runs on one process; torchrun is for saekit train, cache, eval"]


@pytest.mark.slow
@pytest.mark.parametrize(("killed", "then"), [(signal.SIGKILL, 1), (signal.SIGTERM, 3)])
def test_a_stopped_sweep_goes_on_with_any_number(alone, tmp_path, killed, then):
    """One process is killed, or torchrun is asked to stop: the others end within a minute, and nothing is lost."""
    home = tmp_path / "grid"
    flags = ["train", *_GRID, "--tokens", 20_000, "--eval-tokens", 0, "--out", home]
    process = started(2, *flags, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not list(home.glob("*/checkpoints/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.05)
    if killed == signal.SIGTERM:
        process.terminate()
    else:
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
        os.kill(int(children.stdout.split()[-1]), killed)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Exception in thread" not in err
    code, _, err = done(then, "train", "--out", home, "--resume", "--eval-tokens", 0, "--quiet")
    assert code == 0, err
    assert same(alone, home)
    assert not [path for path in home.glob("**/*") if path.suffix == ".part"]


@pytest.mark.slow
def test_a_stopped_sweep_over_hooks_goes_on(tmp_path):
    """Each process has a hook of its own, and the rows of both; what waits for the next fill is of its own alone."""
    hooks = "blocks.0.hook_resid_post,blocks.1.hook_resid_post"
    flags = [*_RUN, "--k", 4, "--hook", hooks, "--tokens", 40_000, "--eval-tokens", 0, "--quiet"]
    code, _, err = done(1, "train", *flags, "--out", tmp_path / "one")
    assert code == 0, err
    home = tmp_path / "two"
    process = started(2, "train", *flags, "--out", home, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 200
    while len(list(home.glob("*/checkpoints/*.safetensors"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Exception in thread" not in err
    code, _, err = done(2, "train", "--out", home, "--resume", "--eval-tokens", 0, "--quiet")
    assert code == 0, err
    assert same(tmp_path / "one", home)
