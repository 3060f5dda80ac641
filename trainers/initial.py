"""A run that starts from a dictionary: any that saekit reads, in the units in which the run trains."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from saekit.errors import SaekitError
from saekit.formats.rewriting import scaled_rows, upcast, with_b_dec
from saekit.loading import load
from saekit.sae import SparseAutoencoder
from saekit.trainers.config import TrainConfig
from saekit.trainers.dictionary import Units

_UNIT = 1e-3  # by which the norm of a row may differ from 1


def with_initial_width(config: TrainConfig) -> TrainConfig:
    """The config with the width of the dictionary that it starts from, where none is asked for.

    Raises:
        SaekitError: that is not found.
    """
    if config.init is None or config.given & {"width", "expansion"}:
        return config
    return config.replace(width=load(config.init).cfg.d_sae)


@torch.no_grad()
def start_from(path: str, sae: SparseAutoencoder, units: Units) -> dict[str, Any]:
    """Give a dictionary that has begun the weights of another: it reconstructs what that does, up to its rule.

    Thresholds are taken where they are no multiples of the token's norm. A feature whose decoder row is zero stays as
    it has begun.

    Args:
        path: what ``saekit.load`` takes.
        sae: the dictionary to be trained, with its first weights.
        units: in which it is trained.

    Returns:
        For the metadata: the ``path`` and a digest of the ``weights``.

    Raises:
        SaekitError: it is not found, of another width, or nothing that is trained here can be equal to it.
    """
    other = load(path, device=sae.device)
    for name, flag in (("d_in", "--hook"), ("d_sae", "--width")):
        if (theirs := getattr(other.cfg, name)) != (ours := getattr(sae.cfg, name)):
            raise SaekitError(f"the run has {name} = {ours:,}, the dictionary '{path}' {theirs:,} ({flag})")
    if other.cfg.input_normalization != "none":
        raise SaekitError(f"'{path}' normalises its input ({other.cfg.input_normalization}); no run here does so")
    weights = upcast(other.state_dict())
    if not other.cfg.apply_b_dec_to_input:
        weights = with_b_dec(weights, 1)
    norms = weights["W_dec"].norm(dim=1)
    if bool(((norms - 1).abs() > _UNIT)[norms > 0].any()):
        if other.cfg.architecture == "topk":
            raise SaekitError(
                f"decoder rows of '{path}' have norms of {float(norms.min()):.3g} to {float(norms.max()):.3g}; runs "
                f"train rows of norm 1, by which a topk dictionary would choose other features"
            )
        weights = scaled_rows(weights, norms)
    lives = norms > 0
    sae.W_dec[lives] = weights["W_dec"][lives]
    sae.W_enc[:, lives] = weights["W_enc"][:, lives]
    sae.b_enc[lives] = weights["b_enc"][lives] * units.scale
    sae.b_dec.copy_((weights["b_dec"] - units.centre) * units.scale)
    if sae.threshold is not None and other.threshold is not None and other.cfg.affinity_scale == "none":
        sae.threshold.copy_(weights["threshold"] * units.scale)
    return {"path": path, "weights": _digest(other)}


def _digest(sae: SparseAutoencoder) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for _, value in sorted(sae.state_dict().items()):
        digest.update(value.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
