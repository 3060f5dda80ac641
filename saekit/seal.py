"""Files that carry their own checksum: whichever byte changes, it is noticed.

A seal is the text ``saekit-seal:`` and 32 hexadecimal digits, XXH3 (128 bits) of everything else, the digits themselves
counted as zeros. It stands near the beginning of the file, wherever the format has room for a text: in a line of JSON,
or in the metadata of safetensors. Other programs read such files as ever.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from saekit.errors import SaekitError

BLANK = "saekit-seal:" + "0" * 32  # what is written first, and then stamped
_SEAL = re.compile(rb"saekit-seal:([0-9a-f]{32})")
_SEARCHED = 4096  # bytes
_BLOCK = 1 << 22  # bytes


class NoChecksumsError(SaekitError):
    """The package that seals are computed with is not there."""


def stamp(content: bytes) -> bytes:
    """The content with its ``BLANK`` replaced by its seal."""
    digits = _digits_of(content)
    assert digits is not None
    return content[: digits.start] + _digest(content, (), digits) + content[digits.stop :]


def unbroken(content: bytes) -> bool | None:
    """Whether content is as it was stamped, or None where it has no seal."""
    digits = _digits_of(content)
    return None if digits is None else _digest(content, (), digits) == content[digits.start : digits.stop]


def stamp_file(path: Path) -> None:
    """Replace the ``BLANK`` in a file by its seal.

    Raises:
        NoChecksumsError: the package xxhash is not there.
    """
    with path.open("rb+") as file:
        first = file.read(_BLOCK)
        digits = _digits_of(first)
        assert digits is not None
        seal = _digest(first, iter(lambda: file.read(_BLOCK), b""), digits)
        file.seek(digits.start)
        file.write(seal)


def file_unbroken(path: Path) -> bool | None:
    """Whether a file is as it was stamped, or None where it has no seal.

    Raises:
        NoChecksumsError: the package xxhash is not there, and there is a seal.
    """
    with path.open("rb") as file:
        first = file.read(_BLOCK)
        digits = _digits_of(first)
        if digits is None:
            return None
        return _digest(first, iter(lambda: file.read(_BLOCK), b""), digits) == first[digits.start : digits.stop]


def _digits_of(first: bytes) -> slice | None:
    """Where the digits stand."""
    match = _SEAL.search(first, 0, _SEARCHED)
    return slice(*match.span(1)) if match else None


def _digest(first: bytes, rest: Iterable[bytes], digits: slice) -> bytes:
    try:
        import xxhash  # here, so that ``import saekit`` does without
    except ImportError:
        raise NoChecksumsError("the seals of files need the package xxhash: pip install xxhash") from None

    digest = xxhash.xxh3_128(first[: digits.start])
    digest.update(b"0" * (digits.stop - digits.start))
    digest.update(first[digits.stop :])
    for block in rest:
        digest.update(block)
    return digest.hexdigest().encode()
