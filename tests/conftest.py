"""Shared by all tests: no network, the embedded model once, one small trained run made by the real command."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

settings.register_profile("saekit", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("saekit")
RunCommand = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_configure(config: pytest.Config) -> None:
    """Give all processes of these tests one place for token ids, which goes with them."""
    if "SAEKIT_TOKENS" not in os.environ:
        os.environ["SAEKIT_TOKENS"] = tempfile.mkdtemp(prefix="saekit-tokens-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop("SAEKIT_TOKENS"), ignore_errors=True))


@pytest.fixture(scope="session")
def saekit_command() -> RunCommand:
    """Run the installed command line in a process of its own."""

    def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "saekit.cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=3600, **options)  # type: ignore[call-overload, no-any-return]

    return run


@pytest.fixture
def saekit_main(capfd: pytest.CaptureFixture[str]) -> RunCommand:
    """Run the command line in the test's own process, many times as fast, with the same answer as `saekit_command`.

    What libraries log or warn of is on standard error, as it is in a fresh process; pytest would keep it apart.
    """
    import datasets
    from transformers.utils import logging as transformers_logging

    from saekit.cli import main

    def log(logger: logging.Logger, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            print(record.getMessage(), file=sys.stderr)

    def warn(*told: Any) -> None:
        print(warnings.formatwarning(*told[:4]), end="", file=sys.stderr)

    def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        for name in ("root", "transformers", "datasets"):  # what a command before has silenced speaks again
            logging.getLogger(name).setLevel(logging.WARNING)
        transformers_logging.enable_progress_bar()
        datasets.enable_progress_bars()
        command = ["saekit", *map(str, arguments)]
        capfd.readouterr()
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore", PendingDeprecationWarning)  # which pytest shows and Python does not
            patch.setattr(warnings, "showwarning", warn)
            patch.setattr(logging.Logger, "callHandlers", log)
            patch.setattr(sys, "argv", command)
            if cwd is not None:
                patch.chdir(cwd)
            with pytest.raises(SystemExit) as stop:
                main()
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(command, stop.value.code or 0, out, err)  # type: ignore[arg-type]

    return run


@pytest.fixture(scope="session")
def source():
    """The embedded model, its default hook and the Python source."""
    from saekit.activations import ActivationSource

    return ActivationSource.open()


@pytest.fixture(scope="session")
def contexts(source):
    """Thirty-two held-out contexts."""
    return next(source.contexts("heldout"))


@pytest.fixture(scope="session")
def trained_run(saekit_command: RunCommand, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of mutual choice on the embedded model, by the command line: 300k tokens, evaluated on 30k."""
    home = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # one run for all of them
        home = home.parent
    out = home / "trained/run"
    with FileLock(home / "trained.lock"):
        if not out.exists():
            done = saekit_command(
                "train", "--variant", "mutual_choice", "--tokens", 300_000, "--width", 1024, "--k", 16,
                "--batch-size", 2048, "--buffer", 65_536, "--calibration-tokens", 40_000, "--eval-tokens", 30_000,
                "--out", out, "--quiet",
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
