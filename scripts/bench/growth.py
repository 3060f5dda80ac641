"""Time and peak memory of a step as each of d, F, k and n grows, the others as in shape A.

    python scripts/bench/growth.py

Every size runs in a process of its own, so that peaks are its own; the precisions alternate step by step. Beside the
peak stands what it cannot go below: 16 bytes a parameter (weights, gradients, two moments) and the batches.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import SHAPES, Shape, machine, save, table
from peers import Worker

GROWTH = {
    "F": (4096, 8192, 16_384, 32_768, 65_536),
    "k": (8, 16, 32, 64, 128),
    "n": (512, 1024, 2048, 4096, 8192),
    "d": (128, 256, 512, 1024, 2048),
}
WARM_UP = 2


def sizes() -> dict[str, Shape]:
    """Every shape, and B."""
    shapes = {
        f"{what} = {value}": SHAPES["A"]._replace(**{what: value})
        for what, values in GROWTH.items()
        for value in values
    }
    return {**shapes, "B": SHAPES["B"]}


def measure(shape: Shape, repeats: int) -> dict[str, Any]:
    """Both precisions at one size."""
    text = ",".join(map(str, shape))
    workers = {p: Worker(Path(sys.executable), "saekit", p, text) for p in ("bf16_select", "fp32")}
    idle = Worker(Path(sys.executable), "saekit", "fp32", "8,64,1,64")  # what torch itself takes
    idle.step()
    for _ in range(WARM_UP + repeats):
        for worker in workers.values():
            worker.step()
    figures: dict[str, Any] = {precision: worker.finish(WARM_UP) for precision, worker in workers.items()}
    parameters = 2 * shape.d * shape.F + shape.d + shape.F
    figures["torch_bytes"] = idle.finish(0)["peak_bytes"]
    figures["state_bytes"] = 16 * parameters
    figures["batches_bytes"] = 4 * 4 * shape.n * shape.d  # four batches in memory
    return figures


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", help="sizes whose name contains this")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "sizes": {}}
    rows = []
    for name, shape in sizes().items():
        if asked.only and asked.only not in name:
            continue
        figures = measure(shape, asked.repeats)
        result["sizes"][name] = {"shape": shape._asdict(), **figures}
        peaks = [figures[p]["peak_bytes"] for p in ("bf16_select", "fp32")]
        rows.append(
            [name, *(figures[p]["median_ms"] for p in ("bf16_select", "fp32"))]
            + [f"{b / 2**30:.2f}" for b in (*peaks, figures["torch_bytes"], figures["state_bytes"])]
        )
        print(rows[-1], flush=True)
    print(
        table(rows, ["size", "bf16_select ms", "fp32 ms", "peak GiB", "fp32 peak", "torch alone", "16 B a parameter"])
    )
    save("growth", result, asked.out)


if __name__ == "__main__":
    main()
