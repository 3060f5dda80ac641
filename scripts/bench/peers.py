"""Time a training step of saekit and of other packages' trainers, each in an environment of its own.

    python scripts/bench/peers.py --shape B

The packages are installed into ``.bench/`` at the first use. Each trains TopK on the same batches, by its own defaults
and tuned: bfloat16 autocast, and memory that is used again instead of being given back. saekit and one peer alternate
step by step, so that a slow moment of the machine meets both.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import SHAPES, machine, save, spread, table

ROOT = Path(__file__).parents[2]
PEERS = {
    "sparsify": "eai-sparsify==1.3.3",
    "dictionary_learning": "dictionary-learning==0.1.0",
    "overcomplete": "overcomplete==0.3.0 matplotlib<3.9",  # it calls what matplotlib has dropped since
    "sae_lens": "sae-lens==6.54.12",
}
REUSE = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 34),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 26),
}


def environment(package: str) -> Path:
    """The interpreter of a package's environment; it is made where there is none."""
    folder = ROOT / ".bench" / package
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print(f"installing {PEERS[package]} into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "torch==2.13.0"], check=True)  # first: a range would bring another build
        subprocess.run([*pip, "torch==2.13.0", *PEERS[package].split()], check=True)
        # what they bring for images is built for another torch, and fails where it is imported
        subprocess.run([*pip[:3], "uninstall", "--quiet", "--yes", "torchvision"], check=True)
        (folder / "ready").touch()
    return python


class Worker:
    """A trainer in a process of its own."""

    def __init__(self, python: Path, package: str, mode: str, shape: str) -> None:
        command = [str(python), str(Path(__file__).parent / "peer_step.py"), package, mode, shape]
        reuse = REUSE if mode == "tuned" else {}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **reuse}
        )
        self.seconds: list[float] = []

    def step(self) -> None:
        """Ask for a step."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self.process.args)} ended early")  # type: ignore[arg-type]
        self.seconds.append(float(line))

    def finish(self, warm_up: int) -> dict[str, Any]:
        """Its figures, the first steps left out."""
        out, _ = self.process.communicate()
        return {**spread(self.seconds[warm_up:]), "peak_bytes": int(out)}


def compare(package: str, mode: str, shape: str, repeats: int) -> dict[str, Any]:
    """Figures of a peer and of both our precisions, taken in turn."""
    warm_up = 2
    workers = {
        "peer": Worker(environment(package), package, mode, shape),
        **{
            precision: Worker(Path(sys.executable), "saekit", precision, shape) for precision in ("bf16_select", "fp32")
        },
    }
    for _ in range(warm_up + repeats):
        for worker in workers.values():
            worker.step()
    figures: dict[str, Any] = {name: worker.finish(warm_up) for name, worker in workers.items()}
    for precision in ("bf16_select", "fp32"):
        figures[f"times {precision}"] = figures["peer"]["median_ms"] / figures[precision]["median_ms"]
    return figures


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="A or B; may be given again")
    parser.add_argument("--peer", choices=PEERS, action="append", help="default: all")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "packages": PEERS, "shapes": {}}
    for shape in asked.shape or ["A", "B"]:
        figures = {}
        for package in asked.peer or PEERS:
            for mode in ("default", "tuned"):
                figures[f"{package} {mode}"] = compare(package, mode, shape, asked.repeats)
                f = figures[f"{package} {mode}"]
                print(
                    shape,
                    package,
                    mode,
                    {k: round(v["median_ms"]) if isinstance(v, dict) else round(v, 2) for k, v in f.items()},
                    flush=True,
                )
        result["shapes"][shape] = {"shape": SHAPES[shape]._asdict(), "trainers": figures}
        rows = [
            [
                name,
                f["peer"]["median_ms"],
                f["bf16_select"]["median_ms"],
                f"{f['times bf16_select']:.1f}",
                f"{f['times fp32']:.1f}",
                f"{f['peer']['peak_bytes'] / 2**30:.1f}",
            ]
            for name, f in figures.items()
        ]
        print(table(rows, ["trainer", "ms", "ours ms", "times bf16_select", "times fp32", "peak GiB"]))
    save("peers", result, asked.out)


if __name__ == "__main__":
    main()
