"""File formats of dictionaries, one adapter a file; ``load`` recognises the format by the files it finds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from saekit.errors import SaekitError
from saekit.formats import saelens
from saekit.hub import local_folder

if TYPE_CHECKING:
    import torch

    from saekit.sae import SparseAutoencoder


class Format(Protocol):
    """What an adapter has, a module of this package."""

    def recognises(self, folder: Path) -> bool:
        """Whether the folder holds a dictionary in this format."""

    def read(self, folder: Path, device: str | torch.device) -> SparseAutoencoder:
        """The dictionary in the folder."""


FORMATS: dict[str, Format] = {"saelens": saelens}


def load(path: str | Path, device: str | torch.device = "cpu") -> SparseAutoencoder:
    """Load a saved dictionary, in evaluation mode.

    Args:
        path: the dictionary's folder, or a run's folder that holds it as ``sae/``; on the hub ``hf://owner/repo/path``.
        device: where the weights go.

    Raises:
        SaekitError: nothing is there, the format is not known, or the files do not agree with each other.
    """
    folder = local_folder(path)
    if not folder.exists():
        raise SaekitError(f"there is no dictionary at '{path}'" + _neighbours(folder))
    for place in (folder, folder / "sae"):
        for adapter in FORMATS.values():
            if adapter.recognises(place):
                sae = adapter.read(place, device)
                sae.eval()
                return sae
    raise SaekitError(f"'{path}' holds no dictionary in a known format ({', '.join(FORMATS)})")


def _neighbours(folder: Path) -> str:
    from saekit.errors import did_you_mean

    parent = folder.parent
    if not parent.is_dir():
        return ""
    return did_you_mean(str(folder), (str(p) for p in sorted(parent.iterdir()) if p.is_dir()))
