"""Where a model lies and in which numbers: on one device or several, as it was saved or quantised."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from saekit.errors import SaekitError
from saekit.kernels.devices import has_fast_bfloat16, is_card
from saekit.machine import pick_device

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from saekit.activations.settings import SourceSettings

AUTO = "auto"
NO_QUANTIZATION = "none"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZATIONS = (NO_QUANTIZATION, "8bit", "4bit")
_BITS: dict[str, dict[str, Any]] = {
    "8bit": {"load_in_8bit": True},
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}


def device_of(model: TransformerBridge) -> torch.device:
    """Where a model takes its tokens; layers may lie elsewhere, and what they give lies with them."""
    if getattr(model.original_model, "hf_device_map", None):
        return torch.device(model.cfg.device)  # weights that are not in memory are on no device
    device: torch.device = next(model.parameters()).device
    return device


def dtype_of(model: TransformerBridge) -> torch.dtype:
    """In which a model computes; weights that are quantised are of another kind."""
    return next((each.dtype for each in model.parameters() if each.dtype in DTYPES.values()), torch.float32)


def cards_of(model: TransformerBridge) -> list[torch.device]:
    """The CUDA devices on which weights of a model lie."""
    return list(dict.fromkeys(each.device for each in model.parameters() if is_card(each.device)))


def quantization_of(model: TransformerBridge) -> str:
    """How ``load_model`` has quantised a model; ``none`` where it has not."""
    return str(getattr(model, "quantization", NO_QUANTIZATION))


def how_loaded(settings: SourceSettings, device: str | None) -> dict[str, Any]:
    """What ``load_model`` takes of some settings.

    Args:
        settings: them.
        device: where the dictionary is, and the model too where it has no place of its own.

    Raises:
        SaekitError: this machine has no such device.
    """
    return {
        "device": device if settings.model_device is None else str(pick_device(settings.model_device)),
        "dtype": settings.model_dtype,
        "quantization": settings.model_quantization,
        "device_map": settings.model_device_map,
    }


def fastest_dtype(device: str | None) -> str:
    """What ``auto`` means where a model runs: bfloat16 on a card that has it, else float32.

    On a CPU it is float32 even where bfloat16 is quick, so that figures are those of any other CPU.

    Args:
        device: its name; CUDA where there is one, if not given.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not device.startswith("cuda"):
        return "float32"
    with torch.cuda.device(torch.device(device)):
        return "bfloat16" if has_fast_bfloat16(device) else "float32"


def check_accelerate() -> None:
    """Raise SaekitError where the package is missing that lays a model over several devices."""
    if find_spec("accelerate") is None:
        raise SaekitError(
            "--model-device-map lays a model over several cards by the package accelerate, which is not installed: "
            "pip install accelerate"
        )


def quantised(place: str, bits: str, *, dtype: torch.dtype, layout: Any, **how: Any) -> Any:
    """The transformers model of a folder or of the hub, quantised by bitsandbytes as it is loaded.

    Args:
        place: what transformers loads it from.
        bits: ``8bit`` or ``4bit`` (NF4).
        dtype: of what is not quantised, and of the products.
        layout: transformers' device map.
        how: further arguments of transformers' ``from_pretrained``.

    Raises:
        SaekitError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise SaekitError(
            f"--model-quantization {bits} needs the package bitsandbytes, which is not installed: "
            f"pip install bitsandbytes"
        )
    import transformers

    more = {"bnb_4bit_compute_dtype": dtype} if bits == "4bit" else {}
    config = transformers.BitsAndBytesConfig(**_BITS[bits], **more)
    # TransformerLens looks into attention step by step, which the eager one alone allows
    return transformers.AutoModelForCausalLM.from_pretrained(
        place, quantization_config=config, device_map=layout, dtype=dtype, attn_implementation="eager", **how
    )
