"""The format of SAELens (6.x), which is also ours: ``cfg.json`` and ``sae_weights.safetensors`` in a folder.

One inference rule SAELens does not have: thresholds in units of each token's norm. Such a dictionary is written under
an architecture of its own, which SAELens refuses to open instead of giving other features.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from saekit.errors import SaekitError
from saekit.files import replace_file, writable_folder

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.sae import SparseAutoencoder

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_TOKEN_NORM = "saekit_jumprelu_token_norm"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def recognises(folder: Path) -> bool:
    """Whether both files are there."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def write(sae: SparseAutoencoder, folder: Path, *, overwrite: bool = False) -> Path:
    """Write a dictionary; returns the folder.

    Raises:
        SaekitError: the folder holds something and ``overwrite`` is not set.
    """
    writable_folder(folder, overwrite=overwrite)
    cfg: dict[str, Any] = {
        "architecture": sae.cfg.architecture if sae.cfg.affinity_scale == "none" else _TOKEN_NORM,
        "d_in": sae.cfg.d_in,
        "d_sae": sae.cfg.d_sae,
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
        "apply_b_dec_to_input": sae.cfg.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {**sae.cfg.metadata, "sae_lens_version": "6.0.0"},
    }
    if sae.cfg.k is not None:
        cfg |= {"k": sae.cfg.k, "rescale_acts_by_decoder_norm": False}
    tensors = {name: value.detach().cpu().contiguous() for name, value in sae.state_dict().items()}
    replace_file(folder / WEIGHTS, lambda path: save_file(tensors, path))
    replace_file(folder / CONFIG, lambda path: path.write_text(json.dumps(cfg, indent=2) + "\n"))
    return folder


def read(folder: Path, device: str | torch.device = "cpu") -> SparseAutoencoder:
    """Read a dictionary.

    Raises:
        SaekitError: a file is damaged, a key is missing, or the tensors do not have the shapes that the config names.
    """
    from saekit.sae import SAEConfig, SparseAutoencoder

    try:
        cfg = json.loads((folder / CONFIG).read_text())
        scaled = cfg["architecture"] == _TOKEN_NORM
        config = SAEConfig(
            d_in=int(cfg["d_in"]),
            d_sae=int(cfg["d_sae"]),
            architecture="jumprelu" if scaled else cfg["architecture"],
            affinity_scale="token_norm" if scaled else "none",
            k=int(cfg["k"]) if cfg["architecture"] == "topk" else None,
            apply_b_dec_to_input=bool(cfg.get("apply_b_dec_to_input", True)),
            metadata=dict(cfg.get("metadata") or {}),
        )
        dtype = _DTYPES[cfg["dtype"]]
    except KeyError as error:
        raise SaekitError(f"{folder / CONFIG} lacks or does not know {error}") from None
    except (ValueError, TypeError, AttributeError) as error:  # SaekitError is a ValueError, told in full below
        if isinstance(error, SaekitError):
            raise
        raise SaekitError(f"{folder / CONFIG} is damaged: {error}") from None
    _refuse_unsupported(cfg, folder)
    weights = _read_weights(folder / WEIGHTS)
    sae = SparseAutoencoder(config, dtype, device)
    expected = {name: tuple(value.shape) for name, value in sae.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if found != expected:
        raise SaekitError(f"{folder / WEIGHTS} holds {found}, but its config asks for {expected}")
    if cfg.get("rescale_acts_by_decoder_norm"):  # selection by f·‖W_dec‖: the same dictionary with unit rows
        norms = weights["W_dec"].norm(dim=1)
        weights |= {
            "W_dec": weights["W_dec"] / norms[:, None],
            "W_enc": weights["W_enc"] * norms,
            "b_enc": weights["b_enc"] * norms,
        }
    sae.load_state_dict(weights)
    return sae


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise SaekitError(f"{path} is damaged: {error}") from None


def _refuse_unsupported(cfg: dict[str, Any], folder: Path) -> None:
    """Refuse what would silently change the features."""
    for key in ("normalize_activations", "reshape_activations"):
        if cfg.get(key, "none") not in ("none", None):
            raise SaekitError(f"{folder / CONFIG} asks for {key} = '{cfg[key]}', which saekit does not read")
