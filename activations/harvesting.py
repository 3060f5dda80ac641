"""Activations of a hooked model, read off at one hook point."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.activations.attention import quick_attention
from saekit.activations.batch import ActivationBatch
from saekit.activations.finite import BadTokens, norms
from saekit.activations.gradients import with_gradients
from saekit.activations.model import activations_of, recorded, truncated
from saekit.activations.passes import A_BATCH, Pass, in_passes
from saekit.activations.placement import device_of
from saekit.activations.tokens import ContextBatch
from saekit.activations.unembedding import Unembedding, next_tokens

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def harvest(
    model: TransformerBridge,
    hook: str,
    contexts: Iterable[ContextBatch],
    *,
    gradients: bool = False,
    bad: BadTokens | None = None,
    numbers: Iterable[int] | None = None,
    at_once: int = A_BATCH,
) -> Iterator[ActivationBatch]:
    """Yield the activations at the hook of each batch of contexts, kept positions only.

    The model runs up to the hook; with ``gradients``, through all of it and back.

    Args:
        model: the hooked model.
        hook: the hook point.
        contexts: batches of contexts.
        gradients: whether those of the loss are taken too.
        bad: what becomes of tokens that are not to be learned from; NaN or inf is an error if not given.
        numbers: of the batches, for messages; from 0 if not given.
        at_once: contexts in one pass of the model (``in_passes``); each batch in a pass of its own if not given.

    Raises:
        SaekitError: the model has no such hook, gradients are asked of a model that is not causal, or an activation is
            NaN or infinite (the token is named).
    """
    bad = bad or BadTokens()
    with a_pass(model, hook, gradients) as run:
        passes = in_passes(run, contexts, at_once)
        for (batch, parts), number in zip(passes, count() if numbers is None else numbers, strict=False):
            kept = batch.kept
            x, *gradient = (part[kept.to(part.device)] for part in parts)
            positions = torch.arange(kept.shape[1]).expand(kept.shape)[kept]
            found = ActivationBatch(x, batch.tokens[kept], batch.documents[kept], positions, *gradient)
            yield from bad.sift([found], [hook], f"batch {number} of contexts")


def without_large(
    model: TransformerBridge, hook: str, limit: float, contexts: ContextBatch, *, batch: int = 32
) -> ContextBatch:
    """The contexts with fewer positions kept: none whose ‖x‖ at the hook is beyond the limit.

    Raises:
        SaekitError: as ``harvest``.
    """
    large = torch.cat([norms(found).cpu() > limit for found in harvest(model, hook, contexts.split(batch))])
    kept = contexts.kept.clone()
    kept[contexts.kept] = ~large
    return contexts._replace(kept=kept)


@contextmanager
def a_pass(model: TransformerBridge, hook: str, gradients: bool) -> Iterator[Pass]:
    """A function from tokens [b, t], wherever they lie, to activations and, where asked for, gradients [b, t, d].

    Raises:
        SaekitError: as ``harvest``.
    """
    device = device_of(model)
    if gradients:
        yield with_gradients(model, hook)
    else:
        with truncated(model, [hook]) as forward:
            yield lambda tokens: forward(tokens.to(device))


class Harvest(NamedTuple):
    """What one pass over contexts found at several hook points.

    Attributes:
        batches: for each hook point, the activations of the same m tokens.
        losses: [m] nats of the next token, NaN at the last position of a context; None where they were not asked for.
    """

    batches: dict[str, ActivationBatch]
    losses: Float[Tensor, "m"] | None = None


def harvest_hooks(
    model: TransformerBridge,
    hooks: Sequence[str],
    contexts: Iterable[ContextBatch],
    *,
    losses: bool = False,
    bad: BadTokens | None = None,
    numbers: Iterable[int] | None = None,
    at_once: int = A_BATCH,
) -> Iterator[Harvest]:
    """Yield the activations at several hooks, kept positions only, by one pass of the model for each batch of contexts.

    The pass ends at the last of the hooks or, with ``losses``, goes through all of the model. Further arguments are
    those of ``harvest``; a token that is bad at one hook is left out at all (but not with ``losses``).

    Raises:
        SaekitError: the model has no such hook, or an activation is NaN or infinite (the token is named).
    """
    bad = BadTokens() if bad is None or losses else bad
    device = device_of(model)
    with _losses(model, hooks) if losses else truncated(model, hooks) as run:
        passes = in_passes(lambda tokens: run(tokens.to(device)), contexts, at_once)
        for (batch, found), number in zip(passes, count() if numbers is None else numbers, strict=False):
            kept = batch.kept
            positions = torch.arange(kept.shape[1]).expand(kept.shape)[kept]
            at_kept = [column[kept.to(column.device)] for column in found]
            rows = [
                ActivationBatch(x, batch.tokens[kept], batch.documents[kept], positions) for x in at_kept[: len(hooks)]
            ]
            rows = bad.sift(rows, hooks, f"batch {number} of contexts")
            yield Harvest(dict(zip(hooks, rows, strict=True)), at_kept[-1] if losses else None)


@contextmanager
def _losses(model: TransformerBridge, hooks: Sequence[str]) -> Iterator[Callable[[Tensor], list[Tensor]]]:
    """A function from tokens [b, t] to the activations at each hook and, last, the losses [b, t]."""
    end = Unembedding.of(model, *hooks)
    with recorded(model, hooks) as seen:

        def one_pass(tokens: Tensor) -> list[Tensor]:
            seen.clear()
            with quick_attention(model, *hooks):
                rows = end.before(tokens)
            nats = end.nats(rows, *next_tokens(tokens)).reshape(len(tokens), -1)
            return [*activations_of(seen, hooks, tokens), torch.nn.functional.pad(nats, (0, 1), value=math.nan)]

        @torch.no_grad()
        def run(tokens: Tensor) -> list[Tensor]:
            parts = [one_pass(part) for part in torch.split(tokens, end.at_once(tokens.shape[1]))]
            return [torch.cat(column) for column in zip(*parts, strict=True)]

        yield run
