"""What the studies of this folder share: how they end, and the marks between which their pages are written."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from saekit.errors import SaekitError
from saekit.files import replace_file

END = "<!-- end -->"


@contextmanager
def told(name: str, *stops: type[BaseException]) -> Iterator[None]:
    """Around a study: a mistake is one line and exit code 2; Ctrl-C (or one of ``stops``) says how to go on, 130."""
    try:
        yield
    except SaekitError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, *stops):
        print(f"\n{name}: stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)


class MarkedPage:
    """A page of which a study writes what stands between two marks; the words around them are its readers'."""

    def __init__(self, path: Path, begin: str, title: str) -> None:
        """Read the page, or start one with a title; ``begin`` is its first mark.

        Raises:
            SaekitError: there is a page without the marks.
        """
        self.path, self.begin = path, begin
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if path.exists() else f"# {title}\n\n{begin}\n{END}\n"
        if not (text.count(begin) == text.count(END) == 1):
            raise SaekitError(f"'{path}' does not have the marks '{begin}' and '{END}' once each")
        self.before, rest = text.split(begin)
        self.after = rest.split(END)[1]

    def write(self, body: str) -> None:
        """Put this between the marks."""
        text = f"{self.before}{self.begin}\n{body}\n{END}{self.after}"
        replace_file(self.path, lambda part: part.write_text(text))
