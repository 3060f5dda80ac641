"""A guard around calls into other libraries: none of them installs, upgrades or downloads code.

TransformerLens, for one, runs ``pip install torchvision`` where a multimodal model's image processor does not load.
What a user's environment holds is the user's to decide.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from saekit.errors import SaekitError, SaekitWarning

# of each event by which Python tells that it starts a program, where its arguments stand
_STARTS = {"subprocess.Popen": 1, "os.system": 0, "os.exec": 1, "os.posix_spawn": 1, "os.spawn": 2, "os.startfile": 0}
_ALWAYS = re.compile(r"ensurepip(\..*)?|get-pip\.py|easy_install|uvx|npx|curl|wget")
_INSTALLER = re.compile(
    r"pip[\d.]*|pip\._internal.*|pipx|pipenv|uv|conda|mamba|micromamba|pixi|poetry|pdm|apt|apt-get|yum|dnf|apk|brew|npm|git"
)
_VERBS = re.compile(
    r"install|reinstall|upgrade|update|download|sync|add|create|run|tool|wheel|inject|fetch|clone|pull|submodule"
)
_PART = re.compile(r"[\s;&|()'\"\[\]{},=]+")  # between the words of a command in a shell, or of a line of Python
_entered: list[list[str]] = []  # for each guard that is entered, what it has refused
_lock = threading.Lock()
_hooked = False


def installs(command: Any) -> bool:
    """Whether a command (a text, or a list of words) would install, upgrade or download code."""
    names = [os.path.basename(part).lower().removesuffix(".exe") for part in _parts(command)]
    return any(map(_ALWAYS.fullmatch, names)) or (
        any(map(_INSTALLER.fullmatch, names)) and any(map(_VERBS.fullmatch, names))
    )


def _parts(command: Any) -> list[str]:
    return [part for word in _words(command) for part in _PART.split(word) if part]


def _words(command: Any) -> list[str]:
    words: Sequence[Any] = [command] if isinstance(command, str | bytes | os.PathLike) else list(command or ())
    return [os.fsdecode(word) if isinstance(word, str | bytes | os.PathLike) else str(word) for word in words]


@contextmanager
def no_installs() -> Iterator[None]:
    """While it is entered, no program is started that would install, upgrade or download code.

    What is refused is told in one line: as a warning where the call goes on without it, else as the error.

    Raises:
        SaekitError: the call fails, and such a program was refused.
    """
    global _hooked
    refused: list[str] = []
    with _lock:
        if not _hooked:
            sys.addaudithook(_watch)  # sees every way to start a program, and stays; it is idle outside of the guard
            _hooked = True
        _entered.append(refused)
    try:
        yield
    except Exception as error:
        if refused and not (isinstance(error, SaekitError) and refused[0] in str(error)):
            raise SaekitError(_told(refused[0])) from error
        raise
    else:
        if refused:
            warnings.warn(_told(refused[0]), SaekitWarning, stacklevel=3)
    finally:
        with _lock:
            _entered[:] = [other for other in _entered if other is not refused]


def _watch(event: str, args: tuple[Any, ...]) -> None:
    """Refuse what installs: an error that an audit hook raises stops the program from being started."""
    if not _entered or event not in _STARTS:
        return
    command = args[_STARTS[event]]
    if installs(command):
        line = shlex.join(_words(command)) if not isinstance(command, str | bytes) else os.fsdecode(command)
        line = " ".join(line.split())[:200]
        for refused in list(_entered):
            refused.append(line)
        raise SaekitError(_told(line))


def _told(line: str) -> str:
    return f"saekit lets no library install or download code (run it yourself where you want it); refused: {line}"
