"""The format of SAELens (6.x), which is also ours: ``cfg.json`` and ``sae_weights.safetensors`` in a folder.

One inference rule SAELens does not have: thresholds in units of each token's norm. Such a dictionary is written under
an architecture of its own, which SAELens refuses to open instead of giving other features.
"""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import Any

from saekit.errors import SaekitError
from saekit.formats import checks
from saekit.formats.format import Contents, Dictionary, Format, Writers
from saekit.formats.layout import OURS, Stored, dtype_named, from_file
from saekit.formats.rewriting import gated, scaled_rows
from saekit.formats.saelens_before_6 import modernised
from saekit.formats.tensor_files import read_tensors, sealed_with, write_safetensors
from saekit.reading import check_inside, read_json
from saekit.sae_config import SAEConfig

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_RULE = ("architecture", "k", "apply_b_dec_to_input", "normalize_activations")  # no shape tells when these are others
_TOKEN_NORM = "saekit_jumprelu_token_norm"
_AS = {"gated": "jumprelu", _TOKEN_NORM: "jumprelu"}  # what some architectures are here
_PLAIN = {name: Stored(name, letters) for name, letters in OURS.items() if name != "threshold"}
_STORED = {
    "jumprelu": {**_PLAIN, "threshold": Stored("threshold", "F")},
    "gated": {
        **{name: stored for name, stored in _PLAIN.items() if name != "b_enc"},
        **{name: Stored(name, "F") for name in ("b_gate", "b_mag", "r_mag")},
    },
}
_STORED[_TOKEN_NORM] = _STORED["jumprelu"]


class SAELens(Format):
    """SAELens', and the one that ``SparseAutoencoder.save`` writes."""

    weights, requires = (WEIGHTS,), (CONFIG,)

    def read(self, file: Path) -> Contents:
        """Read a dictionary. Nothing of its size is made before the files agree on it.

        Raises:
            SaekitError: a file is damaged or leads out of the folder, a key is missing, or the tensors do not have the
                shapes that the config names.
        """
        folder, config = file.parent, file.parent / CONFIG
        check_inside(config, folder)
        with checks.understanding(config):
            cfg = modernised(checks.mapping(read_json(config)), config)
            sae, dtype = _config(cfg), dtype_named(cfg["dtype"])
            by_norm = checks.flag(cfg, "rescale_acts_by_decoder_norm", False)  # selection by f·‖W_dec‖
        reshaped = cfg.get("reshape_activations") or "none"
        # "hook_z": heads are put side by side, which is how activations come to dictionaries here
        checks.refuse(reshaped not in ("none", "hook_z"), config, f"reshape_activations = {reprlib.repr(reshaped)}")
        tensors = read_tensors(file, folder)
        scaling = tensors.pop("scaling_factor", None)  # of SAELens before 6, where it was written without effect too
        if scaling is not None and not bool((scaling == 1).all()):
            raise SaekitError(f"'{file}' holds a scaling_factor, which saekit does not read")
        weights = from_file(tensors, _STORED.get(cfg["architecture"], _PLAIN), file, D=sae.d_in, F=sae.d_sae)
        if (rule := sealed_with(file)) and rule != _rule(cfg):
            raise SaekitError(f"'{config}' says {_rule(cfg)}, but its weights were saved with {rule}")
        if cfg["architecture"] == "gated":
            weights = gated(weights)
        if by_norm:  # the same dictionary with unit rows
            weights = scaled_rows(weights, weights["W_dec"].norm(dim=1))
        return Contents(sae, weights, dtype)

    def unsupported(self, sae: Dictionary) -> str | None:
        """Thresholds by token norm: such a dictionary is written all the same, but not for SAELens."""
        return "token_norm" if sae.cfg.affinity_scale != "none" else None

    def files(self, sae: Dictionary) -> Writers:
        """Weights, sealed and with their rule, and config."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in sae.state_dict().items()}
        cfg: dict[str, Any] = {
            "architecture": sae.cfg.architecture if sae.cfg.affinity_scale == "none" else _TOKEN_NORM,
            "d_in": sae.cfg.d_in,
            "d_sae": sae.cfg.d_sae,
            "dtype": str(tensors["W_dec"].dtype).removeprefix("torch."),
            "apply_b_dec_to_input": sae.cfg.apply_b_dec_to_input,
            "normalize_activations": sae.cfg.input_normalization,
            "reshape_activations": "hook_z" if str(sae.cfg.metadata.get("hook_name")).endswith("hook_z") else "none",
            "metadata": {**sae.cfg.metadata, "sae_lens_version": "6.0.0"},
        }
        if sae.cfg.k is not None:
            cfg |= {"k": sae.cfg.k, "rescale_acts_by_decoder_norm": False}
        text = json.dumps(cfg, indent=2) + "\n"
        return {
            WEIGHTS: lambda part: write_safetensors(tensors, part, _rule(cfg)),
            CONFIG: lambda part: part.write_text(text),
        }


FORMAT = SAELens()


def _rule(cfg: dict[str, Any]) -> str:
    """The inference rule in a config, as text."""
    return ", ".join(f"{key} = {cfg[key]}" for key in _RULE if key in cfg)


def _config(cfg: dict[str, Any]) -> SAEConfig:
    """What ``cfg.json`` says; raises many kinds of errors where it says nothing sensible."""
    architecture = cfg["architecture"]
    normalisation = cfg.get("normalize_activations") or "none"
    if normalisation not in ("none", "layer_norm"):
        raise SaekitError(
            f"a dictionary with normalize_activations = {reprlib.repr(normalisation)} is not read: fold it first"
        )
    return SAEConfig(
        d_in=checks.positive_int(cfg, "d_in"),
        d_sae=checks.positive_int(cfg, "d_sae"),
        architecture=_AS.get(architecture, architecture),
        affinity_scale="token_norm" if architecture == _TOKEN_NORM else "none",
        k=checks.positive_int(cfg, "k") if architecture == "topk" else None,
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
