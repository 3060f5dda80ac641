"""Time what feeds the step: the harvest, the activation cache on disk, and the stream of batches.

    python scripts/bench/data.py

- harvest: tokens a second of ``saekit cache`` without the disk, against the bare forward pass up to the hook.
- cache: bytes a second written and read, against a plain copy of the same bytes to and from the same disk, both
  flushed to it and both read while the system still has them in memory.
- stream: share of a live training's time that the step waits for activations.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import machine, save, spread, table

from saekit.activations import ActivationCache, ActivationSource
from saekit.activations.batch import ActivationBatch
from saekit.activations.harvesting import harvest
from saekit.activations.model import truncated
from saekit.trainers import TrainConfig, train


def seconds(work: Callable[[], Any]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def bench_harvest(repeats: int) -> dict[str, Any]:
    """The harvest against the bare pass, in turn, on the same contexts."""
    source = ActivationSource.open(device="cpu")
    contexts = list(itertools.islice(source.contexts("train"), 8))
    tokens = sum(batch.tokens.numel() for batch in contexts)
    bare, ours = [], []
    with truncated(source.model, [source.hook]) as forward:
        for _ in range(repeats):
            bare.append(seconds(lambda: [forward(batch.tokens) for batch in contexts]))
    for _ in range(repeats):
        with truncated(source.model, [source.hook]) as forward:
            bare.append(seconds(lambda run=forward: [run(batch.tokens) for batch in contexts]))
        ours.append(seconds(lambda: list(harvest(source.model, source.hook, contexts))))
    bare = bare[repeats:]  # the first were to warm up
    figures = {"bare": spread(bare), "harvest": spread(ours), "tokens": tokens}
    figures["share"] = figures["bare"]["median_ms"] / figures["harvest"]["median_ms"]
    return figures


def bench_cache(folder: Path, megabytes: int, repeats: int) -> dict[str, Any]:
    """Writing and reading a cache against plain files of the same bytes, in turn, each first in every other round."""
    d = 768
    rows = (megabytes << 20) // (2 * d)
    x = torch.randn(rows, d).bfloat16()
    ids = torch.arange(rows)
    whole = ActivationBatch(x, ids, ids, ids)
    pieces = [whole.rows(start, start + 8192) for start in range(0, rows, 8192)]
    plain, path = folder / "plain", folder / "cache"
    cache = ActivationCache.write(path, pieces, {}, dtype="bfloat16")
    blocks = [(path / shard["file"]).read_bytes() for shard in cache.shards]
    work: list[tuple[str, Callable[[], Any]]] = [
        ("write", lambda: ActivationCache.write(path, pieces, {}, dtype="bfloat16")),
        ("plain write", lambda: _write_plain(plain, blocks)),
        ("read", lambda: _read_all(cache)),
        ("plain read", lambda: _read_plain(plain)),
    ]
    times: dict[str, list[float]] = {name: [] for name, _ in work}
    for number in range(2 * repeats):
        for old in (plain, path):
            shutil.rmtree(old, ignore_errors=True)
        os.sync()
        for name, function in _turned(work[:2], number) + _turned(work[2:], number):
            times[name].append(seconds(function))
    size = sum(map(len, blocks))
    figures: dict[str, Any] = {name: {**spread(taken), "bytes": size} for name, taken in times.items()}
    for name in ("write", "read"):
        figures[f"{name} share"] = figures[f"plain {name}"]["median_ms"] / figures[name]["median_ms"]
    return figures


def _turned(pair: list[Any], number: int) -> list[Any]:
    return pair[::-1] if number % 2 else pair


def _write_plain(folder: Path, blocks: list[bytes]) -> None:
    folder.mkdir()
    for number, block in enumerate(blocks):
        with (folder / str(number)).open("wb") as file:
            file.write(block)
            file.flush()
            os.fsync(file.fileno())


def _read_plain(folder: Path) -> None:
    buffer = bytearray(1 << 22)  # the quickest size: it stays in the processor's cache
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _read_all(cache: ActivationCache) -> None:
    for start in range(0, len(cache), 8192):
        cache.read(start, min(start + 8192, len(cache)))


def bench_stream(folder: Path) -> dict[str, Any]:
    """A live training of the embedded model and one from a cache: seconds in all, and seconds waited."""
    streams = {}
    source = ActivationSource.open(device="cpu")
    ActivationCache.write(folder / "lm", source.batches("train", 600_000), source.provenance("train"), dtype="bfloat16")
    for name, more in (("live", {}), ("from a cache", {"cache": folder / "lm"})):
        config = TrainConfig(
            variant="topk", tokens=409_600, width=4096, out=folder / name, log_every=1, calibration_tokens=4096, **more
        )
        train(config, quiet=True)
        lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        last = lines[-1]
        streams[name] = {"seconds": last["seconds"], "waited": last["waited_seconds"], "tokens": last["tokens"]}
        streams[name]["share"] = last["waited_seconds"] / last["seconds"]
    return streams


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1024, help="size of the cache")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "harvest": bench_harvest(asked.repeats)}
    print(f"harvest: {result['harvest']['share']:.3f} of the bare pass", flush=True)
    with tempfile.TemporaryDirectory() as name:
        result["cache"] = bench_cache(Path(name), asked.megabytes, asked.repeats)
        rows = [
            [key, f["median_ms"], f"{f['bytes'] / f['median_ms'] / 1e6:.2f}"]
            for key, f in result["cache"].items()
            if isinstance(f, dict)
        ]
        print(table(rows, ["", "ms", "GB/s"]), flush=True)
        print({key: round(f, 3) for key, f in result["cache"].items() if isinstance(f, float)}, flush=True)
        result["stream"] = bench_stream(Path(name))
        print({key: round(f["share"], 3) for key, f in result["stream"].items()}, "of the time waited")
    save("data", result, asked.out)


if __name__ == "__main__":
    main()
