"""One way to ask for special tokens: of tokenizers, hooked models and plain ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from saekit.special_tokens import SpecialTokens, special_tokens


def owner(**fields):
    return SimpleNamespace(**fields)


def tokens(bos=None, eos=None, pad=None, **fields):
    return owner(bos_token_id=bos, eos_token_id=eos, pad_token_id=pad, **fields)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (tokens(1, 2, 0), (1, 2, 0)),
        (tokens(), (None, None, None)),
        (tokens(bos=0), (0, 0, None)),  # BOS separates where nothing else does
        (tokens(cls_token_id=101, sep_token_id=102, pad=0), (101, 102, 0)),  # an encoder's
        (owner(tokenizer=tokens(eos=3), config=tokens(1, 2)), (None, 3, None)),  # its tokenizer knows best
        (owner(tokenizer=tokens(5, 210), cfg=owner(d_vocab=208)), (5, None, None)),  # no such row
        (owner(config=tokens(1, [106, 1])), (1, 106, None)),
        (owner(config=owner(text_config=tokens(2, 1, 0))), (2, 1, 0)),
        (owner(config=owner(get_text_config=lambda: tokens(2, 1, 0))), (2, 1, 0)),
        (owner(config=owner(), generation_config=tokens(2, 1)), (2, 1, None)),
        (owner(special_tokens=SpecialTokens(7, 8, 9), tokenizer=tokens(1, 2)), (7, 8, 9)),
        (owner(), (None, None, None)),
    ],
)
def test_special_tokens(asked, expected):
    assert special_tokens(asked) == expected
