"""Activations of a hooked model, read off at one hook point."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

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
    """

    x: Float[Tensor, "m d"]
    tokens: Int[Tensor, "m"]
    documents: Int[Tensor, "m"]
    positions: Int[Tensor, "m"]


def harvest(model: TransformerBridge, hook: str, contexts: Iterable[ContextBatch]) -> Iterator[ActivationBatch]:
    """Run the model up to the hook and yield the activations of each batch of contexts, kept positions only.

    Raises:
        SaekitError: the model has no such hook, or an activation is NaN or infinite (the token is named).
    """
    device = next(model.parameters()).device
    with truncated(model, hook) as run:
        for number, batch in enumerate(contexts):
            kept = batch.kept
            x = run(batch.tokens.to(device))[kept.to(device)]
            positions = torch.arange(kept.shape[1]).expand(kept.shape)[kept]
            found = ActivationBatch(x, batch.tokens[kept], batch.documents[kept], positions)
            check_finite(found, hook, f"batch {number} of contexts")
            yield found


def check_finite(batch: ActivationBatch, hook: str, where: str) -> None:
    """Raise SaekitError where an activation is NaN or infinite, naming its token."""
    if bool(torch.isfinite(batch.x.sum())):  # one pass; an overflow of the sum is told apart below
        return
    bad = (~torch.isfinite(batch.x)).any(1).nonzero().flatten()
    if bad.numel():
        i = int(bad[0])
        raise SaekitError(
            f"NaN or inf in the activations of '{hook}' at {where}, row {i} (token id {int(batch.tokens[i])}, "
            f"document {int(batch.documents[i])}, position {int(batch.positions[i])}); {bad.numel()} such tokens here"
        )
