"""Load: a large activation cache is written, read as training reads it, and verified, in constant memory.

    python scripts/bench/load.py --gib 20

- write: ``ActivationCache.write`` of made-up activations, each shard flushed to the disk.
- read: one epoch of shuffled batches; each training row must come exactly once, as it was written.
- verify: ``saekit cache verify``.

Before it is read, a file is put out of the system's memory, so that it comes from the disk. Beside the rates stand
those of plain files on the same disk, before and after, and the most memory that was resident while a phase handled its
first 2 GiB and until its end. The cache is deleted at the end, also when stopped.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from common import machine, save, table

from saekit.activations import ActivationCache
from saekit.activations.batch import ActivationBatch
from saekit.activations.repair import verify
from saekit.activations.stream import ShuffledStream, cache_rows

GIB = 1 << 30
SPARED = 6 * GIB  # of the disk
EARLY = 2 * GIB  # of a phase, after which the memory is noted first
D = 1024
ROW = 2 * D + 16  # bytes: bfloat16, token, document and position
POOL = 8191  # rows that the made-up activations are taken from; prime, so that shards differ
DIGITS = 4  # first columns of a row: its number, in digits that bfloat16 keeps
BATCH, BUFFER = 4096, 131_072  # as in training


class Memory:
    """The most bytes that were resident, sampled while it is entered."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Memory:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._look()
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.02):
            self._look()

    def _look(self) -> None:
        self.peak = max(self.peak, resident())


def resident() -> int:
    """Bytes that this process has in memory now; the most so far where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


class Phase:
    """Times a phase, shows how far it is, and notes the memory early and at the end."""

    def __init__(self, name: str, size: int, screen: Progress, memory: Memory) -> None:
        self.size, self.done, self.early = size, 0, 0
        self._screen, self._memory = screen, memory
        self._task = screen.add_task(name, total=size / GIB)
        self._start = time.perf_counter()

    def advance(self, size: int) -> None:
        """So many bytes more are done."""
        self.done += size
        self._screen.update(self._task, completed=self.done / GIB)
        if not self.early and self.done >= EARLY:
            self.early = self._memory.peak

    def figures(self) -> dict[str, float]:
        """At the end."""
        seconds = time.perf_counter() - self._start
        self._screen.update(self._task, completed=self.size / GIB)
        return {
            "gib": self.size / GIB,
            "seconds": seconds,
            "gib_per_second": self.size / GIB / seconds,
            "peak_bytes_early": self.early or self._memory.peak,
            "peak_bytes": self._memory.peak,
        }


@contextmanager
def phase(name: str, size: int, screen: Progress, figures: dict[str, Any]) -> Iterator[Phase]:
    """A phase whose figures go into ``figures``."""
    with Memory() as memory:
        running = Phase(name, size, screen, memory)
        yield running
        figures[name] = running.figures()


def made_up(rows: Tensor, pool: Tensor) -> Tensor:
    """The activations [m, D] of rows of these numbers."""
    x = pool[rows * 31 % POOL]
    x[:, :DIGITS] = torch.stack([rows >> 8 * digit & 255 for digit in range(DIGITS)], dim=1).to(x.dtype)
    return x


def numbers(x: Tensor) -> Tensor:
    """The numbers of rows, from their activations."""
    return (x[:, :DIGITS].long() << torch.arange(0, 8 * DIGITS, 8)).sum(1)


def write(path: Path, rows: int, pool: Tensor, running: Phase) -> ActivationCache:
    """The cache."""

    def batches() -> Iterator[ActivationBatch]:
        for start in range(0, rows, 2 * BATCH):
            numbered = torch.arange(start, min(start + 2 * BATCH, rows))
            yield ActivationBatch(made_up(numbered, pool), numbered % 50_000, numbered // 256, numbered % 256)
            running.advance(len(numbered) * ROW)

    return ActivationCache.write(path, batches(), {}, dtype="bfloat16")


def read(cache: ActivationCache, pool: Tensor, running: Phase) -> dict[str, float]:
    """One epoch; ends the program where a training row is missing, comes again, or is not as it was written."""
    rows = cache.count("train")
    times = torch.zeros(len(cache), dtype=torch.uint8)  # by row of the cache; those held out are never read
    some = torch.arange(DIGITS, D, 61)  # columns; to look at all of each row would take as long as reading it
    few = pool[:, some].float()
    stream = ShuffledStream(cache_rows(cache, seed=0), BATCH, BUFFER, seed=0, limit=rows)
    start = time.perf_counter()
    try:
        for number, x in enumerate(stream):
            here = numbers(x)
            same = int(here.max()) < len(cache) and torch.equal(x[:, some], few[here * 31 % POOL])
            if not same or (number % 64 == 0 and not torch.equal(x, made_up(here, pool).float())):
                sys.exit(f"batch {number} is not as it was written")
            times.index_add_(0, here, torch.ones(len(here), dtype=torch.uint8))
            running.advance(len(x) * ROW)
    finally:
        stream.close()
    seconds = time.perf_counter() - start
    whole = rows // BATCH * BATCH  # rows that do not fill a batch are left out
    if int(times.max()) > 1 or int(times.sum(dtype=torch.int64)) != whole:
        came = int((times > 0).sum())
        sys.exit(f"{int((times > 1).sum()):,} training rows came again, {whole - came:,} did not come")
    return {"rows": whole, "rows_per_second": whole / seconds, "waited_share": stream.waited / seconds}


def plain(folder: Path) -> dict[str, float]:
    """GiB a second of plain files of a shard's size, each flushed to the disk, and then read from it."""
    block, files, rates = os.urandom(1 << 23), [folder / f"plain-{number}" for number in range(8)], {}
    start = time.perf_counter()
    for path in files:
        with path.open("wb") as file:
            for _ in range(16):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
    rates["write"] = 1 / (time.perf_counter() - start)
    for path in files:
        forget(path)
    buffer = bytearray(1 << 22)
    start = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    rates["read"] = 1 / (time.perf_counter() - start)
    for path in files:
        path.unlink()
    return rates


