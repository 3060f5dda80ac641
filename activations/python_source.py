"""The default text: the Python source code that stands on every machine where saekit runs.

The corpus is the interpreter's standard library and the packages that saekit depends on, read in place. Left out are
tests, vendored copies, character tables and generated modules, the near-identical model files of ``transformers``, and
every file that repeats another's content, so that held-out text is not a copy of training text.

Each file belongs to one part (``"train"``, ``"calibration"`` or ``"heldout"``) by a hash of its name, its path below
``site-packages`` or below the standard library, so the division is the same on every machine and for every model,
dictionary and evaluation. The model and the dictionaries learn from ``train``; inference thresholds are set on
``calibration``; every figure that is reported comes from ``heldout``.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

Split = Literal["train", "calibration", "heldout"]

CALIBRATION_SHARE, HELDOUT_SHARE = 0.02, 0.08
_MAX_BYTES = 300_000  # longer modules are generated tables
_LEFT_OUT = re.compile(
    r"""(^|/)(tests?|testing|_vendor|encodings|idle_test)/   # tests, vendored copies, character tables
      | (^|/)(test_[^/]*|conftest|[^/]*_test|[^/]*_pb2)\.py$
      | ^transformers/models/                                # one file copied hundreds of times
    """,
    re.VERBOSE,
)


class SourceFile(NamedTuple):
    """A file of the corpus: its name (the same on every machine) and where it stands on this one."""

    name: str
    path: Path


def _hash(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64


def split_of(name: str) -> Split:
    """The part that a file of this name belongs to."""
    # The hash of the name orders the files, so the division needs a hash of its own.
    place = _hash("split:" + name)
    if place < CALIBRATION_SHARE:
        return "calibration"
    return "heldout" if place < CALIBRATION_SHARE + HELDOUT_SHARE else "train"


def _dependencies(root: str = "saekit") -> list[metadata.Distribution]:
    """The installed packages that ``root`` needs, directly or through another package (extras and itself left out)."""
    found: dict[str, metadata.Distribution] = {}
    names = [root]
    while names:
        name = re.sub(r"[-_.]+", "-", names.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # needed on another platform only
            continue
        for requirement in found[name].requires or []:
            if "extra ==" not in requirement and (match := re.match(r"[\w.-]+", requirement)):
                names.append(match.group())
    return [found[name] for name in sorted(found) if name != root]  # its own code changes from day to day


@lru_cache(maxsize=1)
def source_files() -> tuple[SourceFile, ...]:
    """Every file of the corpus, all parts, in an order that mixes the packages (by a hash of the name)."""
    standard_library = Path(sysconfig.get_path("stdlib"))
    candidates = [
        SourceFile("stdlib/" + name, path)
        for path in standard_library.rglob("*.py")
        if not (name := path.relative_to(standard_library).as_posix()).startswith(("site-packages/", "dist-packages/"))
    ]
    for distribution in _dependencies():
        for file in distribution.files or []:
            if file.suffix == ".py" and ".." not in file.parts:
                candidates.append(SourceFile(file.as_posix(), Path(str(file.locate()))))
    candidates = [file for file in candidates if file.path.is_file()]
    return tuple(sorted((f for f in candidates if not _LEFT_OUT.search(f.name)), key=lambda f: _hash(f.name)))


def documents(split: Split) -> Iterator[tuple[str, str]]:
    """``(name, text)`` of each file of one part, in a fixed order; repeated contents and tiny files are left out."""
    seen: set[bytes] = set()
    for name, path in source_files():
        try:
            content = path.read_bytes()
            text = content.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        digest = hashlib.blake2b(content, digest_size=16).digest()
        if not 200 <= len(content) <= _MAX_BYTES or digest in seen:
            continue
        seen.add(digest)  # over all parts: a copy of a training file must not be held-out text
        if split_of(name) == split:
            yield name, text
