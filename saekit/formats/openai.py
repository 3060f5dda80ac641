"""The format of OpenAI's sparse autoencoders: one ``.pt``, a pickled dictionary of tensors and of what they are.

Their TopK dictionaries take activations through a layer norm, token by token, which decoding undoes.
"""

from __future__ import annotations

import re
import reprlib
from itertools import islice
from pathlib import Path
from typing import Any

from saekit.formats import checks
from saekit.formats.format import Contents, Format
from saekit.formats.layout import Stored, from_file
from saekit.formats.rewriting import upcast
from saekit.formats.tensor_files import read_tensors
from saekit.sae_config import SAEConfig

_STORED = {
    "W_enc": Stored("encoder.weight", "FD"),
    "b_enc": Stored("latent_bias", "F"),
    "W_dec": Stored("decoder.weight", "DF"),
    "b_dec": Stored("pre_bias", "D"),
}
_BESIDE = {
    *("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"),
    *("activation.k", "activation.postact_fn"),  # said again by activation_state_dict
}
_PATH = re.compile(
    r"gpt2-small/(mlp_post_act|resid_delta_attn|resid_post_attn|resid_delta_mlp|resid_post_mlp)"
    r"(?:_v4|_v5_32k|_v5_128k)?/autoencoders/(\d{1,2})\.pt$"
)
_HOOKS = {
    "mlp_post_act": "mlp.hook_post",
    "resid_delta_attn": "hook_attn_out",
    "resid_post_attn": "hook_resid_mid",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_post_mlp": "hook_resid_post",
}


class OpenAI(Format):
    """Read only."""

    weights = ("*.pt",)

    def find(self, path: Path) -> Path | None:
        """A ``.pt``, or the one in a folder with nothing else."""
        if path.is_dir():
            inside = list(islice(path.iterdir(), 2))
            return self.find(inside[0]) if len(inside) == 1 and inside[0].is_file() else None
        return path if path.suffix == ".pt" and path.is_file() else None

    def read(self, file: Path) -> Contents:
        """Read a dictionary.

        Raises:
            SaekitError: the file is damaged or leads out of its folder, its tensors do not fit, or it applies another
                function than ReLU or TopK.
        """
        stored = read_tensors(file, file.parent)
        activation, state = stored.pop("activation", "ReLU"), stored.pop("activation_state_dict", {})
        tensors = {name: value for name, value in stored.items() if name not in _BESIDE}
        weights = upcast(from_file(tensors, _STORED, file))
        checks.refuse(activation not in ("ReLU", "TopK"), file, f"the activation {reprlib.repr(activation)}")
        top_k = activation == "TopK"
        with checks.understanding(file):
            state = checks.mapping(state)
            k = checks.positive_int(state, "k") if top_k else None
            after = state["postact_fn"] if top_k else "ReLU"
        checks.refuse(after != "ReLU", file, f"{reprlib.repr(after)} after TopK")
        d_in, d_sae = weights["W_enc"].shape
        config = SAEConfig(
            d_in,
            d_sae,
            "topk" if top_k else "standard",
            k,
            input_normalization="layer_norm" if top_k else "none",
            metadata=origin(file),
        )
        return Contents(config, weights, weights["W_dec"].dtype)


FORMAT = OpenAI()


def origin(path: Path) -> dict[str, Any]:
    """From a path as OpenAI published its dictionaries of GPT-2 small."""
    named = _PATH.search((path.parent.resolve() / path.name).as_posix())  # the file may be a link of the hub's cache
    if not named:
        return {}
    return checks.known(model_name="gpt2", hook_name=f"blocks.{int(named[2])}.{_HOOKS[named[1]]}")
