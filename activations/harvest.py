"""Activations of a hooked model, read off at one hook point."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.activations.gradients import with_gradients
from saekit.activations.model import truncated
from saekit.activations.tokens import ContextBatch
from saekit.errors import SaekitError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class ActivationBatch(NamedTuple):
    """Activations of m tokens, text positions only.

    Attributes:
        x: [m, d] activations, in the model's units and dtype.
        tokens: [m] token ids.
        documents: [m] running numbers of their documents.
        positions: [m] their positions in the context.
        gradients: [m, d] of the model's next-token loss at the activations, where they were asked for.
    """

    x: Float[Tensor, "m d"]
    tokens: Int[Tensor, "m"]
    documents: Int[Tensor, "m"]
    positions: Int[Tensor, "m"]
    gradients: Float[Tensor, "m d"] | None = None

    def rows(self, start: int, stop: int) -> ActivationBatch:
        """Some of the tokens."""
        x, tokens, documents, positions = (column[start:stop] for column in self[:4])
        gradients = None if self.gradients is None else self.gradients[start:stop]
        return ActivationBatch(x, tokens, documents, positions, gradients)

    @staticmethod
    def concatenate(batches: Sequence[ActivationBatch]) -> ActivationBatch:
        """One batch of several, all with gradients or none."""
        x, tokens, documents, positions = (torch.cat(column) for column in zip(*(b[:4] for b in batches), strict=True))
        gradients = [b.gradients for b in batches if b.gradients is not None]
        return ActivationBatch(x, tokens, documents, positions, torch.cat(gradients) if gradients else None)


def harvest(
    model: TransformerBridge, hook: str, contexts: Iterable[ContextBatch], *, gradients: bool = False
) -> Iterator[ActivationBatch]:
    """Yield the activations at the hook of each batch of contexts, kept positions only.

    The model runs up to the hook; with ``gradients``, through all of it and back.

    Raises:
        SaekitError: the model has no such hook, gradients are asked of a model that is not causal, or an activation is
            NaN or infinite (the token is named).
    """
    device = next(model.parameters()).device
    with _passes(model, hook, gradients) as run:
        for number, batch in enumerate(contexts):
            kept = batch.kept
            x, gradient = (None if part is None else part[kept.to(device)] for part in run(batch.tokens.to(device)))
            assert x is not None
            positions = torch.arange(kept.shape[1]).expand(kept.shape)[kept]
            found = ActivationBatch(x, batch.tokens[kept], batch.documents[kept], positions, gradient)
            check_finite(found, hook, f"batch {number} of contexts")
            yield found


@contextmanager
def _passes(
    model: TransformerBridge, hook: str, gradients: bool
) -> Iterator[Callable[[Tensor], tuple[Tensor, Tensor | None]]]:
    """A function from tokens to activations and, where asked for, gradients."""
    if gradients:
        yield with_gradients(model, hook)
    else:
        with truncated(model, hook) as forward:
            yield lambda tokens: (forward(tokens), None)


def check_finite(batch: ActivationBatch, hook: str, where: str) -> None:
    """Raise SaekitError where an activation or a gradient is NaN or infinite, naming its token."""
    for kind, values in (("activations", batch.x), ("gradients", batch.gradients)):
        if values is None or bool(torch.isfinite(values.sum())):  # one pass; an overflow of the sum is told apart below
            continue
        bad = (~torch.isfinite(values)).any(1).nonzero().flatten()
        if bad.numel():
            i = int(bad[0])
            raise SaekitError(
                f"NaN or inf in the {kind} of '{hook}' at {where}, row {i} (token id {int(batch.tokens[i])}, document "
                f"{int(batch.documents[i])}, position {int(batch.positions[i])}); {bad.numel()} such tokens here"
            )
