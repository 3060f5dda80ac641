"""The guard: no library that saekit calls installs, upgrades or downloads code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from contextlib import suppress

import pytest

from saekit import SaekitError
from saekit.errors import SaekitWarning
from saekit.no_installs import installs, no_installs

PYTHON = sys.executable


@pytest.mark.parametrize(
    "command",
    [
        ["pip", "install", "x"],
        ["/opt/bin/pip3.11", "download", "x"],
        [PYTHON, "-m", "pip", "install", "torchvision", "-q"],
        [PYTHON, "-W", "ignore", "-c", "import runpy; sys.argv[1:] = ['install', 'x']; runpy.run_module('pip')"],
        [PYTHON, "-c", "__import__('pip').main(['install', 'x'])"],
        [PYTHON, "-m", "ensurepip", "--upgrade"],
        ["uv", "pip", "install", "torchvision", "-q"],
        ["uvx", "ruff"],
        ["conda", "create", "-n", "x"],
        ["git", "clone", "https://example.org/x"],
        ["sh", "-c", "cd /tmp && curl https://example.org/x"],
        "uv pip install x; true",
    ],
)
def test_what_installs_is_told_from_what_does_not(command):
    assert installs(command)


@pytest.mark.parametrize(
    "command",
    [
        ["pip", "list"],
        ["git", "rev-parse", "HEAD"],
        ["gcc", "-I/home/me/.local/share/uv/python/install/include", "-c", "x.c"],
        ["/home/me/uv/bin/python", "-c", "print(1)"],
        ["nvidia-smi", "--query"],
        "uname -p",
        ["ldconfig", "-p"],
        [],
    ],
)
def test_other_programs_are_let_be(command):
    assert not installs(command)


COMMAND = ["no-such-program", "pip", "install", "x"]  # which could not run either
WAYS = {
    "subprocess": lambda: subprocess.run(COMMAND),
    "shell": lambda: subprocess.run("no-such-program pip install x", shell=True),
    "os.system": lambda: os.system("no-such-program pip install x"),
    "posix_spawn": lambda: os.posix_spawnp("no-such-program", COMMAND, os.environ),
    "exec": lambda: os.execvp("no-such-program", COMMAND),
}


@pytest.mark.parametrize("way", WAYS)
def test_it_is_refused_however_it_is_started(way):
    with pytest.raises(SaekitError) as told, no_installs():
        WAYS[way]()
    assert re.search(r"refused: .*no-such-program pip install x'?$", str(told.value))
    assert "\n" not in str(told.value)


def call_a_library(fails):
    """It tries to install something, and fails without it or goes on."""
    with no_installs():
        with suppress(SaekitError):
            subprocess.check_call(COMMAND)
        if fails:
            raise ImportError("torchvision is missing")


def test_a_library_that_goes_on_without_it_is_warned_of():
    with pytest.warns(SaekitWarning, match=r"install or download code .*; refused: no-such-program pip install x$"):
        call_a_library(fails=False)


def test_a_library_that_fails_without_it_is_told_of_as_its_error():
    with pytest.raises(SaekitError, match="refused: no-such-program pip install x"):
        call_a_library(fails=True)


def test_outside_of_the_guard_and_for_other_programs_nothing_changes():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with no_installs(), no_installs():
            assert subprocess.run([PYTHON, "-c", "print('fine')"], capture_output=True).stdout.strip() == b"fine"
    with pytest.raises(FileNotFoundError):
        subprocess.run(COMMAND)


def test_datasets_are_opened_and_read_under_the_guard():
    from saekit.activations import text
    from saekit.activations.columns import Columns

    def opener(datasets):
        subprocess.run(COMMAND)

    with pytest.raises(SaekitError, match="refused: no-such-program pip install x"):
        text._opened("some/dataset", opener)

    def rows():
        yield {"text": "one"}
        subprocess.run(COMMAND)

    with pytest.raises(SaekitError, match="refused: no-such-program pip install x"):
        list(Columns().documents("some/dataset", rows())())
