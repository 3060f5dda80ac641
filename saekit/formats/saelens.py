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

from saekit.errors import SaekitError
from saekit.files import replace_files
from saekit.formats import checks
from saekit.formats.layout import OURS, Stored, arranged, dictionary, dtype_named
from saekit.formats.rewriting import gated, scaled_rows
from saekit.formats.saelens_before_6 import modernised
from saekit.formats.tensor_files import read_tensors, sealed_with, write_safetensors
from saekit.reading import check_inside, check_json, read_json

if TYPE_CHECKING:
    from saekit.sae import SAEConfig, SparseAutoencoder

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_RULE = ("architecture", "k", "apply_b_dec_to_input", "normalize_activations")  # no shape tells when these are others
_TOKEN_NORM = "saekit_jumprelu_token_norm"
_AS = {"gated": "jumprelu", _TOKEN_NORM: "jumprelu"}  # what some architectures are here
_PLAIN = {name: Stored(name, letters) for name, letters in OURS.items() if name != "threshold"}
_PLACES = {
    "jumprelu": {**_PLAIN, "threshold": Stored("threshold", "F")},
    "gated": {
        **{name: place for name, place in _PLAIN.items() if name != "b_enc"},
        **{name: Stored(name, "F") for name in ("b_gate", "b_mag", "r_mag")},
    },
}
_PLACES[_TOKEN_NORM] = _PLACES["jumprelu"]


def recognises(path: Path) -> bool:
    """Whether both files are there."""
    folder = checks.folder_of(path, WEIGHTS)
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def lacks(sae: SparseAutoencoder) -> checks.Lack | None:
    """What of a dictionary SAELens cannot open."""
    return "token_norm" if sae.cfg.affinity_scale != "none" else None


def write(sae: SparseAutoencoder, folder: Path, *, overwrite: bool = False) -> Path:
    """Write a dictionary; returns the folder.

    Raises:
        SaekitError: the folder holds something and ``overwrite`` is not set, or JSON does not hold the metadata.
    """
    check_json(sae.cfg.metadata, "metadata")  # it may have been changed since
    checks.place(folder, WEIGHTS, overwrite=overwrite)
    cfg: dict[str, Any] = {
        "architecture": sae.cfg.architecture if sae.cfg.affinity_scale == "none" else _TOKEN_NORM,
        "d_in": sae.cfg.d_in,
        "d_sae": sae.cfg.d_sae,
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
        "apply_b_dec_to_input": sae.cfg.apply_b_dec_to_input,
        "normalize_activations": sae.cfg.input_normalization,
        "reshape_activations": "hook_z" if str(sae.cfg.metadata.get("hook_name")).endswith("hook_z") else "none",
        "metadata": {**sae.cfg.metadata, "sae_lens_version": "6.0.0"},
    }
    if sae.cfg.k is not None:
        cfg |= {"k": sae.cfg.k, "rescale_acts_by_decoder_norm": False}
    tensors = {name: value.detach().cpu().contiguous() for name, value in sae.state_dict().items()}
    text = json.dumps(cfg, indent=2) + "\n"
    replace_files(
        {
            folder / WEIGHTS: lambda part: write_safetensors(tensors, part, _rule(cfg)),
            folder / CONFIG: lambda part: part.write_text(text),
        }
    )
    return folder


def read(path: Path, device: str | torch.device = "cpu") -> SparseAutoencoder:
    """Read a dictionary. Nothing of its size is made before the files agree on it.

    Raises:
        SaekitError: a file is damaged or leads out of the folder, a key is missing, or the tensors do not have the
            shapes that the config names.
    """
    folder = checks.folder_of(path, WEIGHTS)
    check_inside(folder / CONFIG, folder)
    with checks.understanding(folder / CONFIG):
        cfg = modernised(checks.mapping(read_json(folder / CONFIG)), folder / CONFIG)
        config, dtype = _config(cfg), dtype_named(cfg["dtype"])
        by_norm = checks.flag(cfg, "rescale_acts_by_decoder_norm", False)  # selection by f·‖W_dec‖
    reshaped = cfg.get("reshape_activations") or "none"
    # "hook_z": heads are put side by side, which is how activations come to dictionaries here
    checks.refuse(
        reshaped not in ("none", "hook_z"), folder / CONFIG, f"reshape_activations = {reprlib.repr(reshaped)}"
    )
    found, file = read_tensors(folder / WEIGHTS, folder), folder / WEIGHTS
    scaling = found.pop("scaling_factor", None)  # of SAELens before 6, where it was written without effect too
    if scaling is not None and not bool((scaling == 1).all()):
        raise SaekitError(f"'{file}' holds a scaling_factor, which saekit does not read")
    weights = arranged(found, _PLACES.get(cfg["architecture"], _PLAIN), file, D=config.d_in, F=config.d_sae)
    if (rule := sealed_with(file)) and rule != _rule(cfg):
        raise SaekitError(f"'{folder / CONFIG}' says {_rule(cfg)}, but its weights were saved with {rule}")
    if cfg["architecture"] == "gated":
        weights = gated(weights)
    if by_norm:  # the same dictionary with unit rows
        weights = scaled_rows(weights, weights["W_dec"].norm(dim=1))
    return dictionary(config, weights, dtype, device)


def _rule(cfg: dict[str, Any]) -> str:
    """The inference rule in a config, as text."""
    return ", ".join(f"{key} = {cfg[key]}" for key in _RULE if key in cfg)


def _config(cfg: dict[str, Any]) -> SAEConfig:
    """What ``cfg.json`` says; raises many kinds of errors where it says nothing sensible."""
    from saekit.sae import SAEConfig

    architecture = cfg["architecture"]
    normalisation = cfg.get("normalize_activations") or "none"
    if normalisation not in ("none", "layer_norm"):
        raise SaekitError(
            f"a dictionary with normalize_activations = {reprlib.repr(normalisation)} is not read: fold it first"
        )
    return SAEConfig(
        d_in=checks.whole(cfg, "d_in"),
        d_sae=checks.whole(cfg, "d_sae"),
        architecture=_AS.get(architecture, architecture),
        affinity_scale="token_norm" if architecture == _TOKEN_NORM else "none",
        k=checks.whole(cfg, "k") if architecture == "topk" else None,
        apply_b_dec_to_input=checks.flag(cfg, "apply_b_dec_to_input", True),
        input_normalization="layer_norm" if normalisation == "layer_norm" else "none",
        metadata=_metadata(cfg),
    )


def _metadata(cfg: dict[str, Any]) -> dict[str, Any]:
    """What the config tells of the training; before 0.2, saekit called the provenance of the data its passport."""
    metadata = dict(cfg.get("metadata") or {})
    own = metadata.get("saekit")
    if isinstance(own, dict) and "passport" in own:
        metadata["saekit"] = {("provenance" if key == "passport" else key): value for key, value in own.items()}
    return metadata
