"""The format of dictionary_learning: ``ae.pt``, a pickled dictionary of tensors, and ``config.json`` in a folder."""

from __future__ import annotations

import json
import reprlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from saekit.errors import SaekitError, SaekitWarning, did_you_mean
from saekit.files import replace_files
from saekit.formats import checks
from saekit.formats.layout import OURS, Stored, arranged, dictionary, scattered
from saekit.formats.origin import for_dictionary_learning, of_dictionary_learning
from saekit.formats.rewriting import gated, scaled_rows, wide, with_b_dec
from saekit.formats.tensor_files import read_tensors, write_torch
from saekit.reading import check_inside, check_json, read_json

if TYPE_CHECKING:
    from saekit.sae import Architecture, SparseAutoencoder

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
        places: where its tensors stand.
        subtracts: whether b_dec is subtracted from the input.
        counts: whether it has a k, and a threshold for all features, which may be unset.
    """

    architecture: Architecture
    places: dict[str, Stored]
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


def recognises(path: Path) -> bool:
    """Whether there is an ``ae.pt``."""
    return (checks.folder_of(path, WEIGHTS) / WEIGHTS).is_file()


def read(path: Path, device: str | torch.device = "cpu") -> SparseAutoencoder:
    """Read a dictionary as the package's own ``load_dictionary`` would use it.

    Raises:
        SaekitError: a file is damaged or leads out of the folder, the class is not known, or the tensors do not fit.
    """
    from saekit.sae import SAEConfig

    folder = checks.folder_of(path, WEIGHTS)
    check_inside(folder / CONFIG, folder)
    with checks.understanding(folder / CONFIG):
        cfg = checks.mapping(read_json(folder / CONFIG))
        trainer, own = checks.mapping(cfg["trainer"]), checks.own_metadata(cfg)
        name = str(trainer["dict_class"])
        kind = _kind(name, folder / CONFIG)
        k = checks.whole(trainer, "k") if kind.counts else None
    file = folder / WEIGHTS
    found = read_tensors(file, folder)
    limit = _numbers(found, k, file) if k is not None else None
    weights = wide(arranged(found, kind.places, file))
    d_in, d_sae = weights["W_enc"].shape
    if name == "AutoEncoder":
        norms = weights["W_dec"].norm(dim=1)
        if not torch.allclose(norms, torch.ones_like(norms)):  # as the package does when it loads one
            weights = scaled_rows(weights, torch.where(norms > 0, norms, 1))
    elif name == "GatedAutoEncoder":
        weights = gated(weights)
    elif limit is not None and kind.architecture == "jumprelu":
        weights["threshold"] = weights["b_enc"].new_full((d_sae,), limit)
        if limit < 0:
            told = "has no threshold yet: as in its own code, all positive features are active"
            warnings.warn(f"'{file}' {told}", SaekitWarning, stacklevel=3)
    config = SAEConfig(
        d_in,
        d_sae,
        kind.architecture,
        k if kind.architecture == "topk" else None,
        apply_b_dec_to_input=kind.subtracts,
        metadata=own or of_dictionary_learning(trainer, cfg.get("buffer")),
    )
    return dictionary(config, weights, weights["W_dec"].dtype, device)


def _kind(name: str, file: Path) -> Kind:
    if name not in KINDS:
        hint = did_you_mean(name, KINDS)
        raise SaekitError(f"'{file}' is of the class {reprlib.repr(name)}, which saekit does not read{hint}")
    return KINDS[name]


def _numbers(found: dict[str, Any], k: int, file: Path) -> float:
    """Take what is no weight out of the tensors of a class that counts; returns the threshold.

    Raises:
        SaekitError: one of them is no number, or k is another than in the config.
    """
    numbers = {name: found.pop(name, None) for name in ("k", "threshold")}
    found.pop("group_sizes", None)  # of the nested dictionaries; the whole is what is used
    for name, value in numbers.items():
        if value is not None and not (isinstance(value, Tensor) and value.numel() == 1):
            raise SaekitError(f"'{file}' is damaged: its {name} is no number")
    if numbers["k"] is not None and float(numbers["k"]) != k:
        raise SaekitError(f"'{file}' holds k = {float(numbers['k']):g}, but its config asks for {k}")
    return -1.0 if numbers["threshold"] is None else float(numbers["threshold"])


def lacks(sae: SparseAutoencoder) -> checks.Lack | None:
    """What of a dictionary the format cannot hold."""
    if sae.cfg.input_normalization != "none":
        return "layer_norm"
    if sae.cfg.affinity_scale != "none":
        return "token_norm"
    zero = sae.cfg.architecture == "standard" and bool((sae.W_dec.norm(dim=1) == 0).any())
    return "zero_rows" if zero else None


def write(sae: SparseAutoencoder, folder: Path, *, overwrite: bool = False) -> Path:
    """Write a dictionary; returns the folder. One of ``standard`` is written with decoder rows of norm 1.

    Raises:
        SaekitError: the format cannot hold it, JSON does not hold the metadata, or the folder
            holds something and ``overwrite`` is not set.
    """
    checks.check_holds(lacks(sae), "dictionary_learning")
    check_json(sae.cfg.metadata, "metadata")  # it may have been changed since
    checks.place(folder, WEIGHTS, overwrite=overwrite)
    name = _WRITTEN[sae.cfg.architecture]
    kind, facts = KINDS[name], sae.cfg.metadata
    weights = wide(sae.state_dict())
    if kind.subtracts != sae.cfg.apply_b_dec_to_input:
        weights = with_b_dec(weights, 1 if kind.subtracts else -1)
    if name == "AutoEncoder":
        weights = scaled_rows(weights, weights["W_dec"].norm(dim=1))
    tensors = scattered(weights, kind.places)
    if sae.cfg.k is not None:
        tensors |= {"k": torch.tensor(sae.cfg.k, dtype=torch.int32), "threshold": torch.tensor(-1.0)}
    cfg = {
        "trainer": {
            "dict_class": name,
            "activation_dim": sae.cfg.d_in,
            "dict_size": sae.cfg.d_sae,
            **for_dictionary_learning(facts),
            **({"k": sae.cfg.k} if sae.cfg.k is not None else {}),
        },
        "buffer": {"d_submodule": sae.cfg.d_in, "ctx_len": facts.get("context_size")},
        "saekit": {"metadata": facts},
    }
    text = json.dumps(cfg, indent=2) + "\n"
    replace_files(
        {
            folder / WEIGHTS: lambda part: write_torch(tensors, part),
            folder / CONFIG: lambda part: part.write_text(text),
        }
    )
    return folder
