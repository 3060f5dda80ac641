"""The format of SAELens (6.x), which is also ours: ``cfg.json`` and ``sae_weights.safetensors`` in a folder.

One inference rule SAELens does not have: thresholds in units of each token's norm. Such a dictionary is written under
an architecture of its own, which SAELens refuses to open instead of giving other features.
"""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from saekit.errors import SaekitError, first_line
from saekit.files import replace_files, writable_folder
from saekit.reading import check_inside, read_json
from saekit.seal import BLANK, file_unbroken, stamp_file

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.sae import SAEConfig, SparseAutoencoder

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

    def write_weights(path: Path) -> None:
        save_file(tensors, path, {"saekit": BLANK})  # SAELens reads the tensors alone
        stamp_file(path)

    text = json.dumps(cfg, indent=2) + "\n"
    replace_files({folder / WEIGHTS: write_weights, folder / CONFIG: lambda path: path.write_text(text)})
    return folder


def read(folder: Path, device: str | torch.device = "cpu") -> SparseAutoencoder:
    """Read a dictionary. Nothing of its size is made before the files agree on it.

    Raises:
        SaekitError: a file is damaged or leads out of the folder, a key is missing, or the tensors do not have the
            shapes that the config names.
    """
    from saekit.sae import SparseAutoencoder

    for name in (CONFIG, WEIGHTS):
        check_inside(folder / name, folder)
    cfg = read_json(folder / CONFIG)
    try:
        config, dtype = _config(cfg)
    except KeyError as error:
        raise SaekitError(f"'{folder / CONFIG}' lacks or does not know {first_line(error)}") from None
    except (ValueError, TypeError, AttributeError) as error:  # SaekitError is a ValueError, told in full below
        if isinstance(error, SaekitError):
            raise
        raise SaekitError(f"'{folder / CONFIG}' is damaged: {first_line(error)}") from None
    _refuse_unsupported(cfg, folder)
    weights = _read_weights(folder / WEIGHTS, _shapes(config))
    if cfg.get("rescale_acts_by_decoder_norm"):  # selection by f·‖W_dec‖: the same dictionary with unit rows
        norms = weights["W_dec"].norm(dim=1)
        weights |= {
            "W_dec": weights["W_dec"] / norms[:, None],
            "W_enc": weights["W_enc"] * norms,
            "b_enc": weights["b_enc"] * norms,
        }
    sae = SparseAutoencoder(config, dtype, device)
    sae.load_state_dict(weights)
    return sae


def _config(cfg: Any) -> tuple[SAEConfig, torch.dtype]:
    """What ``cfg.json`` says; raises many kinds of errors where it says nothing sensible."""
    from saekit.sae import SAEConfig

    if not isinstance(cfg, dict):
        raise TypeError("it is no mapping")
    scaled = cfg["architecture"] == _TOKEN_NORM
    config = SAEConfig(
        d_in=_whole(cfg, "d_in"),
        d_sae=_whole(cfg, "d_sae"),
        architecture="jumprelu" if scaled else cfg["architecture"],
        affinity_scale="token_norm" if scaled else "none",
        k=_whole(cfg, "k") if cfg["architecture"] == "topk" else None,
        apply_b_dec_to_input=bool(cfg.get("apply_b_dec_to_input", True)),
        metadata=dict(cfg.get("metadata") or {}),
    )
    return config, _DTYPES[cfg["dtype"]]


def _whole(cfg: dict[str, Any], key: str) -> int:
    value = cfg[key]
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError(f"{key} = {reprlib.repr(value)}")
    return value


def _shapes(config: SAEConfig) -> dict[str, list[int]]:
    """The shape of each tensor of a dictionary."""
    shapes = {
        "W_enc": [config.d_in, config.d_sae],
        "b_enc": [config.d_sae],
        "W_dec": [config.d_sae, config.d_in],
        "b_dec": [config.d_in],
    }
    return shapes | ({"threshold": [config.d_sae]} if config.architecture == "jumprelu" else {})


def _read_weights(path: Path, shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """The tensors, once their names and shapes are as they should be."""
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if found != shapes:
                raise SaekitError(f"'{path}' holds {reprlib.repr(found)}, but its config asks for {shapes}")
            kinds = {str(file.get_slice(name).get_dtype()) for name in shapes}
            if not kinds <= {"F64", "F32", "F16", "BF16"}:
                raise SaekitError(f"'{path}' holds weights in {', '.join(sorted(kinds))}, not in floating point")
            whole = file_unbroken(path)
            if whole is False or (whole is None and "saekit" in (file.metadata() or {})):
                raise SaekitError(f"'{path}' is damaged: its seal is broken")
            return {name: file.get_tensor(name) for name in shapes}
    except (SafetensorError, OSError) as error:
        raise SaekitError(f"'{path}' is damaged: {first_line(error)}") from None


def _refuse_unsupported(cfg: dict[str, Any], folder: Path) -> None:
    """Refuse what would silently change the features."""
    for key in ("normalize_activations", "reshape_activations"):
        if cfg.get(key) not in ("none", None):
            raise SaekitError(
                f"'{folder / CONFIG}' asks for {key} = {reprlib.repr(cfg[key])}, which saekit does not read"
            )
