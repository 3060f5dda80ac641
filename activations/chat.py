"""Conversations: messages that a tokenizer's chat template makes into text, and which of it counts."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from saekit.errors import SaekitError, first_line

TrainOn = Literal["all", "assistant", "user"]
_KEYS = (("role", "content"), ("from", "value"))  # as most datasets call them, and as those of ShareGPT's form do
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
_DAY = datetime(2024, 7, 26)
# what templates that tell the date are told, so that a text is the same on any day
_DATED = "".join(
    f"|replace('%-{each}', '{int(_DAY.strftime(f'%{each}'))}')|replace('%{each}', '{_DAY.strftime(f'%{each}')}')"
    for each in "dHIjmMSy"
) + "".join(f"|replace('%{each}', '{_DAY.strftime(f'%{each}')}')" for each in "aAbBpYDFeT")
_DATE = f"{{%- macro strftime_now(format) -%}}{{{{ format{_DATED} }}}}{{%- endmacro -%}}"
_MARK = re.compile("\ue000(\\d+)\ue001")  # of private characters, in the place of a message


class Message(NamedTuple):
    """Who says what."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """A document of messages.

    Attributes:
        messages: them.
        train_on: whose messages count; all of the text, the template's own too, with ``all``.
        where: it stands, for messages.
    """

    messages: tuple[Message, ...]
    train_on: TrainOn = "all"
    where: str = field(default="a conversation", compare=False)

    def __len__(self) -> int:
        """Characters of all messages."""
        return sum(len(message.content) for message in self.messages)


class Rendered(NamedTuple):
    """A conversation as text.

    Attributes:
        text: it, without the BOS that a template writes itself.
        counted: start and end of the places whose tokens count; None for all of them.
    """

    text: str
    counted: list[tuple[int, int]] | None


def conversation(value: Any, train_on: TrainOn, where: str = "a conversation") -> Conversation:
    """The conversation in a cell of a dataset.

    Args:
        value: messages with ``role`` and ``content``, or ``from`` and ``value``; as a list of messages, or, as some
            Parquet files hold them, a list for each key.
        train_on: whose messages count.
        where: it stands, for messages.

    Raises:
        ValueError: it is none; the message completes "holds ...".
    """
    if isinstance(value, Mapping):
        if len({len(each) for each in value.values() if isinstance(each, Sequence)}) != 1:
            raise ValueError(f"{type(value).__name__}, not a list of messages")
        value = [dict(zip(value, each, strict=True)) for each in zip(*value.values(), strict=True)]
    if not isinstance(value, list | tuple | np.ndarray | None):
        raise ValueError(f"{type(value).__name__}, not a list of messages")
    return Conversation(tuple(map(_message, [] if value is None else value)), train_on, where)


def _message(value: Any) -> Message:
    keys = next((pair for pair in _KEYS if isinstance(value, Mapping) and pair[0] in value), None)
    if keys is None:
        told = f"the keys {', '.join(map(str, value))}" if isinstance(value, Mapping) else type(value).__name__
        raise ValueError(f"{told} for a message, not role and content")
    role, content = value[keys[0]], value.get(keys[1])
    if isinstance(content, list) and all(
        isinstance(each, Mapping) and isinstance(each.get("text"), str) for each in content
    ):
        content = "".join(each["text"] for each in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"a message of '{role}' whose {keys[1]} is {type(content).__name__}, not text")
    return Message(_ROLES.get(role.lower(), role.lower()), content)


def check_template(tokenizer: Any, name: str) -> None:
    """Raise SaekitError where a model's tokenizer has no chat template."""
    try:
        tokenizer.get_chat_template()
    except (ValueError, AttributeError):
        raise SaekitError(f"the tokenizer of '{name}' has no chat template, which --messages-column needs") from None


def template_fingerprint(tokenizer: Any) -> str:
    """A digest of a tokenizer's chat template and of its special tokens."""
    special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())  # which it may write
    return hashlib.blake2b(repr([tokenizer.get_chat_template(), special]).encode(), digest_size=16).hexdigest()


def rendered(document: Conversation, tokenizer: Any) -> Rendered:
    """A conversation by the tokenizer's chat template.

    Which of its characters are a message's own is found by rendering marks in the place of the messages; so the
    template may be any that writes of each message the whole or a part of it that is in one piece.

    Raises:
        SaekitError: the template refuses the conversation, writes none of its messages, or changes one where those of
            one role count.
    """
    contents = [message.content for message in document.messages]
    text = _by_template(tokenizer, document, contents)
    if any(map(str.strip, contents)) and not any(words.strip() in text for words in contents if words.strip()):
        raise SaekitError(f"the chat template writes no message of {document.where} as it is")
    counted = None
    if document.train_on != "all":
        marked = [f"\ue000{i}\ue001" if words.strip() else words for i, words in enumerate(contents)]
        counted = _places(document, text, _MARK.split(_by_template(tokenizer, document, marked)))
    bos = getattr(tokenizer, "bos_token", None)
    begin = len(bos) if bos and text.startswith(bos) else 0  # packing puts it where it belongs
    return Rendered(text[begin:], None if counted is None else [(a - begin, b - begin) for a, b in counted])


def _by_template(tokenizer: Any, document: Conversation, contents: list[str]) -> str:
    messages = [{"role": m.role, "content": content} for m, content in zip(document.messages, contents, strict=True)]
    try:
        template = _DATE + tokenizer.get_chat_template()
        return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))
    except Exception as error:  # templates raise what they like
        raise SaekitError(f"the chat template refuses {document.where}: {first_line(error)}") from error


def _places(document: Conversation, text: str, pieces: list[str]) -> list[tuple[int, int]]:
    """Where the messages that count stand in a text that is made of these pieces and the messages between them.

    Args:
        document: the conversation.
        text: it, by the template.
        pieces: what the template writes, by turns with the numbers of messages.
    """
    counted, end = [], len(pieces[0])
    fits = text.startswith(pieces[0])
    for number, after in zip(map(int, pieces[1::2]), pieces[2::2], strict=True):
        message = document.messages[number]
        written = _written(message.content, text, end, after, own=message.role == document.train_on)
        if written is None:
            fits = False
            break
        if message.role == document.train_on:
            counted.append((end, end + written))
        end += written + len(after)
    if not fits or end != len(text):
        raise SaekitError(
            f"the chat template changes a message of {document.where}, so that which tokens are of "
            f"'{document.train_on}' is not known; --train-on all takes every token"
        )
    return counted


def _written(content: str, text: str, start: int, after: str, *, own: bool) -> int | None:
    """How many characters a template has written of a message, before what comes after it; None where it is changed."""
    for words in (content, content.strip(), content.lstrip(), content.rstrip()):
        if text.startswith(words + after, start):
            return len(words)
    stop = text.find(after, start) if after else len(text)
    if stop < 0 or (own and text[start:stop].strip() not in content):
        return None
    return stop - start


def counted_of(offsets: Sequence[tuple[int, int]], places: list[tuple[int, int]]) -> NDArray[np.bool_]:
    """[m] whether tokens with these offsets [m, 2] in a text have a character in one of the places, which ascend."""
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    starts = np.minimum(starts, ends - 1)  # spaces alone, where a tokenizer takes those from offsets: they end there
    first, last = np.array([place for place in places if place[0] < place[1]], dtype=np.int64).reshape(-1, 2).T
    found: NDArray[np.bool_] = np.searchsorted(last, starts, side="right") < np.searchsorted(first, ends, side="left")
    return found
