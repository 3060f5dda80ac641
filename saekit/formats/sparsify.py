"""The format of sparsify (EleutherAI): ``cfg.json`` and ``sae.safetensors`` in a folder named after the hook point."""

from __future__ import annotations

import json
import re
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from saekit.files import replace_files
from saekit.formats import checks
from saekit.formats.layout import Stored, arranged, dictionary, scattered
from saekit.formats.origin import of_sparsify
from saekit.formats.rewriting import with_b_dec
from saekit.formats.tensor_files import read_tensors, write_safetensors
from saekit.reading import check_inside, check_json, read_json

if TYPE_CHECKING:
    from saekit.sae import SparseAutoencoder

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
_DEFAULTS = {"activation": "topk", "expansion_factor": 32, "num_latents": 0, "k": 32}  # the package's own
_PLACES = {
    "W_enc": Stored("encoder.weight", "FD"),
    "b_enc": Stored("encoder.bias", "F"),
    "W_dec": Stored("W_dec", "FD"),
    "b_dec": Stored("b_dec", "D"),
}


def recognises(path: Path) -> bool:
    """Whether both files are there."""
    folder = checks.folder_of(path, WEIGHTS)
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def read(path: Path, device: str | torch.device = "cpu") -> SparseAutoencoder:
    """Read a dictionary, in the dtype that it is stored in.

    Raises:
        SaekitError: a file is damaged or leads out of the folder, its tensors do not have the shapes that the config
            names, or it is a transcoder, has a skip connection, or selects by groups.
    """
    from saekit.sae import SAEConfig

    folder = checks.folder_of(path, WEIGHTS)
    file = folder / CONFIG
    check_inside(file, folder)
    with checks.understanding(file):
        cfg = {**_DEFAULTS, **checks.mapping(read_json(file))}
        d_in, k = checks.whole(cfg, "d_in"), checks.whole(cfg, "k")
        d_sae = checks.whole(cfg, "num_latents") if cfg["num_latents"] else d_in * checks.whole(cfg, "expansion_factor")
        own = checks.own_metadata(cfg)
    for key in ("transcode", "skip_connection", "signed"):
        checks.refuse(bool(cfg.get(key)), file, f"{key} = {reprlib.repr(cfg.get(key))}")
    checks.refuse(cfg["activation"] != "topk", file, f"activation = {reprlib.repr(cfg['activation'])}")
    point = folder.parent if re.fullmatch(r"seed\d+", folder.name) else folder  # of one hook point, several seeds
    facts = own or of_sparsify(point, checks.optional_json(point.parent / "config.json"))
    config = SAEConfig(d_in, d_sae, "topk", k, metadata=facts)
    weights = arranged(read_tensors(folder / WEIGHTS, folder), _PLACES, folder / WEIGHTS, D=config.d_in, F=config.d_sae)
    return dictionary(config, weights, weights["W_enc"].dtype, device)


def lacks(sae: SparseAutoencoder) -> checks.Lack | None:
    """What of a dictionary the format cannot hold."""
    if sae.cfg.input_normalization != "none":
        return "layer_norm"
    return None if sae.cfg.architecture == "topk" else "thresholds"


def write(sae: SparseAutoencoder, folder: Path, *, overwrite: bool = False) -> Path:
    """Write a dictionary; returns the folder.

    Raises:
        SaekitError: it is not ``topk``, JSON does not hold the metadata, or the folder
            holds something and ``overwrite`` is not set.
    """
    checks.check_holds(lacks(sae), "sparsify")
    check_json(sae.cfg.metadata, "metadata")  # it may have been changed since
    checks.place(folder, WEIGHTS, overwrite=overwrite)
    weights: dict[str, Any] = dict(sae.state_dict())
    if not sae.cfg.apply_b_dec_to_input:
        weights = with_b_dec(weights, 1)
    tensors = scattered(weights, _PLACES)
    cfg = {
        "activation": "topk",
        "expansion_factor": max(1, sae.cfg.d_sae // sae.cfg.d_in),
        "normalize_decoder": True,
        "num_latents": sae.cfg.d_sae,
        "k": sae.cfg.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.cfg.d_in,
        "saekit": {"metadata": sae.cfg.metadata},
    }
    text = json.dumps(cfg, indent=2) + "\n"
    replace_files(
        {
            folder / WEIGHTS: lambda part: write_safetensors(tensors, part),
            folder / CONFIG: lambda part: part.write_text(text),
        }
    )
    return folder
