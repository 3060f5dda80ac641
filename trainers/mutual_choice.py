"""Mutual choice: the k·n best matches of the whole batch (arXiv 2411.02124); saved with one threshold (our reading)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.allocation import mutual_choice
from saekit.code import SparseCode
from saekit.errors import SaekitError
from saekit.sae import Architecture, SparseAutoencoder

_CHUNK = 1 << 26  # pre-activations held at a time


class MutualChoice:
    """Mutual choice over each batch; saved as ``jumprelu`` with the same threshold for every feature."""

    architecture: Architecture = "jumprelu"

    def __init__(self, k: int) -> None:
        self.k = k

    def allocate(self, pre: Float[Tensor, "n F"]) -> SparseCode:
        """The k·n largest of the whole batch."""
        return mutual_choice(pre, self.k * len(pre))

    def calibrate(self, sae: SparseAutoencoder, heldout: Callable[[], Iterable[Float[Tensor, "n d"]]]) -> None:
        """Set the threshold that gives a mean of k matches a token on held-out activations."""
        assert sae.threshold is not None
        sae.threshold.fill_(global_threshold(sae, heldout, self.k))


@torch.no_grad()
def global_threshold(sae: SparseAutoencoder, batches: Callable[[], Iterable[Float[Tensor, "n d"]]], k: int) -> float:
    """The θ for which exactly k pairs a token have P > θ on these activations (fewer where fewer are positive).

    θ lies halfway between the k·n-th and the next largest pre-activation of all n tokens. Each piece of the data keeps
    its 4·k largest a token as candidates; where a piece could hide a larger entry than the θ found, a second pass keeps
    twice as many.

    Args:
        sae: the dictionary, whose own threshold plays no part.
        batches: makes the activations, the same ones each time.
        k: mean number of matches a token.

    Raises:
        SaekitError: there are no activations.
    """
    share = min(4 * k, sae.cfg.d_sae)
    while True:
        candidates, hidden, n = [], 0.0, 0
        for x in (piece for batch in batches() for piece in torch.split(batch, max(1, _CHUNK // sae.cfg.d_sae))):
            n += len(x)
            values = mutual_choice(sae.pre_activations(x), share * len(x)).values
            candidates.append(values)
            if values.numel() == share * len(x):
                hidden = max(hidden, float(values.min()))
        if not n:
            raise SaekitError("no held-out activations to calibrate the threshold on")
        every = torch.cat(candidates)
        theta = 0.0
        if every.numel() > k * n:
            theta = float(every.topk(k * n + 1).values[-2:].cpu().double().mean())
        if hidden <= theta or share == sae.cfg.d_sae:
            return theta
        share = min(2 * share, sae.cfg.d_sae)
