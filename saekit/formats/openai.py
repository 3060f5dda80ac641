"""The format of OpenAI's sparse autoencoders: one ``.pt``, a pickled dictionary of tensors and of what they are.

Their TopK dictionaries take activations through a layer norm, token by token, which decoding undoes.
"""

from __future__ import annotations

import reprlib
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from saekit.formats import checks
from saekit.formats.layout import Stored, arranged, dictionary
from saekit.formats.origin import of_openai
from saekit.formats.rewriting import wide
from saekit.formats.tensor_files import read_tensors

if TYPE_CHECKING:
    from saekit.sae import SparseAutoencoder

_PLACES = {
    "W_enc": Stored("encoder.weight", "FD"),
    "b_enc": Stored("latent_bias", "F"),
    "W_dec": Stored("decoder.weight", "DF"),
    "b_dec": Stored("pre_bias", "D"),
}
_BESIDE = {
    *("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"),
    *("activation.k", "activation.postact_fn"),  # said again by activation_state_dict
}


def recognises(path: Path) -> bool:
    """Whether it is a ``.pt``, or a folder with nothing but one."""
    return _file(path) is not None


def read(path: Path, device: str | torch.device = "cpu") -> SparseAutoencoder:
    """Read a dictionary.

    Raises:
        SaekitError: the file is damaged or leads out of its folder, its tensors do not fit, or it applies another
            function than ReLU or TopK.
    """
    from saekit.sae import SAEConfig

    file = _file(path)
    assert file is not None
    found = read_tensors(file, file.parent)
    activation, state = found.pop("activation", "ReLU"), found.pop("activation_state_dict", {})
    found = {name: value for name, value in found.items() if name not in _BESIDE}
    weights = wide(arranged(found, _PLACES, file))
    checks.refuse(activation not in ("ReLU", "TopK"), file, f"the activation {reprlib.repr(activation)}")
    top_k = activation == "TopK"
    with checks.understanding(file):
        state = checks.mapping(state)
        k = checks.whole(state, "k") if top_k else None
        after = state["postact_fn"] if top_k else "ReLU"
    checks.refuse(after != "ReLU", file, f"{reprlib.repr(after)} after TopK")
    d_in, d_sae = weights["W_enc"].shape
    config = SAEConfig(
        d_in,
        d_sae,
        "topk" if top_k else "standard",
        k,
        input_normalization="layer_norm" if top_k else "none",
        metadata=of_openai(file),
    )
    return dictionary(config, weights, weights["W_dec"].dtype, device)


def _file(path: Path) -> Path | None:
    if path.is_dir():
        inside = list(islice(path.iterdir(), 2))
        return _file(inside[0]) if len(inside) == 1 and inside[0].is_file() else None
    return path if path.suffix == ".pt" and path.is_file() else None
