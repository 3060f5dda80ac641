"""Documents in the rows of a dataset: texts, token ids or conversations, and what divides them into parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from saekit.activations.chat import Conversation, TrainOn, conversation
from saekit.activations.python_source import CALIBRATION_SHARE, HELDOUT_SHARE, Split
from saekit.activations.tokens import Document, Ids
from saekit.errors import SaekitError, did_you_mean, first_line
from saekit.no_installs import no_installs


class Divided(NamedTuple):
    """A document and the part that it belongs to."""

    part: Split
    document: Document


@dataclass(frozen=True)
class Columns:
    """Which columns of a dataset are read.

    Attributes:
        text: that of the text.
        tokens: that of lists of token ids, which are read in place of the text where it is named.
        messages: that of conversations, which are read in place of the text where it is named.
        train_on: whose messages count.
        group: that whose value divides the documents; their content does if not given.
        vocabulary: ids are less than this, where it is known.
    """

    text: str = "text"
    tokens: str | None = None
    messages: str | None = None
    train_on: TrainOn = "all"
    group: str | None = None
    vocabulary: int | None = None

    @property
    def key(self) -> tuple[str, ...]:
        """What the documents and their division depend on, and the vocabulary by which ids were checked."""
        told = [
            ("tokens", self.tokens),
            ("group", self.group),
            ("vocabulary", self.vocabulary),
        ]  # ids are checked by it
        told += [("messages", self.messages), ("train_on", self.train_on)] if self.messages is not None else []
        return (self.text, *(str(word) for pair in told if pair[1] is not None for word in pair))

    def refuse(self, dataset: str) -> None:
        """Raise SaekitError where a column is named of a text that has none."""
        for column in ("tokens", "messages", "group"):
            if (name := getattr(self, column)) is not None:
                raise SaekitError(f"'{dataset}' has no columns; leave --{column}-column {name} away")

    def documents(self, dataset: str, rows: Iterable[Any]) -> Callable[[], Iterator[Divided]]:
        """The documents of rows; those that are empty or null are left out.

        What is made raises SaekitError: a column is missing, holds something else, or the rows cannot be read.
        """

        def read() -> Iterator[Divided]:
            number = 0
            try:
                for number, row in enumerate(_guarded(rows)):
                    where = f"of '{dataset}' holds {{}} in row {number}"
                    document = self._document(dataset, row, where, number)
                    group = None if self.group is None else _group(dataset, row, self.group, where)
                    if len(document):
                        yield Divided(part_of(document if group is None else group), document)
            except SaekitError:
                raise
            except Exception as error:  # damaged files show while they are read
                raise SaekitError(
                    f"cannot read row {number} or the next of '{dataset}': {first_line(error)}"
                ) from error

        return read

    def _document(self, dataset: str, row: Any, where: str, number: int) -> Document:
        if self.tokens is not None:
            return self._tokens(dataset, row, where)
        if self.messages is None:
            return self._text(dataset, row, where)
        cell = _cell(dataset, row, self.messages)
        try:
            return conversation(cell, self.train_on, f"row {number} of '{dataset}'")
        except ValueError as error:
            raise SaekitError(f"the column '{self.messages}' {where.format(error)}") from None

    def _text(self, dataset: str, row: Any, where: str) -> str:
        text = _cell(dataset, row, self.text)
        if not isinstance(text, str | None):
            raise SaekitError(f"the column '{self.text}' {where.format(type(text).__name__)}, not text")
        return text or ""

    def _tokens(self, dataset: str, row: Any, where: str) -> Ids:
        assert self.tokens is not None
        found, told = _cell(dataset, row, self.tokens), f"the column '{self.tokens}' {where}"
        if not isinstance(found, list | tuple | np.ndarray | None):
            raise SaekitError(f"{told.format(type(found).__name__)}, not lists of token ids")
        if found is None or not len(found):
            return np.empty(0, np.int64)
        odd = next((each for each in found if not isinstance(each, int | np.integer) or isinstance(each, bool)), None)
        if odd is not None or None in found:
            raise SaekitError(f"{told.format(f'a list with {odd!r}')}, not one of token ids")
        least, most = min(found), max(found)
        if least < 0 or (self.vocabulary is not None and most >= self.vocabulary):
            bound = "" if self.vocabulary is None else f" of 0 to {self.vocabulary - 1:,}, as the model's vocabulary"
            raise SaekitError(f"{told.format(f'the token id {least if least < 0 else most}')}, which is none{bound}")
        return np.asarray(found, dtype=np.int64)


def _cell(dataset: str, row: Any, column: str) -> Any:
    if column not in row:
        chat = next((name for name in ("messages", "conversations") if name in row and column == "text"), None)
        hint = did_you_mean(column, row) if chat is None else f"; for its conversations: --messages-column {chat}"
        raise SaekitError(f"the dataset '{dataset}' has no column '{column}'{hint}")
    return row[column]


def _group(dataset: str, row: Any, column: str, where: str) -> str:
    value = _cell(dataset, row, column)
    if isinstance(value, list | dict):
        raise SaekitError(f"the column '{column}' {where.format(type(value).__name__)}, not one value to divide by")
    if value is None or value != value or value == "":  # NaN is how tables write what is missing
        raise SaekitError(f"the column '{column}' {where.format('nothing')}; documents cannot be divided by it")
    return str(value)


def content(document: Document) -> bytes:
    """What a document is told from others by."""
    if isinstance(document, Conversation):
        return json.dumps(document.messages).encode()
    return document.encode("utf-8", "replace") if isinstance(document, str) else document.astype("<i8").tobytes()


def part_of(decides: Document) -> Split:
    """The part that a document belongs to, by its content or by the value that stands for its group."""
    place = int.from_bytes(hashlib.blake2b(content(decides), digest_size=8).digest(), "big") / 2**64
    if place < CALIBRATION_SHARE:
        return "calibration"
    return "heldout" if place < CALIBRATION_SHARE + HELDOUT_SHARE else "train"


def _guarded(rows: Iterable[Any]) -> Iterator[Any]:
    """The rows, none of which installs anything while it is read."""
    with no_installs():
        reader = iter(rows)
    end = object()
    while True:
        with no_installs():
            row = next(reader, end)
        if row is end:
            return
        yield row
