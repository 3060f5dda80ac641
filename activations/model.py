"""Hooked language models: loading, hook points, and forward passes that stop at the hook."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit import embedded
from saekit.activations.attention import quick_attention, try_quick_attention
from saekit.activations.boot import keep_own_tokens, text_alone
from saekit.activations.gguf import gguf_of_hub, load_gguf
from saekit.activations.gguf_header import is_gguf
from saekit.activations.placement import (
    AUTO,
    DTYPES,
    NO_QUANTIZATION,
    QUANTIZATIONS,
    check_accelerate,
    fastest_dtype,
    quantised,
)
from saekit.activations.processing import process
from saekit.errors import SaekitError, did_you_mean, first_line
from saekit.files import expanded
from saekit.no_installs import no_installs

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

EMBEDDED = "embedded"


def load_model(
    name_or_path: str = EMBEDDED,
    *,
    device: str | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    revision: str | None = None,
    processing: Sequence[str] = (),
    quantization: str = NO_QUANTIZATION,
    device_map: str | Mapping[str, Any] | None = None,
) -> TransformerBridge:
    """Load a language model, hooked by TransformerLens, in evaluation mode and without parameter gradients.

    A multimodal model is loaded for text, without the processor of its images or sound. Nothing is installed.

    Args:
        name_or_path: ``"embedded"`` (the small model that ships with saekit), a local Hugging Face folder, a name on
            the hub, a GGUF file, or ``owner/repo/FILE.gguf`` on the hub.
        device: where it runs; the fastest at hand if not given.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto`` (``fastest_dtype``).
        trust_remote_code: whether code that comes with the model may run.
        revision: branch, tag or commit of a model on the hub.
        processing: what TransformerLens does to the weights (``process``); nothing if not given.
        quantization: ``8bit`` or ``4bit`` (NF4), by bitsandbytes.
        device_map: how its layers lie over several devices, as transformers takes it; ``auto`` for all cards.

    Raises:
        SaekitError: there is no such model, TransformerLens cannot hook it, it cannot be processed so, or a package is
            missing that quantises it or lays it over several devices.
    """
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in (AUTO, *DTYPES):
        raise SaekitError(f"unknown dtype '{dtype}'{did_you_mean(dtype, (AUTO, *DTYPES))}")
    if quantization not in QUANTIZATIONS:
        raise SaekitError(f"unknown quantization '{quantization}'{did_you_mean(quantization, QUANTIZATIONS)}")
    if quantization != NO_QUANTIZATION and processing:
        raise SaekitError(f"{', '.join(processing)} cannot be had with {quantization} weights, which are not changed")
    if device_map is not None:
        check_accelerate()
        device = None
    dtype = fastest_dtype(device) if dtype == AUTO else dtype
    place = model_path(name_or_path)
    if revision is not None and Path(place).exists():
        raise SaekitError(f"the model in '{name_or_path}' has no revision '{revision}'; models on the hub have")
    if Path(place).is_file() and (quantization != NO_QUANTIZATION or device_map is not None):
        raise SaekitError(
            f"'{name_or_path}' is a GGUF file, which is dequantised on one device; --model-quantization and "
            f"--model-device-map are for models of transformers"
        )
    version = {} if revision is None else {"revision": revision}
    from transformer_lens.model_bridge import TransformerBridge
    from transformers.utils import logging as transformers_logging

    logging.getLogger("root").setLevel(logging.ERROR)  # TransformerLens warns there about every local folder
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with no_installs(), text_alone():
            if Path(place).is_file():
                model = load_gguf(place, device=device, dtype=DTYPES[dtype])
            else:
                how: dict[str, Any] = {"dtype": DTYPES[dtype], "trust_remote_code": trust_remote_code, **version}
                where: dict[str, Any] = {"device": device} if device_map is None else {"device_map": device_map}
                if quantization != NO_QUANTIZATION:
                    layout = device_map or {"": device or ("cuda" if torch.cuda.is_available() else "cpu")}
                    where = {"device": device, "hf_model": quantised(place, quantization, layout=layout, **how)}
                model = TransformerBridge.boot_transformers(place, **how, **where)
                if model.tokenizer is not None:
                    keep_own_tokens(model, trust_remote_code)
    except SaekitError:
        raise
    except OSError as error:
        if Path(place).is_dir():
            raise SaekitError(f"the model folder '{name_or_path}' is incomplete: {first_line(error)}") from error
        raise SaekitError(
            f"unknown model '{name_or_path}': no local folder, nor found on the hub{_similar_models(name_or_path)}"
        ) from error
    except Exception as error:  # damaged weights and shapes no adapter knows raise many kinds
        raise SaekitError(f"cannot load and hook the model '{name_or_path}': {_told(error)}") from error
    if model.tokenizer is None:
        raise SaekitError(f"the model '{name_or_path}' comes without a tokenizer")
    model.eval()
    model.requires_grad_(False)
    model.quantization = quantization
    process(model, processing)
    return model


def _told(error: Exception) -> str:
    """What another library says of a model, and what to do where it would have to run code."""
    text = str(error)
    if "Weights only load failed" in text:
        return "its weights are a pickle that would run code; convert them to safetensors where you trust them"
    if "custom code" in text:
        return "it comes with code of its own; where you trust it, let it run by --trust-remote-code"
    return first_line(error)


def model_path(name_or_path: str) -> str:
    """The folder of the embedded model, a local folder or GGUF file, also one of the hub's, or the name itself.

    Raises:
        SaekitError: it looks like a path, but no model is there.
    """
    if name_or_path == EMBEDDED:
        return str(Path(embedded.__file__).parent)
    folder = expanded(name_or_path)
    if folder.is_file() and (folder.suffix == ".gguf" or is_gguf(folder)):
        return str(folder)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise SaekitError(f"the folder '{name_or_path}' holds no Hugging Face model: config.json is missing")
        return str(folder)
    local = folder.is_absolute() or name_or_path.startswith((".", "~"))
    if not local and name_or_path.endswith(".gguf") and name_or_path.count("/") > 1:
        return gguf_of_hub(name_or_path)
    if local or name_or_path.count("/") > 1 or name_or_path.endswith(".gguf"):
        raise SaekitError(f"there is no model folder or GGUF file '{name_or_path}'")
    return name_or_path


def _similar_models(name: str) -> str:
    from transformer_lens import supported_models

    names = [known for known in (EMBEDDED, *supported_models.OFFICIAL_MODEL_NAMES) if known != name]
    short = {n.rsplit("/", 1)[-1]: n for n in reversed(names)}
    hint = did_you_mean(name, names) if "/" in name else did_you_mean(name, short)
    offline = " (the hub is switched off by HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
    return offline + (hint if hint.startswith("; did") else "")


def model_revision(model: TransformerBridge, name_or_path: str) -> str:
    """What tells two versions of a model apart: the hub's commit, or a digest of local weights."""
    commit = getattr(getattr(model.original_model, "config", None), "_commit_hash", None)
    if commit:
        return str(commit)
    digest = hashlib.blake2b(digest_size=16)
    place = Path(model_path(name_or_path))
    for file in [place] if place.is_file() else sorted([*place.glob("*.safetensors"), *place.glob("*.bin")]):
        digest.update(file.name.encode() if place.is_dir() else b"")
        with file.open("rb") as content:
            while block := content.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def default_hook(model: TransformerBridge) -> str:
    """The residual stream in the middle of the model: after half of its blocks."""
    return f"blocks.{(int(model.cfg.n_layers) - 1) // 2}.hook_resid_post"


