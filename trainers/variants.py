"""The variants of a sparse autoencoder: an allocation rule for training and the inference rule it is saved with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from saekit.code import SparseCode
from saekit.sae import Architecture, SparseAutoencoder
from saekit.trainers.mutual_choice import MutualChoice
from saekit.trainers.topk import TopK


class Variant(Protocol):
    """What a variant has; its constructor takes k, the mean number of matches a token."""

    architecture: Architecture

    def __init__(self, k: int) -> None: ...

    def allocate(self, pre: Float[Tensor, "n F"]) -> SparseCode:
        """The training code of a batch, from its pre-activations."""

    def calibrate(self, sae: SparseAutoencoder, heldout: Callable[[], Iterable[Float[Tensor, "n d"]]]) -> None:
        """Set what the inference rule needs, from activations that were not trained on."""


VARIANTS: dict[str, type[Variant]] = {
    "topk": TopK,
    "mutual_choice": MutualChoice,
}
