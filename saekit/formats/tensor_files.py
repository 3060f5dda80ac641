"""Files of tensors that anyone may have made: safetensors, torch's archives, numpy's archives.

Nothing in them is run, and nothing larger than the file is made: names, shapes and sizes are read first.
"""

from __future__ import annotations

import math
import pickletools
import warnings
import zipfile
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from saekit.errors import SaekitError, SaekitWarning, first_line
from saekit.reading import SMALL, check_inside
from saekit.seal import BLANK, NoChecksumsError, file_unbroken, stamp_file

_PICKLED = 1 << 16  # bytes of the part of an archive of torch that names its tensors
_NAMED = {
    *("collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"),
    *(f"torch {kind}Storage" for kind in ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char")),
    *("torch ByteStorage", "torch BoolStorage"),
}
_OTHER_CALLS = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}
_INFLATED = 8  # times as much as the file: weights hardly compress


def read_tensors(path: Path, folder: Path) -> dict[str, Any]:
    """What a file of tensors holds, by name.

    Tensors of safetensors and of torch are views of the file.

    Args:
        path: ends in ``.safetensors`` or ``.npz``; anything else is taken for an archive of torch, in which names may
            stand for numbers and texts too.
        folder: it may not be a link that leads out of here.

    Raises:
        SaekitError: it is damaged, would run code, holds less than it says, or is such a link.
    """
    check_inside(path, folder)
    readers: dict[str, Callable[[Path], dict[str, Any]]] = {".safetensors": _safetensors, ".npz": _numpy}
    try:
        return readers.get(path.suffix, _torch)(path)
    except (SaekitError, MemoryError):
        raise
    except Exception as error:  # each library raises many kinds for files that are not as they should be
        raise SaekitError(f"'{path}' is damaged: {first_line(error)}") from None


def _safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        try:
            whole = file_unbroken(path)
        except NoChecksumsError:  # torch and safetensors are enough to load a dictionary
            told = "files are read without comparing their seals: that needs the package xxhash (pip install xxhash)"
            warnings.warn(told, SaekitWarning, stacklevel=2)
            whole = True
        if whole is False or (whole is None and "saekit" in (file.metadata() or {})):
            raise SaekitError(f"'{path}' is damaged: its seal is broken")
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _torch(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            pickled = [entry for entry in entries if entry.filename.split("/")[1:] == ["data.pkl"]]
            if len(pickled) != 1 or pickled[0].file_size > _PICKLED:
                raise SaekitError(f"'{path}' is no archive of named tensors that torch has written")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise SaekitError(f"'{path}' is compressed; torch writes no such files")
            program = archive.read(pickled[0])
    except zipfile.BadZipFile:
        raise SaekitError(f"'{path}' is no archive as torch writes them since version 1.6") from None
    for operation, argument, _ in pickletools.genops(program):
        if operation.name in _OTHER_CALLS or (operation.name == "GLOBAL" and argument not in _NAMED):
            called = str(argument or operation.name).replace(" ", ".")
            raise SaekitError(
                f"'{path}' holds more than tensors: its pickle would call {called[:80]!r}; it is not read"
            )
    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise SaekitError(f"'{path}' holds no tensors by name")
    tensors = [value for value in loaded.values() if isinstance(value, Tensor)]
    if sum(value.numel() * value.element_size() for value in tensors) > path.stat().st_size:
        raise SaekitError(f"'{path}' is damaged: it holds less than the shapes in it say")
    return dict(loaded)


def _numpy(path: Path) -> dict[str, Tensor]:
    import numpy as np

    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > _INFLATED * path.stat().st_size + SMALL:
            raise SaekitError(f"'{path}' is damaged: it says that it grows more than weights do")
        for entry in entries:
            with archive.open(entry) as file:
                shape, _, dtype = headers[np.lib.format.read_magic(file)](file)
                if dtype.kind not in "fiu":
                    raise SaekitError(f"'{path}' holds more than numbers: '{entry.filename}' is of {str(dtype)[:80]}")
                if min(shape, default=1) < 0 or file.tell() + math.prod(shape) * dtype.itemsize != entry.file_size:
                    raise SaekitError(f"'{path}' is damaged: '{entry.filename}' is not as long as it says")
    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}


def sealed_with(path: Path) -> str:
    """What ``write_safetensors`` wrote into a file beside the tensors; nothing where another program wrote it."""
    with safe_open(path, framework="pt") as file:
        return str((file.metadata() or {}).get("saekit", "")[len(BLANK) :])


def write_safetensors(tensors: Mapping[str, Tensor], path: Path, text: str = "") -> None:
    """Write tensors with a seal and a text, which other programs do not look at."""
    save_file(dict(tensors), path, {"saekit": BLANK + text})  # in one entry: safetensors has no order among several
    stamp_file(path)


def write_torch(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as ``torch.save`` does.

    By way of memory: where the system refuses, torch says only that a place in the file is not the expected one.

    Raises:
        OSError: the system refuses.
    """
    content = BytesIO()
    torch.save(dict(tensors), content)
    path.write_bytes(content.getbuffer())
