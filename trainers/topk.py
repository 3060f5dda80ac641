"""TopK: each token matches its k best features, in training and at inference."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from jaxtyping import Float
from torch import Tensor

from saekit.allocation import token_choice
from saekit.code import SparseCode
from saekit.sae import Architecture, SparseAutoencoder


class TopK:
    """Token choice; saved as ``topk``."""

    architecture: Architecture = "topk"

    def __init__(self, k: int) -> None:
        self.k = k

    def allocate(self, pre: Float[Tensor, "n F"]) -> SparseCode:
        """The k largest of each row."""
        return token_choice(pre, self.k)

    def calibrate(self, sae: SparseAutoencoder, heldout: Callable[[], Iterable[Float[Tensor, "n d"]]]) -> None:
        """TopK needs nothing but k."""
