"""The format of Gemma Scope (Google DeepMind): ``params.npz``, and ``params.safetensors`` of Gemma Scope 2."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from saekit.errors import SaekitError
from saekit.formats.checks import known, optional_json
from saekit.formats.format import Contents, Format
from saekit.formats.layout import OURS, Stored, from_file
from saekit.formats.rewriting import upcast
from saekit.formats.tensor_files import read_tensors
from saekit.sae_config import SAEConfig

_STORED = {name: Stored(name.lower(), letters) for name, letters in OURS.items()}
_NO_AUTOENCODER = re.compile(r"gemma-scope.*(transcoder|crosscoder|clt)")  # their tensors look alike
_REPOSITORY = re.compile(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|att|mlp)\b")
_HOOKS = {"res": "hook_resid_post", "att": "attn.hook_z", "mlp": "hook_mlp_out"}


class GemmaScope(Format):
    """Read only."""

    weights = ("params.npz", "params.safetensors")
    optional = ("config.json",)

    def read(self, file: Path) -> Contents:
        """Read a dictionary.

        Raises:
            SaekitError: the file is damaged or leads out of its folder, its tensors do not fit, or it is a transcoder
                by its path or by the config beside it.
        """
        folder = file.parent
        cfg = optional_json(folder / "config.json")
        into, out_of = cfg.get("hf_hook_point_in"), cfg.get("hf_hook_point_out")
        if _NO_AUTOENCODER.search(folder.resolve().as_posix()) or (out_of is not None and out_of != into):
            raise SaekitError(f"'{file}' is a transcoder, not an autoencoder; saekit does not read those")
        tensors = {name.lower(): value for name, value in read_tensors(file, folder).items()}
        weights = upcast(from_file(tensors, _STORED, file))
        d_in, d_sae = weights["W_enc"].shape
        config = SAEConfig(d_in, d_sae, "jumprelu", apply_b_dec_to_input=False, metadata=origin(folder))
        return Contents(config, weights, weights["W_dec"].dtype)


FORMAT = GemmaScope()


def origin(folder: Path) -> dict[str, Any]:
    """From a path as the repositories of Gemma Scope 1 have it, in the cache of the hub too."""
    path = folder.resolve().as_posix()
    repository, layer = _REPOSITORY.search(path), re.search(r"/layer_(\d{1,3})/width_\w+/", path + "/")
    if not repository or not layer:
        return {}
    size, kind, point = repository.groups()
    model = f"google/gemma-2-{size}" + ("-it" if kind == "it" else "")
    return known(model_name=model, hook_name=f"blocks.{int(layer[1])}.{_HOOKS[point]}", context_size=1024)
