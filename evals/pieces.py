"""Tokens as text that people can read, one piece a token."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

_SHOWN = {"\n": "↵", "\r": "␍", "\t": "⇥"}
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # how SentencePiece writes a byte that is in no piece


def pieces(tokenizer: Any, tokens: Iterable[int]) -> list[str]:
    """The text that each token stands for, by itself.

    Spaces stay; line ends and tabs become ↵ and ⇥. Bytes that are no whole character, and characters that show nothing
    or turn the direction of writing, are escaped.

    Args:
        tokenizer: a Hugging Face tokenizer: byte-level (GPT-2, Llama 3), SentencePiece (Llama 2, Gemma) or WordPiece.
        tokens: their ids.
    """
    ids = [int(token) for token in tokens]
    known = {number: name for number, name in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)}
    byte_level = _is_byte_level(tokenizer)
    special = set(tokenizer.all_special_ids)
    return [_piece(known[i], byte_level and i not in special) if known[i] is not None else f"<{i}>" for i in ids]


def _piece(name: str, byte_level: bool) -> str:
    if byte_level and all(character in _bytes() for character in name):
        text = bytes(_bytes()[character] for character in name).decode("utf-8", "backslashreplace")
    elif match := _BYTE.fullmatch(name):
        text = bytes([int(match[1], 16)]).decode("utf-8", "backslashreplace")
    else:
        text = name.replace("▁", " ")
    return "".join(_SHOWN.get(c) or (c if c.isprintable() else f"\\u{ord(c):04x}") for c in text)


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether its pieces are spelled in the alphabet that has a letter for each byte."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # one written in Python; GPT-2's has the alphabet as a field
        return hasattr(tokenizer, "byte_decoder")
    return "ByteLevel" in repr(backend.decoder)


@cache
def _bytes() -> dict[str, int]:
    """The byte that each letter of the byte-level alphabet means: printable ones themselves, the others from U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
