"""From text to a dictionary: saekit against SAELens on the same model, text, tokens, width and batch size.

    python scripts/bench/end_to_end.py

Both read the same documents, run the embedded model in float32 and train TopK. The time is that of the training:
imports are left out for both, and the loading of the model for SAELens; ours includes it, and the saving.
SAELens runs by its defaults and tuned (bfloat16 autocast, memory used again).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import machine, save, spread, table
from peers import PEERS, REUSE, environment

from saekit.activations.model import model_path
from saekit.activations.text import open_text


def write_texts(path: Path, tokens: int) -> None:
    """Training documents for twice as many tokens, some of which are held out; three characters make a token."""
    left = 6 * tokens
    with path.open("w") as file:
        for document in open_text("python").documents("train"):
            file.write(json.dumps({"text": document}) + "\n")
            left -= len(document)
            if left < 0:
                return


def ours(folder: Path, texts: Path, asked: dict[str, Any]) -> float:
    """Seconds of ``saekit.trainers.train``, in a process of its own."""
    settings = {
        **asked, "variant": "topk", "dataset": str(texts), "context_length": 256, "out": str(folder / "run"),
        "lr": 1e-3, "device": "cpu",
    }  # fmt: skip
    code = (
        "import json, sys, time\n"
        "from saekit.activations import load_model\n"
        "from saekit.trainers import TrainConfig, train\n"
        "config = TrainConfig(**json.loads(sys.argv[1]))\n"
        "load_model()\n"  # imports and the first look at the file, which the others leave out too
        "start = time.perf_counter()\n"
        "train(config, overwrite=True, quiet=True)\n"
        "print('RESULT', json.dumps({'seconds': time.perf_counter() - start}))\n"
    )
    return _seconds([sys.executable, "-c", code, json.dumps(settings)], {})


def theirs(folder: Path, texts: Path, asked: dict[str, Any]) -> float:
    """Seconds of SAELens's runner."""
    settings = {
        **asked, "texts": str(texts), "model": model_path("embedded"), "module": "model.layers.1", "d_in": 256,
        "context_length": 256,
    }  # fmt: skip
    path = folder / "settings.json"
    path.write_text(json.dumps(settings))
    script = Path(__file__).parent / "peer_end_to_end.py"
    return _seconds([str(environment("sae_lens")), str(script), str(path)], REUSE if asked["tuned"] else {})


def _seconds(command: list[str], extra: dict[str, str]) -> float:
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1", **extra}, check=False
    )
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return float(json.loads(line.removeprefix("RESULT "))["seconds"])
    raise SystemExit(done.stderr[-2000:])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=409_600)
    parser.add_argument("--width", type=int, action="append", help="4096 and 16384 if not given")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    settings = {key: getattr(asked, key) for key in ("tokens", "k", "batch_size")}
    result: dict[str, Any] = {"machine": machine(), "packages": PEERS["sae_lens"], "settings": settings, "widths": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_texts(folder / "texts.jsonl", asked.tokens)
        for width in asked.width or [4096, 16_384]:
            result["widths"][str(width)] = compare(folder, {**settings, "width": width}, asked.repeats)
    save("end_to_end", result, asked.out)


def compare(folder: Path, settings: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Figures of every trainer, in turn."""
    texts = folder / "texts.jsonl"
    arms: dict[str, Callable[[], float]] = {
        "saekit bf16_select": lambda: ours(folder, texts, {**settings, "precision": "bf16_select"}),
        "saekit fp32": lambda: ours(folder, texts, {**settings, "precision": "fp32"}),
        "sae_lens default": lambda: theirs(folder, texts, {**settings, "tuned": False}),
        "sae_lens tuned": lambda: theirs(folder, texts, {**settings, "tuned": True}),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for arm, run in arms.items():
            seconds[arm].append(run())
            print(f"{settings['width']:6} {arm:20} {settings['tokens'] / seconds[arm][-1]:10,.0f} tokens/s", flush=True)
    figures = {arm: spread(taken) for arm, taken in seconds.items()}
    for figure in figures.values():
        figure["tokens_per_second"] = 1e3 * settings["tokens"] / figure["median_ms"]
    print(
        table(
            [[arm, f["tokens_per_second"], f["median_ms"] / 1e3] for arm, f in figures.items()], ["", "tokens/s", "s"]
        )
    )
    return figures


if __name__ == "__main__":
    main()