def forget(path: Path) -> None:
    """Put a file out of the system's memory, where the system can."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bench(folder: Path, gib: float) -> dict[str, Any]:
    """All phases."""
    room = shutil.disk_usage(folder).free - SPARED
    rows = int(min(gib * GIB, room)) // ROW
    if rows < 64 * BATCH:
        sys.exit(f"'{folder}' has no space for that beside {SPARED // GIB} GiB to spare")
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(POOL, D, generator=generator).bfloat16()
    size, path = rows * ROW, folder / "cache"
    figures: dict[str, Any] = {"rows": rows, "idle_bytes": resident(), "plain": [plain(folder)]}
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.1f} of {task.total:.1f} GiB"),
    ]
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as screen:
        with phase("write", size, screen, figures) as running:
            cache = write(path, rows, pool, running)
        for shard in cache.shards:
            forget(path / shard["file"])
        with phase("read", cache.count("train") * ROW, screen, figures) as running:
            epoch = read(cache, pool, running)
        figures["read"] |= epoch
        for shard in cache.shards:
            forget(path / shard["file"])
        with phase("verify", size, screen, figures) as running:
            damage = verify(path, lambda done: running.advance(cache.shards[done - 1]["rows"] * ROW))
    if damage:
        sys.exit(f"{len(damage)} shards are damaged: {damage[0]}")
    figures["plain"].append(plain(folder))
    figures["largest_ever_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return figures


def told(figures: dict[str, Any]) -> str:
    """The figures as a table."""
    rows = [
        [
            name,
            f"{figures[name]['gib']:.1f}",
            f"{figures[name]['seconds']:.0f}",
            f"{figures[name]['gib_per_second']:.2f}",
            " and ".join(f"{disk['write' if name == 'write' else 'read']:.2f}" for disk in figures["plain"]),
            f"{figures[name]['peak_bytes_early'] / GIB:.2f}",
            f"{figures[name]['peak_bytes'] / GIB:.2f}",
        ]
        for name in ("write", "read", "verify")
    ]
    return table(rows, ["", "GiB", "s", "GiB/s", "plain files", "peak GiB, first 2", "to the end"])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=20, help="size of the cache; less where the disk has less [20]")
    parser.add_argument("--out", type=Path, default=Path(".bench"), help="folder that the cache is made below [.bench]")
    parser.add_argument("--threads", type=int, help="of torch; 1 where other programs keep the processor busy [all]")
    parser.add_argument("--keep", action="store_true", help="do not delete the cache")
    parser.add_argument("--results", type=Path, help="file of the figures [one in results/load/]")
    asked = parser.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: the cache is deleted on the way out
    asked.out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="load-", dir=asked.out))
    try:
        figures = bench(folder, asked.gib)
    finally:
        if asked.keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder)
    print(told(figures))
    print(f"waited for batches: {figures['read']['waited_share']:.0%} of the time read; each of them checked")
    save("load", {"machine": machine(), **figures}, asked.results)


if __name__ == "__main__":
    main()
