"""Where text comes from: Python source on this machine, local files, or a dataset of the Hugging Face hub.

Every source divides its documents into the same three parts (see ``python_source``): ``train``, ``calibration`` and
``heldout``. Files of Python source are divided by their names, the documents of every other source by a hash of their
content, so that a document that occurs twice is never on both sides.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from saekit.activations import python_source
from saekit.activations.python_source import CALIBRATION_SHARE, HELDOUT_SHARE, Split
from saekit.errors import SaekitError, did_you_mean

PYTHON = "python"
SPLITS: tuple[Split, ...] = get_args(Split)
_LOADERS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class TextSource:
    """Text with a name and a fingerprint.

    Attributes:
        name: what the user wrote.
        fingerprint: changes when the text does.
        documents: from a part of the text to an iterator over its documents, in a fixed order.
    """

    name: str
    fingerprint: str
    documents: Callable[[Split], Iterator[str]]


def part_of(text: str) -> Split:
    """The part that a document belongs to, by its content."""
    place = int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big") / 2**64
    if place < CALIBRATION_SHARE:
        return "calibration"
    return "heldout" if place < CALIBRATION_SHARE + HELDOUT_SHARE else "train"


def open_text(
    dataset: str = PYTHON, *, column: str = "text", split: str = "train", streaming: bool = True
) -> TextSource:
    """Open a text source.

    Args:
        dataset: ``"python"``, a local file or glob pattern (.txt, .md, .jsonl, .json, .parquet), a folder saved by
            ``datasets``, or a name on the hub.
        column: the column that holds the text (not for plain text).
        split: the split of a hub dataset.
        streaming: whether a hub dataset is read as it downloads.

    Raises:
        SaekitError: nothing of that name is found, it is empty, or it has no such column.
    """
    if dataset == PYTHON:
        return _python()
    files = sorted(glob.glob(os.path.expanduser(dataset), recursive=True))
    files = [f for f in files if Path(f).is_file()]
    if files:
        return _local(dataset, files, column)
    if Path(dataset).suffix.lower() in _LOADERS or Path(dataset).is_absolute() or dataset.startswith((".", "~")):
        raise SaekitError(f"no text file matches '{dataset}'")
    return _hub(dataset, column, split, streaming)


def _python() -> TextSource:
    digest = hashlib.blake2b(digest_size=16)
    for name, path in python_source.source_files():
        digest.update(f"{name}:{path.stat().st_size}\n".encode())
    return TextSource(PYTHON, digest.hexdigest(), lambda part: (text for _, text in python_source.documents(part)))


def _local(dataset: str, files: list[str], column: str) -> TextSource:
    kinds = {Path(f).suffix.lower() for f in files}
    if len(kinds) > 1 or (kind := kinds.pop()) not in _LOADERS:
        raise SaekitError(f"'{dataset}' is not of one known kind of text file ({', '.join(_LOADERS)})")
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with open(file, "rb") as content:
            while block := content.read(1 << 22):
                digest.update(block)
    if _LOADERS[kind] == "text":
        return _divided(dataset, digest.hexdigest(), lambda: (block for f in files for block in _blocks(Path(f))))
    rows = _load(dataset, _LOADERS[kind], data_files=files, split="train", streaming=True)
    return _divided(dataset, digest.hexdigest(), _column(dataset, rows, column))


def _hub(dataset: str, column: str, split: str, streaming: bool) -> TextSource:
    rows = _load(dataset, dataset, split=split, streaming=streaming)
    version = str(getattr(rows.info, "version", "") or "")
    checksums = sorted(getattr(rows.info, "download_checksums", None) or {})
    fingerprint = hashlib.blake2b(f"{dataset}@{split}@{version}@{checksums}".encode(), digest_size=16).hexdigest()
    return _divided(dataset, fingerprint, _column(dataset, rows, column))


def _load(dataset: str, loader: str, **options: Any) -> Any:
    from datasets import load_dataset
    from datasets.utils.logging import disable_progress_bar, set_verbosity_error

    set_verbosity_error()
    disable_progress_bar()
    try:
        return load_dataset(loader, **options)
    except Exception as error:  # datasets raises a dozen kinds for a missing or unreadable data set
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        hint = did_you_mean(dataset, [PYTHON])
        raise SaekitError(f"cannot open the dataset '{dataset}': {reason}{hint if 'did' in hint else ''}") from error


def _column(dataset: str, rows: Any, column: str) -> Callable[[], Iterator[str]]:
    first = next(iter(rows), None)
    if first is None:
        raise SaekitError(f"the dataset '{dataset}' is empty")
    if column not in first:
        raise SaekitError(f"the dataset '{dataset}' has no column '{column}'{did_you_mean(column, first)}")
    if not isinstance(first[column], str):
        raise SaekitError(f"the column '{column}' of '{dataset}' holds {type(first[column]).__name__}, not text")
    return lambda: (row[column] for row in rows if row[column])


def _blocks(path: Path) -> Iterator[str]:
    """The documents of a plain text file: blocks of whole lines, 200 to 2,000 characters or a little more.

    Plain text does not mark its documents; about 200 blocks a small file make three parts possible.
    """
    least = min(2000, max(200, path.stat().st_size // 200))
    lines: list[str] = []
    size = 0
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                lines.append(line)
                size += len(line)
                if size >= least:
                    yield "".join(lines)
                    lines, size = [], 0
    except UnicodeDecodeError as error:
        raise SaekitError(f"'{path}' is not UTF-8 text: byte {error.start}") from None
    if "".join(lines).strip():
        yield "".join(lines)


def _divided(name: str, fingerprint: str, documents: Callable[[], Iterator[str]]) -> TextSource:
    return TextSource(name, fingerprint, lambda part: (text for text in documents() if part_of(text) == part))
