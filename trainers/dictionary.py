"""The dictionary that a run trains: how it begins, and how it takes raw activations in the end."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.errors import SaekitError
from saekit.formats.rewriting import fold_units
from saekit.sae import AffinityScale, SAEConfig, SparseAutoencoder
from saekit.trainers.config import TrainConfig
from saekit.trainers.geometric_median import geometric_median
from saekit.trainers.variant import Variant


@dataclass(frozen=True, eq=False)
class Units:
    """What training takes in place of raw activations x: (x − centre) · scale.

    So a run is the same, up to rounding, whatever vector is added to all activations: b_dec starts at 0, and Adam's
    steps, which know nothing of units, need not carry it to a large mean.

    Attributes:
        centre: [d], in raw units.
        scale: one over raw units; the mean norm becomes √d.
    """

    centre: Float[Tensor, "d"]
    scale: float

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Raw activations in these units."""
        return (x - self.centre).mul_(self.scale)


def affinity_scale(config: TrainConfig, variant: Variant) -> AffinityScale:
    """By what affinities are divided before they are compared."""
    return config.affinity_scale if variant.compares_tokens else "none"


def empty_dictionary(config: TrainConfig, variant: Variant, d_in: int, device: torch.device) -> SparseAutoencoder:
    """A dictionary of zeros with the shape and the inference rule that the config asks for."""
    assert config.width is not None
    cfg = SAEConfig(
        d_in,
        config.width,
        variant.architecture,
        k=variant.k if variant.architecture == "topk" else None,
        affinity_scale=affinity_scale(config, variant) if variant.architecture == "jumprelu" else "none",
    )
    return SparseAutoencoder(cfg, device=device)


@torch.no_grad()
def initialise(sae: SparseAutoencoder, sample: Float[Tensor, "n d"], seed: int) -> Units:
    """Give a dictionary its first weights; returns the units in which it is trained.

    Their centre is the geometric median of the sample, and there b_dec starts. Decoder rows are random unit vectors,
    the encoder starts as the decoder's transpose.

    Raises:
        SaekitError: the activations are all the same, or too large for float32.
    """
    centre = geometric_median(sample)
    norm = float((sample - centre).norm(dim=1).cpu().double().mean())
    if not math.isfinite(norm):
        raise SaekitError("the activations are so large that their norms exceed float32")
    if norm <= 4 * torch.finfo(sample.dtype).eps * float(centre.norm()):  # what rounding leaves of equal rows
        raise SaekitError(f"the activations are all {'the same' if centre.any() else 'zero'}")
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(sae.cfg.d_sae, sae.cfg.d_in, generator=generator).to(sample.device)
    sae.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True))
    sae.W_enc.copy_(sae.W_dec.T)
    sae.b_dec.zero_()
    return Units(centre, float(sae.cfg.d_in**0.5 / norm))


@torch.no_grad()
def unscale(sae: SparseAutoencoder, units: Units) -> None:
    """Fold the units of training into the dictionary, in place: afterwards it takes and gives raw activations."""
    thresholds = sae.threshold is not None and sae.cfg.affinity_scale == "none"
    fold_units(sae.state_dict(), units.centre, units.scale, thresholds=thresholds)
