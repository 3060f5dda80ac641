"""What devices can do: the one place beside the kernels that tells them apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def has_fast_bfloat16(device: str) -> bool:
    """Whether the processor of this name (``auto``: CUDA or the CPU) has instructions for bfloat16 products."""
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if device not in ("auto", "cpu"):
        return False
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in older versions of torch
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def is_card(device: torch.device) -> bool:
    """Whether a device has memory of its own that torch tells of: CUDA."""
    return device.type == "cuda"


def exact_dtype(device: torch.device) -> torch.dtype:
    """What counts and long sums are kept in; MPS has no float64, and for its counts float32 is exact enough."""
    return torch.float32 if device.type == "mps" else torch.float64


def rows_in_cache(device: torch.device, rows: int, numbers: int, block: int = 1 << 19) -> int:
    """Rows of so many numbers to work on at a time: on a CPU those that stay in its cache, elsewhere all."""
    return max(1, block // numbers) if device.type == "cpu" else rows


@contextmanager
def full_accumulation(device: torch.device) -> Iterator[None]:
    """Sums in float32 throughout: CUDA may otherwise add partial sums in bfloat16, which no bound allows."""
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


def name_of(device: torch.device) -> str:
    """The name of a device: on CUDA that of the card."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
