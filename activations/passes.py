"""How many contexts a model takes in one pass, and passes of so many; rows and their order do not depend on it.

A stream counts its place in batches of contexts of a fixed size. A pass takes several of those, or a part of one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from saekit.activations.tokens import ContextBatch
from saekit.errors import SaekitError, SaekitWarning

A_BATCH = 0  # in the place of a number: each batch of contexts has a pass of its own
_MOST = 2**16  # tokens in one pass: more keep no card busier
Pass = Callable[[Int[Tensor, "b t"]], Sequence[Tensor]]


def in_passes(
    run: Pass, contexts: Iterable[ContextBatch], at_once: int = A_BATCH
) -> Iterator[tuple[ContextBatch, list[Tensor]]]:
    """Each batch of contexts with what the model makes of it.

    Where a card's memory does not hold a pass, it is halved and done again, and those that follow are as small.

    Args:
        run: a pass: from tokens [b, t] to tensors [b, t, ...].
        contexts: the batches.
        at_once: contexts in one pass; batches of one length are put together or divided. 0: a batch each.

    Raises:
        SaekitError: the memory does not hold one context.
    """
    most = at_once
    for group in _grouped(contexts, at_once):
        tokens = group[0].tokens if len(group) == 1 else torch.cat([batch.tokens for batch in group])
        size, parts = _run(run, tokens, most or len(tokens))
        most = size if size < (most or len(tokens)) else most
        found = [column[0] if len(column) == 1 else torch.cat(column) for column in zip(*parts, strict=True)]
        start = 0
        for batch in group:
            stop = start + len(batch.tokens)
            yield batch, [column[start:stop] for column in found]
            start = stop


def _grouped(contexts: Iterable[ContextBatch], at_once: int) -> Iterator[list[ContextBatch]]:
    """Batches of contexts of one length that a pass takes together, one at least; none is asked for too early."""
    group: list[ContextBatch] = []
    for batch in contexts:
        if group and batch.tokens.shape[1] != group[0].tokens.shape[1]:
            yield group
            group = []
        group.append(batch)
        if sum(len(each.tokens) for each in group) + len(batch.tokens) > at_once:
            yield group
            group = []
    if group:
        yield group


def _run(run: Pass, tokens: Int[Tensor, "b t"], size: int) -> tuple[int, list[Sequence[Tensor]]]:
    """Passes over all tokens, of at most ``size`` contexts each; and how many they had in the end."""
    parts: list[Sequence[Tensor]] = []
    done = 0
    while done < len(tokens):
        part = tokens[done : done + size]
        if (found := _unless_full(run, part)) is not None:
            parts.append(found)
            done += len(part)
            continue
        if len(part) == 1:
            raise SaekitError(
                f"the card's memory does not hold one context of {tokens.shape[1]} tokens in this model; less is taken "
                f"by a smaller --context-length, by --model-dtype bfloat16, --model-quantization or --model-device-map"
            )
        size = len(part) // 2
        torch.cuda.empty_cache()
        warnings.warn(
            f"the card's memory is full: the model takes {size} contexts at a time from here on (--harvest-batch)",
            SaekitWarning,
            stacklevel=2,
        )
    return size, parts


def _unless_full(run: Pass, tokens: Int[Tensor, "b t"]) -> Sequence[Tensor] | None:
    """A pass; None where memory does not hold it, whose tensors nothing refers to any more then."""
    try:
        return run(tokens)
    except torch.cuda.OutOfMemoryError:
        return None


def that_fit(run: Pass, cards: Sequence[torch.device], length: int) -> int:
    """Contexts in one pass by the free memory of the cards: doubled while a pass takes at most half of it.

    The rest is for what is trained there. Time does not decide, so that the same machine finds the same number.

    Args:
        run: a pass, as for ``in_passes``.
        cards: on which the model lies, one at least.
        length: tokens a context.

    Returns:
        A power of two; that many contexts have at most 65,536 tokens.
    """
    room = {card: _free(card) // 2 for card in cards}
    size = 1
    while 2 * size * length <= _MOST:
        took = _taken(run, torch.zeros(2 * size, length, dtype=torch.long), cards)
        if took is None or any(took[card] > room[card] for card in cards):
            break
        size *= 2
    torch.cuda.empty_cache()
    return size


def _free(card: torch.device) -> int:
    """Bytes that are free on a card, those among them that torch holds back for later."""
    held = torch.cuda.memory_reserved(card) - torch.cuda.memory_allocated(card)
    return int(torch.cuda.mem_get_info(card)[0]) + int(held)


def _taken(run: Pass, tokens: Int[Tensor, "b t"], cards: Sequence[torch.device]) -> dict[torch.device, int] | None:
    """Bytes that a pass takes beside the model; None where it does not fit."""
    for card in cards:
        torch.cuda.reset_peak_memory_stats(card)
    before = {card: torch.cuda.memory_allocated(card) for card in cards}
    if _unless_full(run, tokens) is None:
        return None
    return {card: torch.cuda.max_memory_allocated(card) - before[card] for card in cards}
