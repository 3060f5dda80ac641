"""What a GGUF file says of itself: its metadata and its table of tensors, read without going past a byte of it.

The layout (version 2 and 3, little-endian): the letters GGUF, the version, how many tensors and how many facts; the
facts, each a name, a kind and a value; the tensors, each a name, its dimensions (fastest first), a kind of number and a
place; then, at the next multiple of the alignment, the tensors themselves.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

from saekit.errors import SaekitError, first_line

MAGIC = b"GGUF"
_FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DIMENSIONS = 4  # at most, in ggml


class Stored(NamedTuple):
    """A tensor of the file: its shape as torch has it, ggml's number of its kind, and where its bytes begin."""

    shape: tuple[int, ...]
    kind: int
    start: int


class Header(NamedTuple):
    """The facts by name, arrays by their length alone, and the tensors by name."""

    facts: dict[str, Any]
    tensors: dict[str, Stored]

    @property
    def architecture(self) -> str:
        """llama.cpp's name for the kind of model."""
        return str(self.facts["general.architecture"])

    def number(self, name: str, default: float) -> float:
        """A fact that is a number, or the default where there is none of that name."""
        value = self.facts.get(name)
        return value if isinstance(value, (int, float)) else default


class _Content:
    """The bytes of a file, taken from the front; ``struct.error`` where there are too few."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content = content
        self.at = len(MAGIC)

    def take(self, form: str) -> Any:
        """One number, by its letter in ``struct``."""
        (value,) = struct.unpack_from("<" + form, self.content, self.at)
        self.at += struct.calcsize("<" + form)
        return value

    def skip(self, size: int) -> None:
        if size > len(self.content) - self.at:
            raise struct.error
        self.at += size

    def text(self) -> str:
        size = self.take("Q")
        start = self.at
        self.skip(size)
        return self.content[start : self.at].decode()

    def value(self) -> Any:
        """A fact's value, or the length of an array."""
        kind = self.take("I")
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.take(_FIXED[kind])
        kind, count = self.take("I"), self.take("Q")
        if kind == _STRING:
            for _ in range(count):
                self.skip(self.take("Q"))
        else:
            self.skip(count * struct.calcsize("<" + _FIXED[kind]))
        return count


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF file does.

    Raises:
        SaekitError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise SaekitError(f"cannot read '{path}': {error.strerror}") from None


def read_header(path: Path) -> Header:
    """The facts and the table of a GGUF file, once all its tensors are known to lie within it.

    Raises:
        SaekitError: it is no GGUF file, is cut off, damaged, of another version, or has numbers of a kind that the
            package gguf does not know, or that package is missing.
    """
    if not is_gguf(path):
        raise SaekitError(f"'{path}' is no GGUF file: it does not begin with the letters GGUF")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _read(path, _Content(content), len(content))
    except OSError as error:
        raise SaekitError(f"cannot read '{path}': {error.strerror}") from None
    except struct.error:
        raise SaekitError(f"'{path}' is cut off or damaged: its metadata goes beyond its end") from None
    except KeyError as error:
        raise SaekitError(f"'{path}' is damaged: its metadata has a value of the unknown kind {error}") from None
    except UnicodeDecodeError as error:
        raise SaekitError(f"'{path}' is damaged: {first_line(error)}") from None


def _read(path: Path, content: _Content, size: int) -> Header:
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError:
        raise SaekitError(
            f"'{path}' is a GGUF file; reading it takes the package gguf: pip install 'saekit[gguf]'"
        ) from None
    version, n_tensors, n_facts = content.take("I"), content.take("Q"), content.take("Q")
    if version not in (2, 3):
        raise SaekitError(f"'{path}' is of GGUF's version {version}; versions 2 and 3, little-endian, are read")
    facts = {}
    for _ in range(n_facts):
        name = content.text()
        facts[name] = content.value()
    table = []
    for _ in range(n_tensors):
        name, dimensions = content.text(), content.take("I")
        if dimensions > _DIMENSIONS:
            raise SaekitError(f"'{path}' is damaged: its tensor '{name}' has {dimensions} dimensions")
        shape = tuple(content.take("Q") for _ in range(dimensions))[::-1]
        table.append((name, shape, content.take("I"), content.take("Q")))
    alignment = facts.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or not isinstance(facts.get("general.architecture"), str):
        raise SaekitError(f"'{path}' is damaged: its alignment is {alignment!r}, or it names no architecture")
    data = -(-content.at // alignment) * alignment
    tensors, end = {}, data
    for name, shape, kind, offset in table:
        if kind not in GGML_QUANT_SIZES:
            raise SaekitError(
                f"'{path}' holds numbers of ggml's kind {kind} ('{name}'), which this version of the package gguf "
                "does not know"
            )
        block, bytes_each = GGML_QUANT_SIZES[kind]
        tensors[name] = Stored(shape, kind, data + offset)
        end = max(end, data + offset + math.prod(shape) // block * bytes_each)
    if end > size:
        raise SaekitError(f"'{path}' is cut off: it should have {end:,} bytes at least and has {size:,}")
    return Header(facts, tensors)
