"""Which features two dictionaries share: the nearest decoder directions of one in the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit import display
from saekit.errors import SaekitError
from saekit.sae import SparseAutoencoder

THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95)
_CHUNK = 1 << 26  # cosines held at a time


class Nearest(NamedTuple):
    """For each of F features, the nearest of the other dictionary.

    Attributes:
        features: [F] its index there.
        cosines: [F] of the two decoder directions; 0 where a direction is null.
    """

    features: Int[Tensor, "F"]
    cosines: Float[Tensor, "F"]

    def share(self, threshold: float) -> float:
        """Share of the features whose nearest has a cosine of at least this."""
        return float((self.cosines >= threshold).double().mean())


@dataclass(frozen=True)
class Similarity:
    """What ``compare`` found.

    Attributes:
        first: the features of the first dictionary, and their nearest in the second.
        second: the other way round.
    """

    first: Nearest
    second: Nearest

    @property
    def matches(self) -> Int[Tensor, "m 2"]:
        """Pairs (feature of the first, feature of the second) that are each other's nearest, by descending cosine."""
        here = torch.arange(len(self.first.features), device=self.first.features.device)
        mutual = here[self.second.features[self.first.features] == here]
        mutual = mutual[self.first.cosines[mutual].argsort(descending=True, stable=True)]
        return torch.stack([mutual, self.first.features[mutual]], dim=1)

    def to_dict(self) -> dict[str, Any]:
        """Figures, for each direction of the comparison.

        Returns:
            first, second: ``features``; ``mean_cosine`` with the nearest (mean max cosine similarity, Sharkey et al.
            2022); ``share_0.9`` and the like, of features whose nearest has that cosine or more; ``matched``, the share
            that is its nearest's nearest. matches: pairs that are each other's nearest.
        """
        pairs = len(self.matches)
        figures = {
            name: {
                "features": len(side.features),
                "mean_cosine": float(side.cosines.double().mean()),
                **{f"share_{threshold}": side.share(threshold) for threshold in THRESHOLDS},
                "matched": pairs / len(side.features),
            }
            for name, side in (("first", self.first), ("second", self.second))
        }
        return {**figures, "matches": pairs}

    def _repr_html_(self) -> str:
        found = self.to_dict()
        named = {"mean_cosine": "mean cosine with the nearest of the other"}
        named |= {f"share_{threshold}": f"share with a nearest of cosine ≥ {threshold}" for threshold in THRESHOLDS}
        named["matched"] = "share that is its nearest's nearest"
        rows = [("features", *(f"{found[side]['features']:,}" for side in ("first", "second")))]
        rows += [(text, *(f"{found[side][key]:.3f}" for side in ("first", "second"))) for key, text in named.items()]
        return display.table("Decoder directions in common", rows, ("", "first", "second"))


@torch.no_grad()
def compare(first: SparseAutoencoder, second: SparseAutoencoder) -> Similarity:
    """Find the nearest decoder directions of two dictionaries, of any widths, in each other.

    Directions alone count: neither lengths, nor encoders, nor when features fire. In d_in dimensions, the nearest of F
    random directions has a cosine of about √(2 ln F / d_in).

    Raises:
        SaekitError: they are of activations of different width.
    """
    if first.cfg.d_in != second.cfg.d_in:
        raise SaekitError(
            f"dictionaries of d_in = {first.cfg.d_in} and d_in = {second.cfg.d_in} have no directions in common"
        )
    a, b = _directions(first.W_dec), _directions(second.W_dec.to(first.device))
    nearest: list[Tensor] = []
    largest: list[Tensor] = []
    cosines, features = b.new_full((len(b),), -torch.inf), torch.zeros(len(b), dtype=torch.long, device=b.device)
    start = 0
    for part in torch.split(a, max(1, _CHUNK // len(b))):
        found = part @ b.T
        best, row = found.max(1)
        largest.append(best)
        nearest.append(row)
        best, row = found.max(0)
        nearer = best > cosines
        cosines, features = torch.where(nearer, best, cosines), torch.where(nearer, row + start, features)
        start += len(part)
    return Similarity(Nearest(torch.cat(nearest), torch.cat(largest)), Nearest(features, cosines))


def _directions(W_dec: Float[Tensor, "F d"]) -> Float[Tensor, "F d"]:
    W = W_dec.float()
    unit: Tensor = W / W.norm(dim=1, keepdim=True).clamp_min(torch.finfo(W.dtype).tiny)
    return unit
