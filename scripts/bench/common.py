"""Shared by the benchmarks: activations to train on, timing, and a record of where it was done."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"


class Shape(NamedTuple):
    """The size of a step: width of the activations, features, matches a token, tokens."""

    d: int
    F: int
    k: int
    n: int


SHAPES = {
    "A": Shape(512, 8192, 32, 2048),
    "B": Shape(768, 24_576, 32, 4096),  # GPT-2 small, 32 times
    "C": Shape(4096, 131_072, 64, 8192),  # an 8B model; for accelerators
}


def shape_of(text: str) -> Shape:
    """A shape by its name, or ``d,F,k,n``."""
    return SHAPES[text] if text in SHAPES else Shape(*map(int, text.split(",")))


def activations(shape: Shape, batches: int = 4, seed: int = 0, device: str = "cpu") -> list[Tensor]:
    """Batches [n, d] of sparse sums of 2·d random directions and noise; mean norm √d."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(2 * shape.d, shape.d, generator=generator), dim=1)
    found = []
    for _ in range(batches):
        strengths = torch.relu(torch.randn(shape.n, 2 * shape.d, generator=generator) - 1.5)
        found.append(3 * strengths @ directions + 0.3 * torch.randn(shape.n, shape.d, generator=generator))
    scale = shape.d**0.5 / float(torch.cat(found).norm(dim=1).mean())
    return [(x * scale).to(device) for x in found]


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, least and largest, in milliseconds."""
    return {
        "median_ms": 1e3 * statistics.median(seconds),
        "min_ms": 1e3 * min(seconds),
        "max_ms": 1e3 * max(seconds),
        "runs": len(seconds),
    }


def machine(packages: Iterable[str] = ("saekit", "torch")) -> dict[str, Any]:
    """What a figure is worth nothing without: processor, cores, versions, date."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return {
        "processor": name,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "bfloat16": [key for key in ("avx512_bf16", "amx_bf16", "bf16") if capabilities.get(key)],
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in packages},
        "date": date.today().isoformat(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def save(name: str, result: dict[str, Any], out: Path | None) -> None:
    """Write ``results/NAME.json``, or the file asked for."""
    path = out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")


def table(rows: Sequence[Sequence[Any]], head: Sequence[str]) -> str:
    """A Markdown table; numbers to the right."""
    cells = [[format(c, ",.0f") if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(head), *cells]) for i in range(len(head))]
    lines = [
        " | ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in [head, *cells]
    ]
    rule = " | ".join("-" * w if not i else "-" * (w - 1) + ":" for i, w in enumerate(widths))
    return "\n".join(f"| {line} |" for line in [lines[0], rule, *lines[1:]])
