"""The dictionary that a run trains: how it begins, and how it takes raw activations in the end."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.errors import SaekitError
from saekit.sae import AffinityScale, SAEConfig, SparseAutoencoder
from saekit.trainers.config import TrainConfig
from saekit.trainers.geometric_median import geometric_median
from saekit.trainers.variant import Variant


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
        k=config.k if variant.architecture == "topk" else None,
        affinity_scale=affinity_scale(config, variant) if variant.architecture == "jumprelu" else "none",
    )
    return SparseAutoencoder(cfg, device=device)


@torch.no_grad()
def initialise(sae: SparseAutoencoder, sample: Float[Tensor, "n d"], seed: int) -> float:
    """Give a dictionary its first weights; returns the scale at which activations have mean norm √d.

    Decoder rows are random unit vectors, the encoder starts as the decoder's transpose, b_dec as the geometric median
    of the scaled sample.

    Raises:
        SaekitError: the activations are all zero, or too large for float32.
    """
    norm = float(sample.norm(dim=1).cpu().double().mean())
    if norm == 0:
        raise SaekitError("the activations are all zero")
    if not math.isfinite(norm):
        raise SaekitError("the activations are so large that their norms exceed float32")
    scale = float(sae.cfg.d_in**0.5 / norm)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(sae.cfg.d_sae, sae.cfg.d_in, generator=generator).to(sample.device)
    sae.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True))
    sae.W_enc.copy_(sae.W_dec.T)
    sae.b_dec.copy_(geometric_median(sample * scale))
    return scale


@torch.no_grad()
def unscale(sae: SparseAutoencoder, scale: float) -> None:
    """Fold the activation scale into the dictionary, in place: afterwards it takes and gives raw activations.

    With x' = s·x: relu((s·x − b)W + c)/s = relu((x − b/s)W + c/s), so biases and thresholds are divided by s, while
    both matrices stay and decoder rows keep unit norm. A threshold in units of the token's norm stays too.
    """
    sae.b_enc.div_(scale)
    sae.b_dec.div_(scale)
    if sae.threshold is not None and sae.cfg.affinity_scale == "none":
        sae.threshold.div_(scale)
