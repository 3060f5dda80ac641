"""What the adapters share of reading configs of others, and of saying what a format cannot hold."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from saekit.errors import SaekitError, first_line
from saekit.files import writable_folder
from saekit.reading import check_inside, read_json

WEIGHTS = ("sae_weights.safetensors", "ae.pt", "sae.safetensors", "params.npz", "params.safetensors")
Lack = Literal["token_norm", "thresholds", "layer_norm", "zero_rows"]
LACKS: dict[Lack, str] = {
    "token_norm": "thresholds by each token's norm",
    "thresholds": "another rule than topk",
    "layer_norm": "the layer norm of the input",
    "zero_rows": "features whose decoder row is zero",
}


def folder_of(path: Path, *names: str) -> Path:
    """The folder of a dictionary that is named by one of its files, or the path itself."""
    return path.parent if path.name in names and path.is_file() else path


@contextmanager
def understanding(path: Path) -> Iterator[None]:
    """While it is entered, what a config lacks, or has of the wrong kind, becomes one line that names the file.

    Raises:
        SaekitError: in place of a KeyError, ValueError, TypeError or AttributeError.
    """
    try:
        yield
    except SaekitError:
        raise
    except KeyError as error:
        raise SaekitError(f"'{path}' lacks or does not know {first_line(error)}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise SaekitError(f"'{path}' is damaged: {first_line(error)}") from None


def mapping(value: Any) -> dict[str, Any]:
    """The value, once it is sure that it is a mapping; otherwise a TypeError."""
    if not isinstance(value, dict):
        raise TypeError("it is no mapping")
    return value


def whole(cfg: Mapping[str, Any], key: str) -> int:
    """A size or count in a config; otherwise a KeyError or ValueError."""
    value = cfg[key]
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError(f"{key} = {reprlib.repr(value)}")
    return value


def flag(cfg: Mapping[str, Any], key: str, default: bool) -> bool:
    """A yes or no (or null) in a config, ``default`` where it is missing; otherwise, as for "false", a ValueError."""
    value = cfg.get(key, default)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{key} = {reprlib.repr(value)}")
    return bool(value)


def refuse(asked: bool, path: Path, what: str) -> None:
    """Raise SaekitError where a file asks for something that would silently change the features."""
    if asked:
        raise SaekitError(f"'{path}' asks for {what}, which saekit does not read")


def own_metadata(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What saekit has written into the config of another package."""
    return mapping(mapping(cfg.get("saekit", {})).get("metadata", {}))


def place(folder: Path, weights: str, *, overwrite: bool) -> None:
    """Make the folder that a dictionary is written to.

    Args:
        folder: where.
        weights: name of the file of weights of this format.
        overwrite: whether it may hold something already, though no dictionary of another format: it would be neither.

    Raises:
        SaekitError: it holds something, or cannot be written to.
    """
    other = next((name for name in WEIGHTS if name != weights and (folder / name).is_file()), None)
    if other is not None and overwrite:
        raise SaekitError(f"'{folder}' holds a dictionary of another format ({other}); choose another folder")
    writable_folder(folder, overwrite=overwrite)


def check_holds(lack: Lack | None, name: str) -> None:
    """Raise SaekitError where a format cannot hold a dictionary."""
    if lack is not None:
        raise SaekitError(f"the format of {name} cannot hold {LACKS[lack]}")


def optional_json(path: Path) -> dict[str, Any]:
    """What a small JSON file beside a dictionary tells; nothing where it is missing, or no mapping that can be read."""
    try:
        if not path.is_file():
            return {}
        check_inside(path, path.parent)
        return mapping(read_json(path))
    except (SaekitError, TypeError):
        return {}
