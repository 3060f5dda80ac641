"""Token ids of a text on disk, so that each tokenizer goes over it once and not in every run.

They lie below the user's cache folder, one folder for each text, part, order and tokenizer; ``SAEKIT_TOKENS`` names
another place, or ``off``. Where they take more than ``SAEKIT_TOKENS_GB`` (10), those used longest ago make room.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from saekit.activations.tokens import DOCUMENTS, Document, Ids, encoded, tokenizer_fingerprint
from saekit.errors import SaekitError, SaekitWarning, first_line
from saekit.files import expanded, replace_file

_FIRST = 1 << 18  # tokens of the first file; the later ones hold a quarter of all before them, to _MOST
_MOST = 1 << 23
_FORMAT = 1


def token_folder() -> Path | None:
    """Where token ids are kept; None where they are not."""
    named = os.environ.get("SAEKIT_TOKENS")
    if named == "off":
        return None
    if named:
        return expanded(named)
    try:
        return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "saekit" / "tokens"
    except SaekitError:  # whoever has no home keeps none
        return None


def stored(key: Sequence[object], documents: Iterable[Document], tokenizer: Any) -> Iterator[Ids]:
    """``tokens.encoded``, read from the disk as far as it was done before; the rest is kept there.

    Args:
        key: what the ids depend on beside the tokenizer.
        documents: not read where the ids of all that is asked for are there.
        tokenizer: a Hugging Face tokenizer.

    Raises:
        SaekitError: ``SAEKIT_TOKENS_GB`` is no number.
    """
    home = token_folder()
    if home is None:
        yield from encoded(documents, tokenizer)
        return
    key = [*key, tokenizer_fingerprint(tokenizer)]
    digest = hashlib.blake2b(json.dumps([_FORMAT, *key]).encode(), digest_size=16).hexdigest()
    store = _Store(home / digest, _limit())
    done = 0
    for lengths, ids in store.read():
        done += len(lengths)
        ends = np.cumsum(lengths)
        yield from (ids[end - length : end].astype(np.int64) for length, end in zip(lengths, ends, strict=True))
    if store.whole:
        return
    waiting: list[Ids] = []
    for document in encoded(islice(documents, done, None), tokenizer):
        waiting.append(document)
        if len(waiting) % DOCUMENTS == 0 and sum(map(len, waiting)) >= store.next_size:
            store.add(waiting, whole=False)
            waiting = []
        yield document
    store.add(waiting, whole=True)


class _Store:
    """The files of one key: numbered, each with the ids of some documents and their lengths."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit, self.files, self.tokens, self.whole = folder, limit, 0, 0, False
        self.broken = False  # the folder cannot be written to

    @property
    def next_size(self) -> int:
        """Tokens that the next file is to hold."""
        return min(_MOST, max(_FIRST, self.tokens // 4))

    def _path(self) -> Path:
        return self.folder / f"{self.files:06d}.safetensors"

    def read(self) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """Lengths and ids of the documents, file by file; a damaged file ends it, and is written anew."""
        with suppress(OSError):
            os.utime(self.folder)  # it is in use: others make room first
        while not self.whole and self._path().is_file():
            try:
                found = load_file(self._path())
                lengths, ids = found["lengths"], found["ids"]
                if int(lengths.sum()) != len(ids) or (len(lengths) and int(lengths.min()) < 0):
                    raise ValueError("lengths do not fit")
            except (OSError, ValueError, KeyError, SafetensorError):
                return
            self.files, self.tokens, self.whole = self.files + 1, self.tokens + len(ids), bool(found["whole"][0])
            yield lengths, ids

    def add(self, documents: list[Ids], *, whole: bool) -> None:
        """Write one more file; where that fails, or there is no room, nothing more is kept."""
        if self.broken:
            return
        ids = np.concatenate([np.empty(0, np.int32), *documents], dtype=np.int32)
        columns = {"ids": ids, "lengths": np.array([len(each) for each in documents], np.int32)}
        columns["whole"] = np.array([whole], np.int32)
        try:
            if not _make_room(self.folder, ids.nbytes, self.limit):
                self.broken = True
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(self._path(), lambda part: save_file(columns, part))
        except (OSError, SaekitError, SafetensorError) as error:
            self.broken = True
            warnings.warn(f"token ids are not kept: {first_line(error)}", SaekitWarning, stacklevel=2)
            return
        self.files, self.tokens, self.whole = self.files + 1, self.tokens + len(ids), whole


def _limit() -> int:
    """Bytes that all token ids may take.

    Raises:
        SaekitError: ``SAEKIT_TOKENS_GB`` is no number.
    """
    asked = os.environ.get("SAEKIT_TOKENS_GB", "10")
    try:
        return int(float(asked) * 1e9)
    except (ValueError, OverflowError):
        raise SaekitError(f"SAEKIT_TOKENS_GB = '{asked}' is no number of gigabytes") from None


def kept(home: Path) -> dict[Path, int]:
    """The bytes of each text's folder, those used longest ago first."""
    folders = [each for each in home.iterdir() if each.is_dir()] if home.is_dir() else []
    folders.sort(key=lambda each: each.stat().st_mtime)
    return {each: sum(file.stat().st_size for file in each.glob("*.safetensors")) for each in folders}


def _make_room(folder: Path, needed: int, limit: int) -> bool:
    """Remove what was used longest ago until so many bytes find room beside the folder's own; whether they do."""
    found = kept(folder.parent)
    for other in list(found):
        if sum(found.values()) + needed <= limit:
            return True
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
            del found[other]
    return sum(found.values()) + needed <= limit
