"""What a run shows and writes while it trains."""

from __future__ import annotations

import contextlib
import json
import time
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from saekit.files import WriteError, replace_file, writing
from saekit.trainers.config import TrainConfig
from saekit.trainers.loggers import OpenLoggers


def bars(quiet: bool) -> Progress:
    """The part of the screen that shows progress bars while it is entered."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        disable=quiet,
    )


class TrainingProgress:
    """A bar of one run on the screen, lines in its ``metrics.jsonl``, and what its loggers get."""

    def __init__(self, config: TrainConfig, step: int, screen: Progress, name: str) -> None:
        self.config = config
        self.first = step
        self.failed = False  # of itself, where others go on
        self.start = time.perf_counter()
        path = config.out / "metrics.jsonl"
        lines = _lines(path)
        self.loggers = OpenLoggers(config, step, max(lines, default=0))
        kept = "".join(line for number, line in lines.items() if number <= step)
        try:
            replace_file(path, lambda part: part.write_text(kept))
            self.file: TextIO = path.open("a")
        except BaseException:
            self.loggers.close(failed=True)
            raise
        self.screen = screen
        self.task = screen.add_task(name, total=config.steps, completed=step, figures="")
        for kind, logger in self.loggers.open.items() if not screen.disable else ():
            screen.console.print(f"{kind}: {logger.where}", highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.loggers.close(failed=self.failed or error is not None)
        with contextlib.suppress(WriteError) if error is not None else nullcontext(), writing(Path(self.file.name)):
            self.file.close()  # writes what could not be written before, if only it can now

    def advance(self) -> None:
        """One step is done."""
        self.screen.advance(self.task)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write one line of metrics and show the main figures."""
        seconds = time.perf_counter() - self.start
        rate = (step - self.first) * self.config.batch_size / seconds
        metrics = {**metrics, "waited_share": metrics["waited_seconds"] / seconds}
        line = {"step": step, "seconds": seconds, "tokens_per_second": rate, **metrics}
        with writing(Path(self.file.name)):
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        self.loggers.log(step, {key: value for key, value in line.items() if key != "step"})
        figures = (
            "{rate:,.0f} tokens/s  dead {dead_share:.1%}  waited {waited_share:.0%}\n"
            "loss {loss:.4f}  FVU {fvu:.4f}  L0 {l0:.1f}"
        )
        self.screen.update(self.task, figures=figures.format(rate=rate, **metrics))


def _lines(path: Path) -> dict[int, str]:
    """The lines of an earlier start by their step; one cut off by a crash is dropped."""
    found = {}
    for line in path.read_text(errors="replace").splitlines(keepends=True) if path.is_file() else []:
        try:
            if type(step := json.loads(line)["step"]) is int:
                found[step] = line
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return found
