"""File formats of dictionaries, one adapter a file; ``load`` recognises the format by the files it finds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from saekit.errors import SaekitError
from saekit.formats import dictionary_learning, gemma_scope, openai, saelens, sparsify
from saekit.hub import local_folder

if TYPE_CHECKING:
    import torch

    from saekit.formats.checks import Lack
    from saekit.sae import SparseAutoencoder


class Format(Protocol):
    """What an adapter has, a module of this package."""

    def recognises(self, path: Path) -> bool:
        """Whether this folder or file is a dictionary in this format."""

    def read(self, path: Path, device: str | torch.device) -> SparseAutoencoder:
        """The dictionary there."""


class WritableFormat(Format, Protocol):
    """What an adapter has that also writes."""

    def lacks(self, sae: SparseAutoencoder) -> Lack | None:
        """What of a dictionary the format cannot hold."""

    def write(self, sae: SparseAutoencoder, folder: Path, *, overwrite: bool = False) -> Path:
        """Write a dictionary; returns the folder."""


WRITABLE: dict[str, WritableFormat] = {
    "saelens": saelens,
    "dictionary_learning": dictionary_learning,
    "sparsify": sparsify,
}
FORMATS: dict[str, Format] = {
    **WRITABLE,
    "gemma_scope": gemma_scope,
    "openai": openai,
}


def load(path: str | Path, device: str | torch.device = "cpu") -> SparseAutoencoder:
    """Load a saved dictionary, in evaluation mode.

    Args:
        path: the dictionary's folder, or the file that is one, or a run's folder that holds it as ``sae/``; on the hub ``hf://owner/repo/path``.
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
