"""The special tokens of a model: the one place that knows where they are told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class SpecialTokens(NamedTuple):
    """Ids of special tokens; None for those that a model does not have.

    Attributes:
        bos: what a text begins with: BOS, or the classification token of an encoder.
        separator: what stands between texts: EOS, or an encoder's separator, or BOS where there is neither.
        pad: what fills up a batch.
    """

    bos: int | None = None
    separator: int | None = None
    pad: int | None = None

    def within(self, rows: int) -> SpecialTokens:
        """Those that an embedding of so many rows has."""
        return SpecialTokens(*(token if token is not None and token < rows else None for token in self))


def special_tokens(owner: Any) -> SpecialTokens:
    """The special tokens of a tokenizer, a hooked model or any model of Hugging Face's kind.

    A tokenizer knows best, and what it does not have is not looked for elsewhere: a configuration's default would be an
    ordinary token, and TransformerLens's substitute a row of the embedding that nobody trained. So a model that
    ``load_model`` made keeps what its tokenizer said before TransformerLens changed it. A model without a tokenizer is
    asked for its configuration, and a multimodal one for that of its text part.
    """
    kept = getattr(owner, "special_tokens", None)
    if isinstance(kept, SpecialTokens):
        return kept
    if getattr(owner, "tokenizer", None) is not None:
        known = special_tokens(owner.tokenizer)
        rows = getattr(getattr(owner, "cfg", None), "d_vocab", None)
        return known.within(rows) if isinstance(rows, int) and rows > 0 else known
    config = getattr(owner, "config", None)
    if config is None:
        return _from(lambda name: _id(owner, name))
    configs = [config, _text_part(config), getattr(owner, "generation_config", None)]
    return _from(lambda name: _first(_id(each, name) for each in configs))


def _from(token: Callable[[str], int | None]) -> SpecialTokens:
    bos, end = _first(map(token, ("bos", "cls"))), _first(map(token, ("eos", "sep")))
    return SpecialTokens(bos, bos if end is None else end, token("pad"))


def _first(tokens: Any) -> int | None:
    return next((token for token in tokens if token is not None), None)


def _id(owner: Any, name: str) -> int | None:
    """A token's id; the first where there are several (Gemma 3 ends by either of two)."""
    token = getattr(owner, f"{name}_token_id", None)
    if isinstance(token, list | tuple):
        token = token[0] if token else None
    return token if isinstance(token, int) and token >= 0 else None


def _text_part(config: Any) -> Any:
    """The configuration of the part of a model that reads text; None where it is not told apart."""
    ask = getattr(config, "get_text_config", None)
    try:
        return ask() if callable(ask) else getattr(config, "text_config", None)
    except ValueError:  # several parts read text
        return getattr(config, "text_config", None)
