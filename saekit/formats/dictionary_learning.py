"""The format of dictionary_learning: ``ae.pt``, a pickled dictionary of tensors, and ``config.json`` in a folder."""

from __future__ import annotations

import json
import re
import reprlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saekit.errors import SaekitError, SaekitWarning, did_you_mean
from saekit.formats import checks
from saekit.formats.format import Contents, Dictionary, Format, Writers, check_holds
from saekit.formats.layout import OURS, Stored, from_file, to_file
from saekit.formats.rewriting import gated, scaled_rows, upcast, with_b_dec
from saekit.formats.tensor_files import read_tensors, write_torch
from saekit.reading import check_inside, read_json
from saekit.sae_config import Architecture, SAEConfig

CONFIG, WEIGHTS = "config.json", "ae.pt"
_LINEAR = {"W_enc": Stored("encoder.weight", "FD"), "W_dec": Stored("decoder.weight", "DF")}
_BIASED = {**_LINEAR, "b_enc": Stored("encoder.bias", "F")}
_TOP_K = {**_BIASED, "b_dec": Stored("b_dec", "D")}
_GATED = {
    **_LINEAR,
    **{name: Stored(name.replace("b_", "") + "_bias", "F") for name in ("b_gate", "b_mag")},
    "r_mag": Stored("r_mag", "F"),
    "b_dec": Stored("decoder_bias", "D"),
}
_PLAIN = {name: Stored(name, letters) for name, letters in OURS.items() if name != "threshold"}


class Kind(NamedTuple):
    """A class of the package.

    Attributes:
        architecture: our rule.
        stored: where its tensors stand.
        subtracts: whether b_dec is subtracted from the input.
        counts: whether it has a k, and a threshold for all features, which may be unset.
    """

    architecture: Architecture
    stored: dict[str, Stored]
    subtracts: bool = True
    counts: bool = False


KINDS = {
    "AutoEncoder": Kind("standard", {**_BIASED, "b_dec": Stored("bias", "D")}),
    "AutoEncoderNew": Kind("standard", {**_BIASED, "b_dec": Stored("decoder.bias", "D")}, subtracts=False),
    "GatedAutoEncoder": Kind("jumprelu", _GATED),
    "JumpReluAutoEncoder": Kind("jumprelu", {**_PLAIN, "threshold": Stored("threshold", "F")}, subtracts=False),
    "AutoEncoderTopK": Kind("topk", _TOP_K, counts=True),
    "BatchTopKSAE": Kind("jumprelu", _TOP_K, counts=True),
    "MatryoshkaBatchTopKSAE": Kind("jumprelu", _PLAIN, counts=True),
}
_WRITTEN = {"topk": "AutoEncoderTopK", "standard": "AutoEncoder", "jumprelu": "JumpReluAutoEncoder"}


