"""The format of Gemma Scope (Google DeepMind): ``params.npz``, and ``params.safetensors`` of Gemma Scope 2."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from saekit.errors import SaekitError
from saekit.formats import checks
from saekit.formats.layout import OURS, Stored, arranged, dictionary
from saekit.formats.origin import of_gemma_scope
from saekit.formats.rewriting import wide
from saekit.formats.tensor_files import read_tensors

if TYPE_CHECKING:
    from saekit.sae import SparseAutoencoder

WEIGHTS = ("params.npz", "params.safetensors")
_PLACES = {name: Stored(name.lower(), letters) for name, letters in OURS.items()}
_NO_AUTOENCODER = re.compile(r"gemma-scope.*(transcoder|crosscoder|clt)")  # their tensors look alike


def recognises(path: Path) -> bool:
    """Whether one of the files is there."""
    return any((checks.folder_of(path, *WEIGHTS) / name).is_file() for name in WEIGHTS)


def read(path: Path, device: str | torch.device = "cpu") -> SparseAutoencoder:
    """Read a dictionary.

    Raises:
        SaekitError: the file is damaged or leads out of its folder, its tensors do not fit, or it is a transcoder by
            its path or by the config beside it.
    """
    from saekit.sae import SAEConfig

    folder = checks.folder_of(path, *WEIGHTS)
    file = next(folder / name for name in (path.name, *WEIGHTS) if name in WEIGHTS and (folder / name).is_file())
    cfg = checks.optional_json(folder / "config.json")
    into, out_of = cfg.get("hf_hook_point_in"), cfg.get("hf_hook_point_out")
    if _NO_AUTOENCODER.search(folder.resolve().as_posix()) or (out_of is not None and out_of != into):
        raise SaekitError(f"'{file}' is a transcoder, not an autoencoder; saekit does not read those")
    found = {name.lower(): value for name, value in read_tensors(file, folder).items()}
    weights = wide(arranged(found, _PLACES, file))
    d_in, d_sae = weights["W_enc"].shape
    config = SAEConfig(d_in, d_sae, "jumprelu", apply_b_dec_to_input=False, metadata=of_gemma_scope(folder))
    return dictionary(config, weights, weights["W_dec"].dtype, device)
