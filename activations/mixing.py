"""Documents of several texts by weights, and contexts drawn at random from a pool, before the model sees any."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import torch

from saekit.activations.tokens import ContextBatch, Ids
from saekit.errors import SaekitError

BYTES = 9  # that the pool takes for each token: its id, the number of its document, whether it is kept


class Source(NamedTuple):
    """A text of a mix.

    Attributes:
        name: it, for messages.
        part: of all tokens.
        documents: makes its documents [m], the same ones each time.
    """

    name: str
    part: float
    documents: Callable[[], Iterator[Ids]]


def by_weight(texts: Sequence[Source], tell: Callable[[str, int], object] = lambda name, tokens: None) -> Iterator[Ids]:
    """Documents of several texts, so that of all tokens at any place each has its part, as near as documents allow.

    The next document is of the text that has the fewest tokens for its part, the first of those where several have;
    tokens that do not count (−1 − id) are not of them. A text that ends begins again until each has ended once.

    Args:
        texts: they.
        tell: called where a text begins again for the first time, with its name and its tokens.

    Raises:
        SaekitError: a text has no token that counts.
    """
    arriving = [text.documents() for text in texts]
    taken, before, ended = [0] * len(texts), [0] * len(texts), [False] * len(texts)
    while True:
        least = min(range(len(texts)), key=lambda number: taken[number] / texts[number].part)
        document = next(arriving[least], None)
        if document is not None:
            taken[least] += int((document >= 0).sum())
            yield document
            continue
        if taken[least] == before[least]:
            raise SaekitError(f"'{texts[least].name}', {texts[least].part:.0%} of the mix, has no token that counts")
        first, ended[least], before[least] = not ended[least], True, taken[least]
        if all(ended):
            return
        if first:
            tell(texts[least].name, taken[least])
        arriving[least] = texts[least].documents()


def mixed(
    contexts: Iterable[ContextBatch],
    pool: int,
    seed: int | str,
    *,
    size: int | None = None,
    short: Callable[[int], object] | None = None,
) -> Iterator[ContextBatch]:
    """The same contexts in another order: each is drawn from the ``pool`` contexts that stand before it and waits.

    The pool is filled; then each context that arrives takes the place of one drawn by chance, which is handed on. What
    is in the pool where the text ends follows in a random order, so a text of fewer contexts is permuted as a whole.

    Args:
        contexts: in batches of any size, all contexts of one length.
        pool: contexts that are held, about ``BYTES`` bytes for each of their tokens.
        seed: of the order; the number and sizes of the batches play no part.
        size: contexts a batch that is handed on; as many as the first that arrives has if not given. The last may be
            smaller.
        short: called where the pool is not filled, before any context is handed on: with the kept positions of all.
    """
    digest = hashlib.blake2b(str(seed).encode(), digest_size=8, person=b"contexts").digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    arriving = iter(contexts)
    first = next(arriving, None)
    if first is None:
        return
    size = size or len(first.tokens)
    kinds = (torch.int32, torch.int32, torch.bool)
    held = [torch.empty(pool, *column.shape[1:], dtype=kind) for column, kind in zip(first, kinds, strict=True)]
    filled = 0
    drawn: list[ContextBatch] = []
    for batch in chain([first], arriving):
        columns = [column.to(kind) for column, kind in zip(batch, kinds, strict=True)]
        free = min(pool - filled, len(batch.tokens))
        for place, column in zip(held, columns, strict=True):
            place[filled : filled + free] = column[:free]
        filled += free
        slots = torch.randint(pool, (len(batch.tokens) - free,), generator=generator).tolist()
        for row, slot in enumerate(slots, free):
            drawn.append(ContextBatch(*(place[slot].clone() for place in held)))
            for place, column in zip(held, columns, strict=True):
                place[slot] = column[row]
            if len(drawn) == size:
                yield _stacked(drawn)
                drawn = []
    if short is not None and filled < pool:
        short(int(held[-1][:filled].sum()))
    for slot in torch.randperm(filled, generator=generator).tolist():
        drawn.append(ContextBatch(*(place[slot] for place in held)))
        if len(drawn) == size:
            yield _stacked(drawn)
            drawn = []
    if drawn:
        yield _stacked(drawn)


def _stacked(rows: Sequence[ContextBatch]) -> ContextBatch:
    """Contexts as one batch, with the types that models take."""
    tokens, documents, kept = (torch.stack(column) for column in zip(*rows, strict=True))
    return ContextBatch(tokens.long(), documents.long(), kept)
