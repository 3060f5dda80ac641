"""Mistakes of the user, told in one line that names the mistake and the nearest right thing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SaekitError(ValueError):
    """A mistake in what the user asked for. The command line prints it as one line and exits with code 2."""


class SaekitWarning(UserWarning):
    """What a user should know of something that goes on all the same. The command line prints it as one line."""


def first_line(error: BaseException) -> str:
    """The first line of another library's message, or the kind of the error where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def did_you_mean(word: str, choices: Iterable[str], limit: int = 3) -> str:
    """``"; did you mean 'a' or 'b'?"``, or the first few choices where none is close, or nothing without choices."""
    known = list(dict.fromkeys(choices))
    close = difflib.get_close_matches(word, known, n=limit, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(f"'{c}'" for c in close) + "?"
    if known:
        return "; choose from " + ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return ""