class DictionaryLearning(Format):
    """Of its classes, those in ``KINDS``."""

    weights, optional = (WEIGHTS,), (CONFIG,)  # without a config it is this format too, and damaged

    def read(self, file: Path) -> Contents:
        """Read a dictionary as the package's own ``load_dictionary`` would use it.

        Raises:
            SaekitError: a file is damaged or leads out of the folder, the class is not known, or the tensors do not
                fit.
        """
        folder, config = file.parent, file.parent / CONFIG
        check_inside(config, folder)
        with checks.understanding(config):
            cfg = checks.mapping(read_json(config))
            trainer, own = checks.mapping(cfg["trainer"]), checks.own_metadata(cfg)
            name = str(trainer["dict_class"])
            kind = _kind(name, config)
            k = checks.positive_int(trainer, "k") if kind.counts else None
        tensors = read_tensors(file, folder)
        threshold = _threshold(tensors, k, file) if k is not None else None
        weights = upcast(from_file(tensors, kind.stored, file))
        d_in, d_sae = weights["W_enc"].shape
        if name == "AutoEncoder":
            norms = weights["W_dec"].norm(dim=1)
            if not torch.allclose(norms, torch.ones_like(norms)):  # as the package does when it loads one
                weights = scaled_rows(weights, torch.where(norms > 0, norms, 1))
        elif name == "GatedAutoEncoder":
            weights = gated(weights)
        elif threshold is not None and kind.architecture == "jumprelu":
            weights["threshold"] = weights["b_enc"].new_full((d_sae,), threshold)
            if threshold < 0:
                told = "has no threshold yet: as in its own code, all positive features are active"
                warnings.warn(f"'{file}' {told}", SaekitWarning, stacklevel=3)
        sae = SAEConfig(
            d_in,
            d_sae,
            kind.architecture,
            k if kind.architecture == "topk" else None,
            apply_b_dec_to_input=kind.subtracts,
            metadata=own or origin(trainer, cfg.get("buffer")),
        )
        return Contents(sae, weights, weights["W_dec"].dtype)

    def unsupported(self, sae: Dictionary) -> str | None:
        """Layer norms, thresholds by token norm, and rows of zeros where its loader would divide by their norm."""
        if sae.cfg.input_normalization != "none":
            return "layer_norm"
        if sae.cfg.affinity_scale != "none":
            return "token_norm"
        zero = sae.cfg.architecture == "standard" and bool((sae.state_dict()["W_dec"].norm(dim=1) == 0).any())
        return "zero_rows" if zero else None

    def files(self, sae: Dictionary) -> Writers:
        """Weights and config. One of ``standard`` is written with decoder rows of norm 1."""
        check_holds(self.unsupported(sae), "dictionary_learning")
        name = _WRITTEN[sae.cfg.architecture]
        kind, facts = KINDS[name], sae.cfg.metadata
        weights = upcast(sae.state_dict())
        if kind.subtracts != sae.cfg.apply_b_dec_to_input:
            weights = with_b_dec(weights, 1 if kind.subtracts else -1)
        if name == "AutoEncoder":
            weights = scaled_rows(weights, weights["W_dec"].norm(dim=1))
        tensors = to_file(weights, kind.stored)
        if sae.cfg.k is not None:
            tensors |= {"k": torch.tensor(sae.cfg.k, dtype=torch.int32), "threshold": torch.tensor(-1.0)}
        cfg = {
            "trainer": {
                "dict_class": name,
                "activation_dim": sae.cfg.d_in,
                "dict_size": sae.cfg.d_sae,
                **_told_of_origin(facts),
                **({"k": sae.cfg.k} if sae.cfg.k is not None else {}),
            },
            "buffer": {"d_submodule": sae.cfg.d_in, "ctx_len": facts.get("context_size")},
            "saekit": {"metadata": facts},
        }
        text = json.dumps(cfg, indent=2) + "\n"
        return {
            WEIGHTS: lambda part: write_torch(tensors, part),
            CONFIG: lambda part: part.write_text(text),
        }


FORMAT = DictionaryLearning()


def origin(trainer: Mapping[str, Any], buffer: Any) -> dict[str, Any]:
    """From the config of a trainer and of its buffer of activations."""
    named = re.fullmatch(r"resid_post_layer_(\d{1,4})", str(trainer.get("submodule_name")))
    layer = int(named[1]) if named else None
    hook = f"blocks.{layer}.hook_resid_post" if layer is not None and layer == trainer.get("layer") else None
    context = buffer.get("ctx_len") if isinstance(buffer, dict) else None
    return checks.known(model_name=trainer.get("lm_name"), hook_name=hook, context_size=checks.length(context))


def _told_of_origin(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata in the words of a trainer's config."""
    block = re.fullmatch(r"blocks\.(\d{1,4})\.hook_resid_post", str(facts.get("hook_name")))
    where = {"layer": int(block[1]), "submodule_name": f"resid_post_layer_{int(block[1])}"} if block else {}
    return {"lm_name": facts.get("model_name"), **where}


def _kind(name: str, file: Path) -> Kind:
    if name not in KINDS:
        hint = did_you_mean(name, KINDS)
        raise SaekitError(f"'{file}' is of the class {reprlib.repr(name)}, which saekit does not read{hint}")
    return KINDS[name]


def _threshold(tensors: dict[str, Any], k: int, file: Path) -> float:
    """Take what is no weight out of the tensors of a class that counts; returns the threshold.

    Raises:
        SaekitError: one of them is no number, or k is another than in the config.
    """
    numbers = {name: tensors.pop(name, None) for name in ("k", "threshold")}
    tensors.pop("group_sizes", None)  # of the nested dictionaries; the whole is what is used
    for name, value in numbers.items():
        if value is not None and not (isinstance(value, Tensor) and value.numel() == 1):
            raise SaekitError(f"'{file}' is damaged: its {name} is no number")
    if numbers["k"] is not None and float(numbers["k"]) != k:
        raise SaekitError(f"'{file}' holds k = {float(numbers['k']):g}, but its config asks for {k}")
    return -1.0 if numbers["threshold"] is None else float(numbers["threshold"])
