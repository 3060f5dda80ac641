"""``saekit.load``: a dictionary from its files, in whichever format they are."""

from __future__ import annotations

from pathlib import Path

import torch

from saekit.errors import SaekitError, did_you_mean, first_line
from saekit.formats.registry import FORMATS, format_of
from saekit.hub import local_folder
from saekit.sae import SparseAutoencoder


def load(path: str | Path, device: str | torch.device = "cpu") -> SparseAutoencoder:
    """Load a saved dictionary, in evaluation mode.

    Args:
        path: the dictionary's folder, or the file that is one, or a run's folder that holds it as ``sae/``; on the hub
            ``hf://owner/repo/path``.
        device: where the weights go.

    Raises:
        SaekitError: nothing is there, the format is not known, the files do not agree with each other, or there is no
            such device.
    """
    name, file = find(path)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch has both for devices that are not there
        raise SaekitError(f"there is no device '{device}': {first_line(error)}") from None
    cfg, weights, dtype = FORMATS[name].read(file)
    sae = SparseAutoencoder(cfg, dtype, device)
    sae.load_state_dict(dict(weights))
    return sae.eval()


def find(path: str | Path) -> tuple[str, Path]:
    """What ``load`` would read of a path: the format, and its file of weights; from the hub it is fetched.

    Raises:
        SaekitError: nothing is there, or the format is not known.
    """
    folder = local_folder(path)
    if not folder.exists():
        raise SaekitError(f"there is no dictionary at '{path}'" + _neighbours(folder))
    return format_of(folder, path)


def _neighbours(folder: Path) -> str:
    parent = folder.parent
    if not parent.is_dir():
        return ""
    there = (p for p in sorted(parent.iterdir()) if p.is_dir() or p.suffix in (".pt", ".npz", ".safetensors"))
    return did_you_mean(str(folder), map(str, there))
