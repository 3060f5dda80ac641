"""Shared by the benchmarks: activations to train on, timing, and a record of where it was done."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from datetime import datetime
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
    made = []
    for _ in range(batches):
        strengths = torch.relu(torch.randn(shape.n, 2 * shape.d, generator=generator) - 1.5)
        made.append(3 * strengths @ directions + 0.3 * torch.randn(shape.n, shape.d, generator=generator))
    scale = shape.d**0.5 / float(torch.cat(made).norm(dim=1).mean())
    return [(x * scale).to(device) for x in made]


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, least and largest, in milliseconds."""
    return {
        "median_ms": 1e3 * statistics.median(seconds),
        "min_ms": 1e3 * min(seconds),
        "max_ms": 1e3 * max(seconds),
        "runs": len(seconds),
    }


def machine(packages: Iterable[str] = ("saekit", "torch")) -> dict[str, Any]:
    """What a figure is worth nothing without: processor, cores, versions, date, commit."""
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
        "date": datetime.now().isoformat(" ", "minutes"),
        "commit": _commit(),
    }


def _commit() -> str:
    """What was measured; with changes that are in no commit, its name ends with ``-dirty``."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine_name(result: dict[str, Any]) -> str:
    """The accelerator that a result is of, or the processor and its cores."""
    machine = result["machine"]
    if result.get("device", "cpu") != "cpu":
        return str(machine["accelerator"] or result["device"])
    return f"{machine['processor']}, {machine['cores']} cores"


def file_name(result: dict[str, Any]) -> str:
    """The name that a result is kept under: date, machine, commit."""
    date, commit = result["machine"]["date"][:10], result["machine"]["commit"]
    name = re.sub(r"[^a-z0-9]+", "-", machine_name(result).lower()).strip("-")
    return f"{date}-{name}-{commit}.json"


def save(name: str, result: dict[str, Any], out: Path | None) -> None:
    """Write ``results/NAME/DATE-MACHINE-COMMIT.json``, or the file asked for."""
    path = out or RESULTS / name / file_name(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")


def history(name: str) -> list[dict[str, Any]]:
    """All results of a benchmark, the oldest first."""
    results = [json.loads(path.read_text()) for path in sorted((RESULTS / name).glob("*.json"))]
    return sorted(results, key=lambda result: str(result["machine"]["date"]))


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
