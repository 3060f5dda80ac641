"""What a file format of dictionaries is: each is one file with a class of this kind, which the registry names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from saekit.errors import SaekitError
from saekit.files import replace_files, writable_folder
from saekit.reading import check_json
from saekit.sae_config import SAEConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Writers = Mapping[str, Callable[[Path], object]]  # by the name of a file, what writes it to the path that it is given
UNSUPPORTED = {  # what some formats cannot hold, as people read it
    "token_norm": "thresholds by each token's norm",
    "thresholds": "another rule than topk",
    "layer_norm": "the layer norm of the input",
    "zero_rows": "features whose decoder row is zero",
}


class Contents(NamedTuple):
    """A dictionary as it is read.

    Attributes:
        cfg: what it is.
        weights: W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_in], b_dec [d_in], and for ``jumprelu`` threshold
            [d_sae]; on the CPU.
        dtype: what it is to be kept in.
    """

    cfg: SAEConfig
    weights: Mapping[str, Tensor]
    dtype: torch.dtype


class Dictionary(Protocol):
    """What is written: a ``SparseAutoencoder``, or what has a configuration and weights as it has them."""

    cfg: SAEConfig

    def state_dict(self) -> dict[str, Any]:
        """Its weights, as in ``Contents``."""


class Format:
    """A file format: which files a dictionary consists of, how they are read and, perhaps, written.

    Attributes:
        weights: names of files of weights; a dictionary has one of them. Every file of the pattern ``*.pt`` is a
            dictionary of its own.
        requires: files that stand beside the weights; without them it is another format.
        optional: files that are read where they are there; ``../NAME`` is one of the folder above.
    """

    weights: ClassVar[tuple[str, ...]]
    requires: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()

    def find(self, path: Path) -> Path | None:
        """The file of weights of the dictionary in a folder, or that a path names; None: it is none of this format."""
        named = path.name in self.weights and path.is_file()
        folder, names = (path.parent, (path.name,)) if named else (path, self.weights)
        if not all((folder / name).is_file() for name in self.requires):
            return None
        return next((folder / name for name in names if (folder / name).is_file()), None)

    def read(self, file: Path) -> Contents:
        """Read the dictionary that has this file of weights.

        Raises:
            SaekitError: a file is damaged or leads out of its folder, or asks for what saekit does not compute.
        """
        raise NotImplementedError

    def unsupported(self, sae: Dictionary) -> str | None:
        """What of a dictionary the format cannot hold: a key of ``UNSUPPORTED`` or words of its own; None: nothing."""
        return None

    def files(self, sae: Dictionary) -> Writers:
        """What writes each file of a dictionary. Leave it out where the format is only read.

        Raises:
            SaekitError: the format cannot hold the dictionary.
        """
        raise NotImplementedError

    @property
    def writable(self) -> bool:
        """Whether it is written, not only read."""
        return type(self).files is not Format.files

    def write(self, sae: Dictionary, folder: Path, *, overwrite: bool = False) -> Path:
        """Write a dictionary; returns the folder, in which all files are new and whole, or none is.

        Raises:
            SaekitError: the format cannot hold it, JSON does not hold its metadata, or the folder holds something and
                ``overwrite`` is not set.
        """
        check_json(sae.cfg.metadata, "metadata")  # it may have been changed since
        files = self.files(sae)
        writable_folder(folder, overwrite=overwrite)
        replace_files({folder / name: write for name, write in files.items()})
        return folder


def check_holds(reason: str | None, name: str) -> None:
    """Raise SaekitError where a format cannot hold a dictionary, by what ``unsupported`` says."""
    if reason is not None:
        raise SaekitError(f"the format of {name} cannot hold {UNSUPPORTED.get(reason, reason)}")
