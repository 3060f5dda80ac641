"""Environments of other packages, each with a folder of its own, since they ask for other versions than saekit runs on.

One is made once (minutes): ``.venv-NAME`` in the repository, or in $SAEKIT_ENVIRONMENTS.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TORCH = "torch==2.13.0"  # alone at first: with others pip might take one for CUDA


def python_of(name: str, *packages: object, without: str | None = None) -> Path:
    """The interpreter of an environment that has these packages, and not the one that came with them."""
    environment = Path(os.environ.get("SAEKIT_ENVIRONMENTS", ROOT)) / f".venv-{name}"
    python = environment / "bin/python"
    if not (environment / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        pip = [str(python), "-m", "pip"]
        for wanted in ([TORCH], [TORCH, *map(str, packages)]):
            subprocess.run([*pip, "install", "--quiet", *wanted], check=True)
        if without is not None:
            subprocess.run([*pip, "uninstall", "--quiet", "--yes", without], check=True)
        (environment / "ready").touch()
    return python
