"""On what a run computes, and on which device: sums that another machine adds in another order round otherwise."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch

from saekit.errors import SaekitError, first_line
from saekit.kernels.devices import name_of

Machine = dict[str, str | int]


def this_machine(device: torch.device) -> Machine:
    """What decides how sums are rounded; where all of it is alike, a run is the same bit for bit.

    Returns:
        The version of ``torch``; the ``processor``, its ``capability`` (the instructions that torch takes of it) and
        ``threads``; the ``device``, on CUDA by its name.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "torch": torch.__version__,
        "processor": _processor(),
        "capability": capability,
        "threads": torch.get_num_threads(),
        "device": name_of(device),
    }


def differences(before: Machine, now: Machine) -> str:
    """What of a machine is another now, in a few words; empty where nothing is, or where ``before`` is not known."""
    changed = [key for key, value in now.items() if before.get(key, value) != value]
    return ", ".join(f"{key} {before[key]}, now {now[key]}" for key in changed)


@lru_cache(maxsize=1)
def _processor() -> str:
    with suppress(OSError):  # Linux; elsewhere Python knows, or says the kind alone
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def pick_device(name: str) -> torch.device:
    """The device of this name; ``auto`` is CUDA where there is one, else the CPU.

    Of several processes on a machine that torchrun launched each has a card of its own, as far as there are so many.

    Raises:
        SaekitError: this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ and torch.cuda.device_count() > 1:
        name = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SaekitError(f"this machine has no device '{name}' ({first_line(error)}); use --device cpu") from error
    return device
