"""Checkpoints: everything that the next step depends on, the newest two kept.

One file of safetensors each: the tensors by their path in the state (``adam.moments.W_dec.0``), all else as JSON in the
metadata, and a seal over every byte. Nothing in it can be executed.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from saekit.errors import SaekitError, first_line
from saekit.files import remove_unfinished, replace_file
from saekit.seal import BLANK, file_unbroken, stamp_file

_FORMAT = 4  # of what a checkpoint holds; 3 had no centre, 1 and 2 were .pt files
_NAME = re.compile(r"step-(\d{1,18})\.safetensors")
_FACTS = "saekit"  # key of the metadata
_KEPT = 2


def checkpoints(folder: Path) -> dict[int, Path]:
    """The finished checkpoints of a run's ``checkpoints/`` folder by their step, oldest first."""
    files = [path for path in folder.glob("*") if path.is_file()]
    found = {int(match.group(1)): path for path in files if (match := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], dictionary: dict[str, Any] | None = None) -> Path:
    """Write the state after ``step`` steps, then delete all but the newest two.

    Args:
        folder: is made where it is missing.
        step: names the file.
        state: nested dictionaries and lists of tensors, numbers, texts and None.
        dictionary: what the format ``saekit_checkpoint`` needs to read it as a dictionary, as JSON.

    Raises:
        WriteError: the disk is full or not to be written to; the checkpoints before are as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    facts = _without_tensors(state, "", tensors)
    told = {"seal": BLANK, "format": _FORMAT, "step": step, "dictionary": dictionary, "state": facts}
    metadata = {_FACTS: json.dumps(told)}

    def write(path: Path) -> None:
        save_file(tensors, path, metadata)
        stamp_file(path)

    path = folder / f"step-{step}.safetensors"
    replace_file(path, write)
    for old in list(checkpoints(folder).values())[:-_KEPT]:
        old.unlink()
    return path


def load_checkpoints(folders: Sequence[Path], device: torch.device) -> tuple[int, list[dict[str, Any]]] | None:
    """The newest step of which every folder has a whole checkpoint, and these states; None where there is none yet.

    A damaged checkpoint is named on standard error, and the one before it is used.

    Raises:
        SaekitError: all are damaged, or another version of saekit wrote them.
    """
    for folder in folders:
        remove_unfinished(folder, ["step-*.safetensors"])
        if old := sorted(folder.glob("step-*.pt")):
            raise SaekitError(
                f"another version of saekit wrote the checkpoint '{old[-1]}'; this one cannot go on from it"
            )
    found = [checkpoints(folder) for folder in folders]
    damaged: list[str] = []
    for step in sorted(set[int].intersection(*map(set, found)), reverse=True):
        states = [_load(each[step], device, damaged) for each in found]
        if all(states):
            for files in found:  # a process may have been killed before it could
                for before in [each for each in list(files)[:-_KEPT] if each < step]:
                    files[before].unlink()
            return step, [state for state in states if state]
    if damaged:
        raise SaekitError(f"every checkpoint is damaged ({', '.join(damaged)}); --overwrite begins the run anew")
    return None


def _load(path: Path, device: torch.device, damaged: list[str]) -> dict[str, Any] | None:
    """The state in a file, or None where it is damaged, which is told."""
    try:
        if not file_unbroken(path):
            raise ValueError("its seal is broken")
        with safe_open(path, framework="pt", device=str(device)) as file:
            facts = json.loads(file.metadata()[_FACTS])
            if facts["format"] == _FORMAT:
                state = _with_tensors(facts["state"], file)
                if not isinstance(state, dict):
                    raise ValueError("it holds no state")
                if "passport" in state:  # as the provenance of the data was called before 0.2
                    state["provenance"] = state.pop("passport")
                return state
    except Exception as error:  # whoever can seal a file can write anything into it
        damaged.append(f"'{path}'")
        print(
            f"saekit: the checkpoint '{path}' is damaged ({first_line(error)}); looking for one before it",
            file=sys.stderr,
        )
        return None
    raise SaekitError(f"another version of saekit wrote the checkpoint '{path}'; this one cannot go on from it")


def _without_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON can hold it; its tensors go into ``tensors``, each under its path."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {
            "dict": {key: _without_tensors(each, f"{name}.{key}".strip("."), tensors) for key, each in value.items()}
        }
    if isinstance(value, (list, tuple)):
        return {"list": [_without_tensors(each, f"{name}.{i}", tensors) for i, each in enumerate(value)]}
    return {"value": value}


def _with_tensors(value: dict[str, Any], file: Any) -> Any:
    """The reverse of ``_without_tensors``."""
    ((kind, held),) = value.items()
    if kind == "tensor":
        return file.get_tensor(held).clone()  # a file that stays mapped keeps its space when it is deleted
    if kind == "dict":
        return {key: _with_tensors(each, file) for key, each in held.items()}
    return [_with_tensors(each, file) for each in held] if kind == "list" else held
