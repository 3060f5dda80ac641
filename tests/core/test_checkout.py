"""A checkout is importable as it lies: Python that is started in it finds its own saekit, whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import saekit, saekit.activations, saekit.trainers, saekit.evals, saekit.commands
for module in (saekit, saekit.activations, saekit.trainers, saekit.evals):
    print(module.__file__)
"""


def test_a_checkout_that_is_not_installed_is_importable_from_its_root(tmp_path):
    for folder in ("saekit", "activations", "trainers", "evals"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    homes = [Path(line).resolve().parents[1] for line in done.stdout.split()]
    assert homes == [tmp_path.resolve()] * 4


def test_installed_packages_do_not_look_beside_themselves(tmp_path):
    """Where activations/ lies inside, as an ordinary installation lays it, nothing beside saekit/ belongs to it."""
    site = tmp_path / "site"
    shutil.copytree(ROOT / "saekit", site / "saekit", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("activations", "trainers", "evals"):
        shutil.copytree(ROOT / folder, site / "saekit" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", site)
    done = subprocess.run(
        [sys.executable, "-c", "import saekit; print(len(saekit.__path__))"],
        cwd=site,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stdout.split() == ["1"], done.stderr
