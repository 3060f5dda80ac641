"""File formats of dictionaries, one adapter a file; ``load`` recognises the format by the files it finds."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from saekit.errors import SaekitError, first_line
from saekit.formats import dictionary_learning, gemma_scope, openai, saelens, sparsify
from saekit.hub import local_folder

if TYPE_CHECKING:
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
        SaekitError: nothing is there, the format is not known, the files do not agree with each other, or there is no
            such device.
    """
    name, place = find(path)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch has both for devices that are not there
        raise SaekitError(f"there is no device '{device}': {first_line(error)}") from None
    return FORMATS[name].read(place, device).eval()


def find(path: str | Path) -> tuple[str, Path]:
    """What ``load`` would read of a path: the format, and where it lies; from the hub it is fetched.

    Raises:
        SaekitError: nothing is there, or the format is not known.
    """
    folder = local_folder(path)
    if not folder.exists():
        raise SaekitError(f"there is no dictionary at '{path}'" + _neighbours(folder))
    return format_of(folder, path)


def format_of(folder: Path, called: str | Path | None = None) -> tuple[str, Path]:
    """The format of a dictionary, and where in the folder it lies: there, or in a run's ``sae/``.

    Args:
        folder: or file.
        called: what the user called it, if not that.

    Raises:
        SaekitError: there is none in a known format.
    """
    for place in (folder, folder / "sae"):
        for name, adapter in FORMATS.items():
            if adapter.recognises(place):
                return name, place
    inside = sorted(folder.glob("*")) if folder.is_dir() else []
    found = (p for p in inside if any(a.recognises(q) for q in (p, p / "sae") for a in FORMATS.values()))
    hint = "".join(f"; name what is in it, such as '{path}'" for path in islice(found, 1))
    raise SaekitError(f"'{called or folder}' holds no dictionary in a known format ({', '.join(FORMATS)}){hint}")


def _neighbours(folder: Path) -> str:
    from saekit.errors import did_you_mean

    parent = folder.parent
    if not parent.is_dir():
        return ""
    there = (p for p in sorted(parent.iterdir()) if p.is_dir() or p.suffix in (".pt", ".npz", ".safetensors"))
    return did_you_mean(str(folder), map(str, there))
