"""What the adapters share: configs and tensors of others are checked here, before anything of their size is made."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from saekit.errors import SaekitError, first_line
from saekit.files import writable_folder

if TYPE_CHECKING:
    from saekit.sae import SAEConfig, SparseAutoencoder

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
OURS = {"W_enc": "DF", "b_enc": "F", "W_dec": "FD", "b_dec": "D", "threshold": "F"}  # D is d_in, F is d_sae


WEIGHTS = ("sae_weights.safetensors", "ae.pt", "sae.safetensors", "params.npz", "params.safetensors")
Lack = Literal["token_norm", "thresholds", "layer_norm", "zero_rows"]
LACKS: dict[Lack, str] = {
    "token_norm": "thresholds by each token's norm",
    "thresholds": "another rule than topk",
    "layer_norm": "the layer norm of the input",
    "zero_rows": "features whose decoder row is zero",
}


class Stored(NamedTuple):
    """A tensor of a file: its name there, and its shape in letters; those of ours reversed mean the transpose."""

    name: str
    letters: str


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


def refuse(asked: bool, path: Path, what: str) -> None:
    """Raise SaekitError where a file asks for something that would silently change the features."""
    if asked:
        raise SaekitError(f"'{path}' asks for {what}, which saekit does not read")


def arranged(found: Mapping[str, Any], places: Mapping[str, Stored], path: Path, **sizes: int) -> dict[str, Tensor]:
    """The tensors of a dictionary by our names and with our shapes.

    Args:
        found: what the file holds.
        places: for each of our names, where it stands. The file must hold just these.
        path: the file, for messages.
        **sizes: D and F where a config tells them; otherwise the first matrix does.

    Raises:
        SaekitError: names, shapes or dtypes are not as they should be.
    """
    shapes = {name: list(value.shape) if isinstance(value, Tensor) else type(value) for name, value in found.items()}
    asks = "its config asks for" if len(sizes) == 2 else "a dictionary of that width has"
    for stored in places.values():
        shape = shapes.get(stored.name)
        if isinstance(shape, list) and len(shape) == len(stored.letters) == 2:
            sizes = {**dict(zip(stored.letters, shape, strict=True)), **sizes}
    expected = {stored.name: [sizes.get(letter, 0) for letter in stored.letters] for stored in places.values()}
    if shapes != expected or not all(sizes.values()):
        raise SaekitError(f"'{path}' holds {reprlib.repr(shapes)}, but {asks} {expected}")
    kinds = {value.dtype for value in found.values()}
    if not kinds <= set(DTYPES.values()):
        named = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        raise SaekitError(f"'{path}' holds weights in {named}, not in floating point")
    turned = {ours: stored.letters != OURS.get(ours, stored.letters) for ours, stored in places.items()}
    return {ours: found[place.name].T if turned[ours] else found[place.name] for ours, place in places.items()}


def scattered(weights: Mapping[str, Tensor], places: Mapping[str, Stored]) -> dict[str, Tensor]:
    """The inverse of ``arranged``: tensors by the names and shapes of a file, contiguous, on the CPU."""
    turned = {ours: weights[ours].T if place.letters != OURS[ours] else weights[ours] for ours, place in places.items()}
    return {places[ours].name: value.detach().cpu().contiguous() for ours, value in turned.items()}


def scaled_rows(weights: Mapping[str, Tensor], norms: Tensor) -> dict[str, Tensor]:
    """The same dictionary with decoder rows divided by ``norms`` [d_sae] and features multiplied by them.

    Where a norm is 0 the row stays, and the feature is silent.
    """
    wide = {name: value.double() for name, value in weights.items()} | {"norms": norms.double()}
    scaled = {"W_dec": wide["W_dec"] / torch.where(norms > 0, wide["norms"], 1)[:, None]}
    scaled |= {name: wide[name] * wide["norms"] for name in ("W_enc", "b_enc", "threshold") if name in wide}
    return {name: scaled.get(name, weights[name]).to(weights[name].dtype) for name in weights}


def with_b_dec(weights: Mapping[str, Tensor], sign: int) -> dict[str, Tensor]:
    """The same dictionary for a rule that subtracts b_dec from the input (``sign`` = 1), or that ceases to (−1)."""
    shift = weights["b_dec"].double() @ weights["W_enc"].double()
    return {**weights, "b_enc": (weights["b_enc"].double() + sign * shift).to(weights["b_enc"].dtype)}


def gated(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A gated dictionary with one encoder matrix as the JumpReLU dictionary that it is.

    With p = x W_enc, its features are relu(e^r p + b_mag) where p + b_gate > 0, that is where
    e^r p + b_mag > b_mag − e^r b_gate.
    """
    wide = {name: value.double() for name, value in weights.items()}
    scale = wide["r_mag"].exp()
    found = {
        "W_enc": wide["W_enc"] * scale,
        "b_enc": wide["b_mag"],
        "W_dec": wide["W_dec"],
        "b_dec": wide["b_dec"],
        "threshold": wide["b_mag"] - scale * wide["b_gate"],
    }
    return {name: value.to(weights["W_dec"].dtype) for name, value in found.items()}


def dictionary(
    config: SAEConfig, weights: Mapping[str, Tensor], dtype: torch.dtype, device: str | torch.device
) -> SparseAutoencoder:
    """The dictionary of a config and of tensors that fit it."""
    from saekit.sae import SparseAutoencoder

    sae = SparseAutoencoder(config, dtype, device)
    sae.load_state_dict(dict(weights))
    return sae


def at_least_float32(weights: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of packages that load whatever is stored into float32; what is more exact stays so."""
    return torch.promote_types(weights["W_dec"].dtype, torch.float32)


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
    from saekit.reading import check_inside, read_json

    try:
        if not path.is_file():
            return {}
        check_inside(path, path.parent)
        return mapping(read_json(path))
    except (SaekitError, TypeError):
        return {}
