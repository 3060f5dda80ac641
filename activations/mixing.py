"""Documents of several texts by weights, and contexts drawn at random from a pool, before the model sees any."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

import torch

from saekit.activations.tokens import ContextBatch, Ids

BYTES = 9  # that the pool takes for each token: its id, the number of its document, whether it is kept


def by_weight(
    texts: Sequence[tuple[float, Callable[[], Iterator[Ids]]]],
    *,
    again: bool,
    tell: Callable[[int, int], object] = lambda number, tokens: None,
) -> Iterator[Ids]:
    """Documents of several texts, so that of all tokens at any place each has its part, as near as documents allow.

    The next document is of the text that has the fewest tokens for its part, the first of those where several have.

    Args:
        texts: the part of each of all tokens, and what makes its documents [m], the same ones each time.
        again: whether a text that ends begins again until each has ended once; else the first that ends ends all.
        tell: called where a text begins again for the first time, with its number and its tokens.
    """
    parts, makers = [part for part, _ in texts], [make for _, make in texts]
    arriving = [make() for make in makers]
    taken, ended, empty = [0] * len(texts), [False] * len(texts), [True] * len(texts)
    while True:
        least = min(range(len(texts)), key=lambda number: taken[number] / parts[number])
        document = next(arriving[least], None)
        if document is None:
            first, ended[least] = not ended[least], True
            if all(ended) or not again or empty[least]:
                return
            if first:
                tell(least, taken[least])
            arriving[least], empty[least] = makers[least](), True
            continue
        empty[least] = False
        taken[least] += len(document)
        yield document


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
