"""Checkpoints: everything that the next step depends on, the newest two kept."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from saekit.errors import SaekitError
from saekit.files import replace_file

_FORMAT = 2  # of what a checkpoint holds
_NAME = re.compile(r"step-(\d+)\.pt")


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a run's ``checkpoints/`` folder, oldest first."""
    found = [(int(match.group(1)), path) for path in folder.glob("*.pt") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write the state after ``step`` steps, then delete all but the newest two."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step}.pt"
    replace_file(path, lambda part: torch.save({"format": _FORMAT, "step": step, **state}, part))
    for old in checkpoints(folder)[:-2]:
        old.unlink()
    return path


def load_checkpoint(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """The newest state, or None where there is none.

    Raises:
        SaekitError: the file is damaged, or another version of saekit wrote it.
    """
    found = checkpoints(folder)
    if not found:
        return None
    try:
        state: dict[str, Any] = torch.load(found[-1], map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged files
        raise SaekitError(f"the checkpoint '{found[-1]}' is damaged; delete it to use the one before") from error
    if state.get("format") != _FORMAT:
        raise SaekitError(
            f"another version of saekit wrote the checkpoint '{found[-1]}'; this one cannot go on from it"
        )
    return state
