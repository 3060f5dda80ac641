"""Writing files so that nothing finished is ever lost."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from saekit.errors import SaekitError


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name beside it, flush it to the disk, and rename it into place."""
    temporary = path.with_name(path.name + ".part")
    write(temporary)
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def check_free(folder: Path, *, overwrite: bool, hint: str = "") -> None:
    """Make sure that nothing stands where a folder is to be written.

    Args:
        folder: may be missing or empty.
        overwrite: whether it may hold something already.
        hint: what to do where it does, for the message.

    Raises:
        SaekitError: it is a file, or holds something without ``overwrite``.
    """
    if folder.exists() and not folder.is_dir():
        raise SaekitError(f"'{folder}' is a file, not a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise SaekitError(f"'{folder}' holds something already; {hint or 'choose another folder or ask to overwrite'}")


def writable_folder(folder: Path, *, overwrite: bool) -> None:
    """Make a folder to write into, with its parents; what it holds is left there. Arguments as for ``check_free``.

    Raises:
        SaekitError: it is a file, holds something without ``overwrite``, or cannot be made.
    """
    check_free(folder, overwrite=overwrite)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaekitError(f"cannot make the folder '{folder}': {error.strerror}") from None