def check_hook(model: TransformerBridge, hook: str) -> None:
    """Raise SaekitError where the model has no hook point of this name, or has switched it off."""
    names = model.hook_dict
    if hook not in names:
        kin = [n for n in names if n.rsplit(".", 1)[-1] == hook.rsplit(".", 1)[-1]]
        n_layers = int(model.cfg.n_layers)
        raise SaekitError(
            f"the model has no hook '{hook}' (it has blocks 0 to {n_layers - 1}){did_you_mean(hook, [*kin, *names])}"
        )
    try:
        with model.hooks(fwd_hooks=[(hook, lambda activation, hook: None)]):
            pass
    except ValueError as error:
        raise SaekitError(f"the hook '{hook}' is switched off in this model: {first_line(error)}") from error


def hooks_matching(model: TransformerBridge, pattern: str) -> list[str]:
    """The model's hook points that fit a pattern in which ``*`` stands for anything: ``blocks.*.hook_resid_post``.

    Raises:
        SaekitError: there is none.
    """
    found = [name for name in model.hook_dict if fnmatchcase(name, pattern)]
    if not found:
        raise SaekitError(f"no hook point of the model fits '{pattern}'{did_you_mean(pattern, model.hook_dict)}")
    return found


def context_length_of(model: TransformerBridge) -> int:
    """The longest context that the model takes, in tokens."""
    return int(model.cfg.n_ctx)


@contextmanager
def truncated(
    model: TransformerBridge, hooks: Sequence[str]
) -> Iterator[Callable[[Int[Tensor, "b t"]], list[Float[Tensor, "b t d"]]]]:
    """A forward pass that ends at the last of some hook points.

    Yields:
        A function from tokens [b, t] to the activations [b, t, d] at each hook; further dimensions (heads) are
        flattened into d.

    Raises:
        SaekitError: there is no such hook, or the forward pass does not reach it.
    """
    from transformer_lens.model_bridge.exceptions import StopAtLayerException

    with recorded(model, hooks) as seen:

        def stop(activation: Tensor, hook: Any) -> None:
            if len(seen) == len(hooks):
                raise StopAtLayerException(activation)  # the bridge catches it

        def run(tokens: Tensor) -> list[Tensor]:
            seen.clear()
            stops = [(hook, stop) for hook in hooks]  # for this pass alone: another harvest may be under way
            with torch.no_grad(), quick_attention(model, *hooks), model.hooks(fwd_hooks=stops):
                model(tokens, return_type=None)
            return activations_of(seen, hooks, tokens)

        yield run


@contextmanager
def recorded(model: TransformerBridge, hooks: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """While it is entered, passes of the model leave what they have at these hook points in a dictionary.

    Raises:
        SaekitError: there is no such hook.
    """
    seen: dict[str, Tensor] = {}
    try_quick_attention(model)

    def record(name: str) -> tuple[str, Callable[..., None]]:
        check_hook(model, name)
        return name, lambda activation, hook: seen.update({name: activation})

    with model.hooks(fwd_hooks=[record(name) for name in hooks]):
        yield seen


def activations_of(
    seen: dict[str, Tensor], hooks: Sequence[str], tokens: Int[Tensor, "b t"]
) -> list[Float[Tensor, "b t d"]]:
    """What was recorded, in the order of the hooks.

    Raises:
        SaekitError: a hook was not reached, or has no activation for each token.
    """
    for hook in hooks:
        if not isinstance(seen.get(hook), Tensor) or seen[hook].shape[:2] != tokens.shape:
            raise SaekitError(f"the hook '{hook}' gives no activation for each token in this model")
    return [seen[hook].flatten(2) for hook in hooks]
