"""Activations with what is known of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


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

    def where(self, kept: Bool[Tensor, "m"]) -> ActivationBatch:
        """The tokens that a mask marks."""
        x, tokens, documents, positions = (column[kept.to(column.device)] for column in self[:4])
        gradients = None if self.gradients is None else self.gradients[kept.to(self.gradients.device)]
        return ActivationBatch(x, tokens, documents, positions, gradients)

    @staticmethod
    def concatenate(batches: Sequence[ActivationBatch]) -> ActivationBatch:
        """One batch of several, all with gradients or none."""
        x, tokens, documents, positions = (torch.cat(column) for column in zip(*(b[:4] for b in batches), strict=True))
        gradients = [b.gradients for b in batches if b.gradients is not None]
        return ActivationBatch(x, tokens, documents, positions, torch.cat(gradients) if gradients else None)
