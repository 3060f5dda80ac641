"""Writing files so that nothing finished is ever lost."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from saekit.errors import SaekitError, first_line

PART = ".part"  # ends the names of files and folders that are not finished
HALF = ".tmp??????"  # what safetensors writes to, before it renames it to the name that it was given
_OS_ERRORS = ("os error", "IoError(Os")  # in what safetensors says of one; the second until 0.5


class WriteError(SaekitError):
    """The disk is full, or does not let itself be written; what was finished before is as it was."""


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name beside it, flush it to the disk, and rename it into place.

    Args:
        path: the file, which is either as before or new and whole, whatever happens.
        write: writes the file whose name it is given.

    Raises:
        WriteError: it cannot be written; the temporary file is gone again.
    """
    replace_files({path: write})


def replace_files(files: Mapping[Path, Callable[[Path], object]]) -> None:
    """Write files that belong together as ``replace_file`` does; none is put in place before all are on the disk.

    Raises:
        WriteError: one cannot be written; the temporary files are gone again.
    """
    temporary = {path: path.with_name(path.name + PART) for path in files}
    try:
        for path, write in files.items():
            with writing(path):
                temporary[path].unlink(missing_ok=True)  # it may be a link to something else
                temporary[path].touch(exist_ok=False)
                mode = temporary[path].stat().st_mode  # what the user's mask makes of it; safetensors lets nobody read
                write(temporary[path])
                temporary[path].chmod(stat.S_IMODE(mode))
                with temporary[path].open("rb+") as file:
                    os.fsync(file.fileno())
        for path in files:
            with writing(path):
                temporary[path].replace(path)
    except BaseException:
        for part in temporary.values():
            part.unlink(missing_ok=True)
        raise
    for folder in {path.parent for path in files}:
        with writing(folder):
            flush_folder(folder)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """While it is entered, what the system says against writing a file becomes one line that names it.

    Raises:
        WriteError: in place of an OSError, or of what safetensors makes of one.
    """
    try:
        yield
    except OSError as error:
        raise WriteError(f"cannot write '{path}': {error.strerror or first_line(error)}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError" or not any(words in str(error) for words in _OS_ERRORS):
            raise
        raise WriteError(f"cannot write '{path}': {first_line(error)}") from error


def flush_folder(folder: Path) -> None:
    """Make the names in a folder as lasting as the files, where the system can."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def expanded(path: str | Path) -> Path:
    """The path with ``~`` and ``~name`` replaced by the home that they mean.

    Raises:
        SaekitError: there is no such home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise SaekitError(f"'{path}': {first_line(error)}") from None


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


def check_new_file(path: Path, flag: str) -> None:
    """Raise SaekitError where a file cannot be written, or is there already."""
    if path.exists():
        raise SaekitError(f"'{path}' exists already; choose another {flag}")
    if not path.parent.is_dir():
        raise SaekitError(f"there is no folder '{path.parent}' to write '{path.name}' into")
    check_writable(path.parent)


def writable_folder(folder: Path, *, overwrite: bool) -> None:
    """Make a folder to write into, with its parents; what it holds is left there. Arguments as for ``check_free``.

    Raises:
        SaekitError: it is a file, holds something without ``overwrite``, cannot be made, or takes no files.
    """
    check_free(folder, overwrite=overwrite)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"cannot make the folder '{folder}': {error.strerror}") from None
    check_writable(folder)


def check_writable(folder: Path) -> None:
    """Make sure that files can be written below a folder; where it does not exist yet, below the nearest that does.

    Raises:
        WriteError: they cannot.
    """
    existing = next((each for each in (folder, *folder.absolute().parents) if each.exists()), folder)
    try:
        with tempfile.TemporaryFile(dir=existing):  # asked by doing: permissions alone do not tell all
            pass
    except OSError as error:
        raise WriteError(f"cannot write into the folder '{existing}': {error.strerror}") from None


def check_movable(folder: Path, target: Path) -> None:
    """Make sure that files can be moved from one folder to another; both exist.

    Raises:
        WriteError: they cannot, as on another disk.
    """
    tried = f"{target.name}.tried{PART}"  # always the same names: what a kill leaves, the next try takes away
    made, moved = folder / tried, target / tried
    try:
        made.touch()
        made.replace(moved)
        moved.unlink()
    except FileNotFoundError:  # another process has tried it meanwhile
        pass
    except OSError as error:
        made.unlink(missing_ok=True)
        raise WriteError(
            f"'{target}' cannot take what is written beside it first: {error.strerror}; choose a folder below it"
        ) from None


def free_space(folder: Path) -> int:
    """Bytes that may still be written below a folder, which need not exist yet."""
    existing = next(each for each in (folder, *folder.absolute().parents) if each.is_dir())
    return shutil.disk_usage(existing).free


def check_space(folder: Path, needed: int, what: str) -> str:
    """``"1.3 GiB, of 39.1 GiB free"``, once it is sure that so many bytes can be written.

    Raises:
        WriteError: they cannot.
    """
    free = free_space(folder)
    told = f"{in_bytes(needed)}, of {in_bytes(free)} free"
    if needed > free:
        raise WriteError(f"{what} needs {told}, at '{folder}'; make space or choose another folder")
    return told


def in_bytes(count: int) -> str:
    """A size as people read it: ``"1.3 GiB"``."""
    size = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


@contextmanager
def locked(folder: Path, doing: str) -> Iterator[None]:
    """Keep other processes out of a folder while it is entered.

    The lock goes with the process, however that ends, and leaves no file behind. Systems and file systems that have no
    such locks are not guarded.

    Args:
        folder: exists.
        doing: what the other process does, for the message.

    Raises:
        SaekitError: another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SaekitError(f"another process is {doing} in '{folder}'; wait until it ends") from None
        except OSError:  # a file system without locks
            pass
        if not (folder.exists() and os.path.samestat(os.fstat(number), folder.stat())):
            raise SaekitError(f"another process has just been {doing} in '{folder}'; try again")
        yield
    finally:
        os.close(number)


def remove_unfinished(folder: Path, names: list[str]) -> None:
    """Delete temporary files that a killed process left: those of files of these names (patterns) in a folder."""
    for pattern in {name + PART for name in names} | {str(Path(name).with_name(HALF)) for name in names}:
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
