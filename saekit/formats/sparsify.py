"""The format of sparsify (EleutherAI): ``cfg.json`` and ``sae.safetensors`` in a folder named after the hook point."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saekit.formats import checks
from saekit.formats.format import Contents, Dictionary, Format, Writers, check_holds
from saekit.formats.layout import Stored, from_file, to_file
from saekit.formats.rewriting import with_b_dec
from saekit.formats.tensor_files import read_tensors, write_safetensors
from saekit.reading import check_inside, read_json
from saekit.sae_config import SAEConfig

CONFIG, WEIGHTS, RUN = "cfg.json", "sae.safetensors", "../config.json"
_DEFAULTS = {"activation": "topk", "expansion_factor": 32, "num_latents": 0, "k": 32}  # the package's own
_STORED = {
    "W_enc": Stored("encoder.weight", "FD"),
    "b_enc": Stored("encoder.bias", "F"),
    "W_dec": Stored("W_dec", "FD"),
    "b_dec": Stored("b_dec", "D"),
}
_BLOCK = re.compile(r"(?:layers|h)\.(\d{1,4})(\.mlp)?")
_NORM_AFTER_MLP = re.compile(r"(?i)gemma-?[234]|olmo-?[23]|glm")  # there an MLP module's output is not hook_mlp_out


class Sparsify(Format):
    """TopK alone."""

    weights, requires, optional = (WEIGHTS,), (CONFIG,), (RUN,)

    def read(self, file: Path) -> Contents:
        """Read a dictionary, in the dtype that it is stored in.

        Raises:
            SaekitError: a file is damaged or leads out of the folder, its tensors do not have the shapes that the
                config names, or it is a transcoder, has a skip connection, or selects by groups.
        """
        folder = file.parent
        config = folder / CONFIG
        check_inside(config, folder)
        with checks.understanding(config):
            cfg = {**_DEFAULTS, **checks.mapping(read_json(config))}
            d_in, k = checks.positive_int(cfg, "d_in"), checks.positive_int(cfg, "k")
            size = checks.positive_int(cfg, "num_latents" if cfg["num_latents"] else "expansion_factor")
            d_sae = size if cfg["num_latents"] else d_in * size
            own = checks.own_metadata(cfg)
        for key in ("transcode", "skip_connection", "signed"):
            checks.refuse(bool(cfg.get(key)), config, f"{key} = {reprlib.repr(cfg.get(key))}")
        checks.refuse(cfg["activation"] != "topk", config, f"activation = {reprlib.repr(cfg['activation'])}")
        point = folder.parent if re.fullmatch(r"seed\d+", folder.name) else folder  # of one hook point, several seeds
        facts = own or origin(point, checks.optional_json(point.parent / "config.json"))
        sae = SAEConfig(d_in, d_sae, "topk", k, metadata=facts)
        weights = from_file(read_tensors(file, folder), _STORED, file, D=sae.d_in, F=sae.d_sae)
        return Contents(sae, weights, weights["W_enc"].dtype)

    def unsupported(self, sae: Dictionary) -> str | None:
        """Layer norms, and all rules but ``topk``."""
        if sae.cfg.input_normalization != "none":
            return "layer_norm"
        return None if sae.cfg.architecture == "topk" else "thresholds"

    def files(self, sae: Dictionary) -> Writers:
        """Weights and config; where b_dec is not subtracted from the input, b_enc makes up for it."""
        check_holds(self.unsupported(sae), "sparsify")
        weights: Mapping[str, Any] = sae.state_dict()
        if not sae.cfg.apply_b_dec_to_input:
            weights = with_b_dec(weights, 1)
        tensors = to_file(weights, _STORED)
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
        return {
            WEIGHTS: lambda part: write_safetensors(tensors, part),
            CONFIG: lambda part: part.write_text(text),
        }


FORMAT = Sparsify()


def origin(folder: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    """From the name of a hook point's folder (relative to the base model) and the run's config beside it."""
    model = run.get("model")
    block = _BLOCK.fullmatch(folder.name)
    hook = f"blocks.{int(block[1])}.hook_resid_post" if block and not block[2] else None
    if block and block[2] and isinstance(model, str) and not _NORM_AFTER_MLP.search(model):
        hook = f"blocks.{int(block[1])}.hook_mlp_out"
    return checks.known(
        model_name=model,
        hook_name=hook,
        dataset_path=run.get("dataset"),
        context_size=checks.length(run.get("ctx_len")),
    )
