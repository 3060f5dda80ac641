"""How the tensors of a dictionary stand in files: names, shapes and orientation, one table for reading and writing."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saekit.errors import SaekitError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
OURS = {"W_enc": "DF", "b_enc": "F", "W_dec": "FD", "b_dec": "D", "threshold": "F"}  # D is d_in, F is d_sae


def dtype_named(name: str) -> torch.dtype:
    """The dtype of a name in a config, ``float32`` or ``torch.float32``; otherwise a KeyError."""
    return DTYPES[name.removeprefix("torch.")]


class Stored(NamedTuple):
    """A tensor of a file: its name there, and its shape in letters; those of ours reversed mean the transpose."""

    name: str
    letters: str


def from_file(tensors: Mapping[str, Any], places: Mapping[str, Stored], path: Path, **sizes: int) -> dict[str, Tensor]:
    """The tensors of a dictionary by our names and with our shapes.

    Args:
        tensors: what the file holds.
        places: for each of our names, where it stands. The file must hold just these.
        path: the file, for messages.
        **sizes: D and F where a config tells them; otherwise the first matrix does.

    Raises:
        SaekitError: names, shapes or dtypes are not as they should be.
    """
    shapes = {name: list(value.shape) if isinstance(value, Tensor) else type(value) for name, value in tensors.items()}
    asks = "its config asks for" if len(sizes) == 2 else "a dictionary of that width has"
    for stored in places.values():
        shape = shapes.get(stored.name)
        if isinstance(shape, list) and len(shape) == len(stored.letters) == 2:
            sizes = {**dict(zip(stored.letters, shape, strict=True)), **sizes}
    expected = {stored.name: [sizes.get(letter, letter) for letter in stored.letters] for stored in places.values()}
    if shapes != expected or not all(sizes.values()):
        raise SaekitError(f"'{path}' holds {reprlib.repr(shapes)}, but {asks} {expected}")
    kinds = {value.dtype for value in tensors.values()}
    if not kinds <= set(DTYPES.values()):
        named = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        raise SaekitError(f"'{path}' holds weights in {named}, not in floating point")
    return {ours: _turned(tensors[stored.name], ours, stored) for ours, stored in places.items()}


def to_file(weights: Mapping[str, Tensor], places: Mapping[str, Stored]) -> dict[str, Tensor]:
    """Tensors of a dictionary by the names and shapes of a file, contiguous, on the CPU."""
    turned = {stored.name: _turned(weights[ours], ours, stored) for ours, stored in places.items()}
    return {name: value.detach().cpu().contiguous() for name, value in turned.items()}


def _turned(value: Tensor, ours: str, stored: Stored) -> Tensor:
    return value.T if stored.letters != OURS.get(ours, stored.letters) else value
