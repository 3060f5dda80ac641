"""Checkpoints of saekit's own runs: each is the dictionary that the run had at that step.

Thresholds are what training knew of them; the finished dictionary's are set on held-out activations.
"""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import safe_open

from saekit.errors import SaekitError
from saekit.formats import checks
from saekit.formats.format import Contents, Format
from saekit.formats.layout import OURS, Stored, from_file
from saekit.formats.rewriting import fold_units, upcast
from saekit.formats.tensor_files import read_tensors
from saekit.reading import parse_json
from saekit.sae_config import SAEConfig

_NAME = re.compile(r"step-(\d{1,18})\.safetensors")
_PLAIN = {name: Stored(name, letters) for name, letters in OURS.items() if name != "threshold"}


class Checkpoint(Format):
    """Read only."""

    weights = ("step-*.safetensors",)

    def find(self, path: Path) -> Path | None:
        """A checkpoint, or the newest in a folder of them."""
        if path.is_dir():
            found = [each for each in path.iterdir() if _NAME.fullmatch(each.name) and each.is_file()]
            return max(found, key=lambda each: int(each.stem[5:]), default=None)
        return path if _NAME.fullmatch(path.name) and path.is_file() else None

    def read(self, file: Path) -> Contents:
        """Read the dictionary of that step, for raw activations.

        Raises:
            SaekitError: the file is damaged or leads out of its folder, or it was written before checkpoints told how
                they are read.
        """
        stored = read_tensors(file, file.parent)
        with safe_open(file, framework="pt") as opened, checks.understanding(file):
            told = checks.mapping(parse_json((opened.metadata() or {})["saekit"], file)).get("dictionary")
        if told is None:
            raise SaekitError(f"'{file}' does not tell how to read it as a dictionary; --resume writes one that does")
        tensors = {name: stored[f"sae.{name}"] for name in _PLAIN if f"sae.{name}" in stored}
        weights = upcast(from_file(tensors, _PLAIN, file))
        weights = {name: value.clone() for name, value in weights.items()}
        d_in, d_sae = weights["W_enc"].shape
        with checks.understanding(file):
            told = checks.mapping(told)
            scale = float(told["scale"])
            rule = {"k": told["k"], "affinity_scale": told["affinity_scale"]}
            cfg = SAEConfig(d_in, d_sae, told["architecture"], **rule, metadata=checks.mapping(told["metadata"]))
            if cfg.architecture == "jumprelu":
                weights["threshold"] = stored["rule.threshold"].clone().expand(d_sae)
            if "rule.gain" in stored:
                weights["W_enc"].mul_(stored["rule.gain"])
                weights["b_enc"].mul_(stored["rule.gain"]).add_(stored["rule.shift"])
            thresholds = cfg.architecture == "jumprelu" and cfg.affinity_scale == "none"
            if not scale > 0 or stored["centre"].shape != (d_in,):
                raise ValueError("its units are none")
            fold_units(weights, stored["centre"], scale, thresholds=thresholds)
        return Contents(cfg, weights, weights["W_dec"].dtype)


FORMAT = Checkpoint()
