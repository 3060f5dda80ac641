"""Which held-out text dictionaries are judged on: contexts from all of its documents, drawn by a hash."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from saekit.activations import ActivationSource, ContextBatch
from saekit.activations.boot import text_tokenizer
from saekit.activations.chat import Conversation
from saekit.activations.columns import content
from saekit.activations.harvesting import without_large
from saekit.activations.python_source import Split
from saekit.activations.tokens import Document
from saekit.errors import SaekitError

STRIDE = 8  # one context in so many of the text that is drawn
_CHARACTERS = 4  # of a token, about
_LENGTH = (
    16 * _CHARACTERS
)  # characters of an excerpt for each token of a context: about 16 contexts, which few documents exceed
_SCANNED = 256  # characters read for each token that is asked for, against texts without end
_LEAST = 1 << 25  # characters read in any case: the same text for any number of tokens up to 131,072
_POOL = 8 * STRIDE  # characters kept for each token that is asked for


class Excerpt(NamedTuple):
    """A document or a part of it.

    Attributes:
        rank: a hash of the text; excerpts are taken in this order.
        document: running number of its document.
        text: it.
        cut: whether the document goes on after it.
    """

    rank: bytes
    document: int
    text: Document
    cut: bool

    @property
    def size(self) -> int:
        """Characters, about; a token counts for four."""
        return _size(self.text)


class Drawn(NamedTuple):
    """Contexts to judge on.

    Attributes:
        contexts: them; documents are numbered in the order in which they occur.
        documents: how many documents they were drawn from.
        whole: whether those are all held-out documents; else the text was read in part, being long.
        shares: kept tokens of each text of a mix, in words; empty where the text is none.
    """

    contexts: ContextBatch
    documents: int
    whole: bool
    shares: str = ""

    @property
    def tokens(self) -> int:
        """Kept tokens."""
        return int(self.contexts.kept.sum())

    def about(self) -> dict[str, str]:
        """How they were drawn, for a report."""
        among = f"{'all' if self.whole else 'the first'} {self.documents:,} held-out documents"
        drawn = {"drawn": f"by a hash, one context in {STRIDE} of text drawn from {among}"}
        return {**drawn, "shares": self.shares} if self.shares else drawn


def heldout_contexts(
    source: ActivationSource,
    tokens: int,
    narrow: Callable[[ContextBatch], ContextBatch] | None = None,
    *,
    limit: float | None = None,
) -> ContextBatch:
    """Held-out contexts that hold at least this many kept tokens (all where there are fewer); see ``draw``."""
    return draw(source, tokens, narrow, limit=limit).contexts


def draw(
    source: ActivationSource,
    tokens: int,
    narrow: Callable[[ContextBatch], ContextBatch] | None = None,
    *,
    limit: float | None = None,
) -> Drawn:
    """Draw contexts from all held-out documents; the same ones for the same text, model and number of tokens.

    Documents, the longest in parts of about 16 contexts, are put in the order of a hash of their text and packed as
    for training; of the contexts that this makes, every eighth is taken, then every eighth after those, until there are
    enough. Of a mix each text is drawn from so, for its part of the tokens; where one has fewer held out, there are
    fewer in all. So each context is as likely as any other, and few come from one place. More tokens are the same
    contexts and others (nearly, where the text is longer than what is read of it: 256 characters a token, at least 32
    million).

    Args:
        source: the text.
        tokens: to keep.
        narrow: keeps fewer positions of a context, where not all text counts.
        limit: the largest ‖x‖ of a kept token, if there is one.

    Raises:
        SaekitError: there is no held-out text.
    """
    if source.text.shares:
        return _draw_mix(source, tokens, narrow, limit=limit)
    excerpts, documents, whole = _lowest(source.text.documents("heldout"), source.context_length, tokens)
    numbers = torch.tensor([excerpt.document for excerpt in excerpts])
    cut = torch.tensor([excerpt.cut for excerpt in excerpts])
    parts: list[ContextBatch] = []
    count = 0
    tokenizer = text_tokenizer(source.model)
    for batch in _every_eighth(source, [excerpt.text for excerpt in excerpts]):
        batch = ContextBatch(batch.tokens, batch.documents, batch.kept & ~_before_a_cut(batch, cut))
        batch = source.rules.narrowed(batch, tokenizer)
        batch = batch if limit is None else without_large(source.model, source.hook, limit, batch)
        batch = batch if narrow is None else narrow(batch)
        reached = batch.kept.sum(1).cumsum(0) + count
        needed = int((reached < tokens).sum()) + 1
        parts.append(batch.rows(0, needed))
        count = int(reached[min(needed, len(reached)) - 1])
        if count >= tokens:
            break
    found = ContextBatch(*(torch.cat(column) for column in zip(*parts, strict=True)))
    return Drawn(found._replace(documents=_in_order(numbers[found.documents])), documents, whole)


def _draw_mix(
    source: ActivationSource,
    tokens: int,
    narrow: Callable[[ContextBatch], ContextBatch] | None,
    *,
    limit: float | None,
) -> Drawn:
    """Contexts of the texts of a mix, each its part of the tokens, in turns."""
    shares = source.text.shares

    def drawn(tokens: float) -> list[Drawn]:
        asked = [(replace(source, text=text), max(1, math.ceil(part * tokens))) for text, part in shares]
        return [draw(one, wanted, narrow, limit=limit) for one, wanted in asked]

    found = drawn(tokens)
    held = min(each.tokens / part for each, (_, part) in zip(found, shares, strict=True))
    found = drawn(held) if held < tokens else found
    lengths = [each.contexts.tokens.shape[1] for each in found]
    if len(set(lengths)) > 1:
        short = shares[lengths.index(min(lengths))].text.name
        raise SaekitError(f"the heldout part of '{short}' does not fill one context of {source.context_length} tokens")
    before, parts = 0, []
    for each in found:
        parts.append(each.contexts._replace(documents=each.contexts.documents + before))
        before = int(parts[-1].documents.max()) + 1
    turns = torch.cat([(torch.arange(len(part.tokens)) + 0.5) / len(part.tokens) for part in parts]).argsort(
        stable=True
    )
    contexts = ContextBatch(*(torch.cat(column)[turns] for column in zip(*parts, strict=True)))
    names = [Path(text.name).name if Path(text.name).expanduser().is_absolute() else text.name for text, _ in shares]
    told = ", ".join(f"{each.tokens:,} tokens of '{name}'" for each, name in zip(found, names, strict=True))
    contexts = contexts._replace(documents=_in_order(contexts.documents))
    return Drawn(contexts, sum(each.documents for each in found), all(each.whole for each in found), told)


def _lowest(texts: Iterable[Document], context_length: int, tokens: int) -> tuple[list[Excerpt], int, bool]:
    """The excerpts of the lowest ranks, how many documents there are, and whether those are all."""
    kept: list[Excerpt] = []
    characters = waiting = document = 0
    for document, text in enumerate(texts, 1):
        if characters > max(_LEAST, _SCANNED * tokens):
            return _first(kept, _POOL * tokens), document - 1, False
        characters += _size(text)
        for excerpt in excerpts_of(text, document, _LENGTH * context_length):
            kept.append(excerpt)
            waiting += excerpt.size
        if waiting > 2 * _POOL * tokens:
            kept = _first(kept, _POOL * tokens)
            waiting = sum(excerpt.size for excerpt in kept)
    return _first(kept, _POOL * tokens), document, True


def _first(excerpts: list[Excerpt], characters: int) -> list[Excerpt]:
    """Those of the lowest ranks that hold so many characters."""
    excerpts.sort(key=lambda excerpt: (excerpt.rank, excerpt.document, excerpt.cut))
    for i, excerpt in enumerate(excerpts):
        characters -= excerpt.size
        if characters <= 0:
            return excerpts[: i + 1]
    return excerpts


def _size(document: Document) -> int:
    return _CHARACTERS * len(document) if isinstance(document, np.ndarray) else len(document)


def excerpts_of(text: Document, document: int, size: int) -> Iterator[Excerpt]:
    """A document in about equal parts of about ``size`` characters, a text cut after a line or else before a space.

    A conversation is one part: a template begins and ends it.
    """
    if isinstance(text, Conversation):
        rank = hashlib.blake2b(content(text), digest_size=8, person=b"drawn").digest()
        yield Excerpt(rank, document, text, False)
        return
    parts = max(1, round(_size(text) / size))
    start = 0
    for part in range(1, parts + 1):
        end = len(text) * part // parts
        if isinstance(text, str) and part < parts:
            end = _cut(text, max(start, end), size // 8)
        if len(piece := text[start:end]):
            rank = hashlib.blake2b(content(piece), digest_size=8, person=b"drawn").digest()
            yield Excerpt(rank, document, piece, end < len(text))
        start = end


def _cut(text: str, place: int, most: int) -> int:
    """Where to cut at a place or up to ``most`` characters later."""
    line = text.find("\n", place, place + most)
    if line >= 0:
        return line + 1
    space = text.find(" ", place, place + most)
    return space if space >= 0 else place


def _every_eighth(source: ActivationSource, texts: list[Document]) -> Iterator[ContextBatch]:
    """The contexts that the texts make: every eighth, then every eighth from the second, and so on."""
    rules = source.rules.packing()  # what is before a cut is seen where all text is kept
    packed = replace(source, text=replace(source.text, documents=lambda part: iter(texts)), rules=rules)
    part: Split = "heldout"
    for lap in range(STRIDE):
        for batch in packed.contexts(part, 4 * STRIDE):
            taken = ContextBatch(*(column[lap::STRIDE] for column in batch))
            if len(taken.tokens):
                yield taken


def _before_a_cut(batch: ContextBatch, cut: Bool[Tensor, "e"]) -> Bool[Tensor, "b t"]:
    """The positions whose next token is not the document's own, because the excerpt ends there."""
    ends = torch.zeros_like(batch.kept)
    ends[:, :-1] = ~batch.kept[:, 1:] | (batch.documents[:, 1:] != batch.documents[:, :-1])
    return ends & cut[batch.documents]


def _in_order(numbers: Tensor) -> Tensor:
    """Numbers from 0 in the order of their first occurrence, the same where they are the same."""
    values, inverse = torch.unique(numbers.flatten(), return_inverse=True)
    first = torch.full((len(values),), len(inverse)).scatter_reduce_(0, inverse, torch.arange(len(inverse)), "amin")
    return first.argsort().argsort()[inverse].reshape(numbers.shape)
