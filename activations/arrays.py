"""A user's own activations, in whatever holds them, as batches for a cache."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saekit.activations.batch import ActivationBatch
from saekit.activations.division import blocks
from saekit.activations.placement import DTYPES
from saekit.errors import SaekitError, SaekitWarning, first_line
from saekit.files import expanded

ROWS = 8192  # read of an array at a time
_TAKEN = (
    "a torch tensor, an array that can be sliced (numpy, memory-mapped, h5py), the path of a .npy file, or an iterator "
    "of such pieces"
)


def batches_of(x: Any, gradients: Any, groups: Any, dtype: str) -> Iterator[ActivationBatch]:
    """Activations with their gradients and groups, a piece at a time; nothing is held as a whole.

    The three may be of different kinds. Without groups, ``documents`` numbers blocks of neighbouring rows.

    Args:
        x: [N, d] activations: a tensor, an array, a path or an iterator of pieces [m, d].
        gradients, groups: [N, d] and [N], of any of these kinds too, or None.
        dtype: in which they will be stored.

    Raises:
        SaekitError: one of them is something else, or of another length.
    """
    own = {"gradients": gradients, "groups": groups}
    others = {name: _Rows(_pieces(value, name), name) for name, value in own.items() if value is not None}
    _check_lengths(x, own)
    told, done, width = False, 0, None
    for piece in _pieces(x, "activations"):
        _check_matrix(piece, "activations")
        if width not in (None, piece.shape[1]):
            raise SaekitError(f"activations from row {done} have width {piece.shape[1]}, those before them {width}")
        width = piece.shape[1]
        if not told and torch.finfo(piece.dtype).bits > 32:
            told = True
            warnings.warn(
                f"activations in {str(piece.dtype).removeprefix('torch.')} are stored as {dtype}",
                SaekitWarning,
                stacklevel=2,
            )
        rows = torch.arange(done, done + len(piece))
        taken = {name: other.take(len(piece), done) for name, other in others.items()}
        gradient, documents = taken.get("gradients"), taken.get("groups")
        if gradient is not None:
            _check_matrix(gradient, "gradients")
            if gradient.shape != piece.shape:
                raise _unfit("gradients", gradient.shape, piece.shape)
        if documents is None:
            documents = torch.from_numpy(blocks(rows.numpy()))
        elif documents.ndim != 1 or documents.dtype.is_floating_point or documents.dtype == torch.bool:
            raise SaekitError(
                f"groups are whole numbers [N], one a row, not {_told(documents)}; names become such by "
                f"numpy.unique(names, return_inverse=True)[1]"
            )
        none = torch.full_like(rows, -1)
        yield ActivationBatch(piece.detach(), none, documents.long(), torch.zeros_like(rows), gradient)
        done += len(piece)
    for name, other in others.items():
        if (left := other.left()) and done:
            raise SaekitError(f"{name} of at least {done + left} rows do not fit activations of {done} rows")


class _Rows:
    """A column in pieces of any length, taken in lengths of one's own."""

    def __init__(self, pieces: Iterator[Tensor], name: str) -> None:
        self._pieces, self._name = pieces, name
        self._waiting: list[Tensor] = []

    def take(self, rows: int, done: int) -> Tensor:
        """The next rows."""
        while sum(map(len, self._waiting)) < rows:
            if (piece := next(self._pieces, None)) is None:
                found = done + sum(map(len, self._waiting))
                raise SaekitError(f"{self._name} of {found} rows do not fit activations of at least {done + rows} rows")
            self._waiting.append(piece)
        try:
            whole = torch.cat(self._waiting) if len(self._waiting) != 1 else self._waiting[0]
        except (RuntimeError, IndexError) as error:
            raise SaekitError(f"pieces of {self._name} do not fit each other: {first_line(error)}") from None
        self._waiting = [whole[rows:]]
        return whole[:rows]

    def left(self) -> int:
        """Rows that nobody took, as far as the next piece tells."""
        return sum(map(len, chain(self._waiting, (piece for piece in [next(self._pieces, None)] if piece is not None))))


def _pieces(value: Any, name: str) -> Iterator[Tensor]:
    """What a user gave, as tensors of a few rows."""
    if isinstance(value, (str, Path)):
        value = _npy(Path(value), name)
    if isinstance(value, (list, tuple)) and value and all(isinstance(each, int) for each in value):
        value = np.array(value)
    if _is_array(value):
        if len(value.shape) == 0:
            raise _unknown(value, name)
        for start in range(0, max(1, value.shape[0]), ROWS):
            yield _tensor(value[start : start + ROWS], name)
        return
    if not isinstance(value, Iterable) or isinstance(value, (dict, bytes)):
        raise _unknown(value, name)
    for number, piece in zip(count(), value):
        if not _is_array(piece) or len(piece.shape) == 0:
            raise _unknown(piece, name, f", which piece {number} is")
        for start in range(0, max(1, piece.shape[0]), ROWS):
            yield _tensor(piece[start : start + ROWS], name)


def _is_array(value: Any) -> bool:
    return (
        isinstance(getattr(value, "shape", None), tuple) and hasattr(value, "dtype") and hasattr(value, "__getitem__")
    )


def _npy(path: Path, name: str) -> Any:
    """A .npy file, mapped into memory."""
    file = expanded(path)
    if file.suffix != ".npy":
        raise SaekitError(f"{name} come from {_TAKEN}; '{path}' is no .npy file")
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise SaekitError(f"'{path}' cannot be read: {first_line(error)}") from None


def _tensor(piece: Any, name: str) -> Tensor:
    """A few rows as a tensor of their own."""
    if isinstance(piece, Tensor):
        return piece
    array = np.asarray(piece)
    if array.dtype.kind not in "fiub":
        raise _unknown(piece, name)
    kind = np.dtype(np.float64) if array.dtype.kind == "f" and array.dtype.itemsize > 8 else array.dtype
    kind = np.dtype(np.int64) if array.dtype.kind in "iu" else kind.newbyteorder("=")
    return torch.from_numpy(np.array(array, kind, order="C", subok=False))  # a copy: the file may not be writable


def _check_matrix(piece: Tensor, name: str) -> None:
    if piece.ndim != 2 or piece.dtype not in (*DTYPES.values(), torch.float64):
        raise _unknown(piece, name)


def _check_lengths(x: Any, own: dict[str, Any]) -> None:
    """Refuse early what cannot fit, where both tell their shape."""
    for name, value in own.items():
        if _is_array(x) and _is_array(value) and tuple(value.shape[:1]) != tuple(x.shape[:1]):
            raise _unfit(name, value.shape, x.shape)


def _unfit(name: str, found: Any, wanted: Any) -> SaekitError:
    return SaekitError(f"{name} of shape {list(found)} do not fit activations {list(wanted)}")


def _unknown(value: Any, name: str, where: str = "") -> SaekitError:
    what = "whole numbers [N]" if name == "groups" else "a matrix [N, d_in] of floating point numbers"
    return SaekitError(f"{name} are {what}: {_TAKEN}; not {_told(value)}{where}")


def _told(value: Any) -> str:
    """What something is, in a few words."""
    kind = f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
    if not _is_array(value):
        return f"of type {kind}"
    return f"{str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)} ({kind})"
