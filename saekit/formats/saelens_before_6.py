"""Configs that SAELens wrote before version 6, in the words of version 6."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

from saekit.formats.checks import refuse

_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
_FACTS = (
    *("model_name", "model_from_pretrained_kwargs", "hook_name", "hook_head_index", "dataset_path", "neuronpedia_id"),
    *("context_size", "prepend_bos", "seqpos_slice", "exclude_special_tokens"),
)


def modernised(cfg: dict[str, Any], path: Path) -> dict[str, Any]:
    """The config as it is, or what SAELens makes of it where its metadata name no version from 6 on.

    Raises:
        SaekitError: it asks for an activation function, or for a scaling, that is not known here.
    """
    version = cfg.get("sae_lens_version") or (cfg.get("metadata") or {}).get("sae_lens_version")
    if version is not None and int(str(version).split(".")[0]) >= 6:
        return cfg
    cfg = {_RENAMED.get(key, key): value for key, value in cfg.items()}
    function = cfg.get("activation_fn") or "relu"
    arguments = {key: value for key, value in (cfg.get("activation_fn_kwargs") or {}).items() if value}
    known = (function == "relu" and not arguments) or (function == "topk" and set(arguments) == {"k"})
    refuse(not known, path, f"activation_fn = {reprlib.repr(function)} of {reprlib.repr(arguments)}")
    refuse(bool(cfg.get("finetuning_scaling_factor")), path, "finetuning_scaling_factor")
    cfg.setdefault("architecture", "standard")
    if function == "topk":
        cfg |= {"architecture": "topk", "k": arguments["k"]}
    if isinstance(cfg.get("normalize_activations"), bool):
        cfg["normalize_activations"] = "expected_average_only_in" if cfg["normalize_activations"] else "none"
    if "hook_z" in str(cfg.get("hook_name")):
        cfg.setdefault("reshape_activations", "hook_z")
    cfg.setdefault("prepend_bos", True)
    facts = dict(cfg.get("metadata") or {})
    return {**cfg, "metadata": facts | {key: cfg[key] for key in _FACTS if cfg.get(key) is not None}}
