"""Where the lines of ``metrics.jsonl`` go too: Weights & Biases and TensorBoard, by ``log`` in the config.

A logger is one class and one line in ``LOGGERS``. None of them can end a run that goes on.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from saekit.errors import SaekitError, first_line
from saekit.files import replace_file
from saekit.reading import read_json

WANDB, TENSORBOARD = "wandb.json", "tensorboard"  # in a run's folder
_EVENTS = "events.out.tfevents.*"


class LoggedRun(Protocol):
    """What loggers ask of a run (``TrainConfig``)."""

    log: Sequence[str]

    @property
    def out(self) -> Path:
        """Its folder."""

    def to_dict(self) -> dict[str, Any]:
        """Its settings by their flat names, as JSON holds them."""


class Logger(Protocol):
    """Takes what is measured while one run trains.

    Attributes:
        package: that it needs, the name of saekit's extra at once; None for none.
        where: one finds it, for people.
    """

    package: str | None
    where: str

    def __init__(self, config: LoggedRun, step: int, logged: int) -> None:
        """Open it.

        Args:
            config: of the run.
            step: steps that lie behind; 0 at the start.
            logged: the last step that an earlier start logged, which may be beyond ``step``; 0 for none.
        """

    def log(self, step: int, line: dict[str, float]) -> None:
        """Take the metrics after ``step`` steps."""

    def close(self, failed: bool) -> None:
        """Write what is left; the run is at its end, or has ended before."""


class WandbLogger:
    """A run of Weights & Biases, the same one each time a run of ours goes on; ``WANDB_*`` variables hold."""

    package: str | None = "wandb"

    def __init__(self, config: LoggedRun, step: int, logged: int) -> None:
        import wandb

        known = config.out / WANDB
        if not known.is_file():
            replace_file(known, lambda part: part.write_text(json.dumps({"id": secrets.token_hex(4)}) + "\n"))
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "saekit"),
            id=read_json(known)["id"],
            resume="allow",
            name=str(config.out),
            config=config.to_dict(),
            dir=config.out,
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )
        offline = self.run.offline  # then nobody tells what earlier starts logged
        self.first = logged + 1 if offline else self.run.starting_step
        self.where = str(Path(self.run.dir).parent) if offline else str(self.run.url)

    def log(self, step: int, line: dict[str, float]) -> None:
        """Log a line, unless an earlier start has."""
        if step >= self.first:
            self.run.log(line, step=step)

    def close(self, failed: bool) -> None:
        """Upload the rest."""
        self.run.finish(exit_code=int(failed))


class TensorBoardLogger:
    """Event files in the run's folder ``tensorboard/``; what an earlier start logged beyond ``step`` is purged."""

    package: str | None = "tensorboard"

    def __init__(self, config: LoggedRun, step: int, logged: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = config.out / TENSORBOARD
        again = any(folder.glob(_EVENTS))
        self.where = str(folder)
        self.writer: Any = SummaryWriter(self.where, purge_step=step + 1 if again else None)

    def log(self, step: int, line: dict[str, float]) -> None:
        """Write a line, which is on the disk when this returns."""
        for name, value in line.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self, failed: bool) -> None:
        """Close the file."""
        self.writer.close()


LOGGERS: dict[str, type[Logger]] = {"wandb": WandbLogger, "tensorboard": TensorBoardLogger}


def check_installed(names: list[str]) -> None:
    """Make sure that the packages of loggers are there, before anything starts.

    Raises:
        SaekitError: one is not.
    """
    for name in names:
        package = LOGGERS[name].package
        if package is not None and find_spec(package) is None:
            raise SaekitError(f"--log {name} needs the package {package}: pip install saekit[{package}]")


class OpenLoggers:
    """The loggers of one run. One that fails is told of once and gets nothing more."""

    def __init__(self, config: LoggedRun, step: int, logged: int) -> None:
        """Open them.

        Raises:
            SaekitError: one cannot be.
        """
        self.open: dict[str, Logger] = {}
        for name in config.log:
            try:
                self.open[name] = LOGGERS[name](config, step, logged)
            except Exception as error:  # of whatever kind the package raises
                self.close(failed=True)
                raise SaekitError(
                    f"{name} cannot be started: {first_line(error).rstrip('.')}; "
                    "the run goes on without it by --resume --log none"
                ) from None

    def log(self, step: int, line: dict[str, float]) -> None:
        """Hand a line on."""
        for name, logger in list(self.open.items()):
            try:
                logger.log(step, line)
            except Exception as error:
                del self.open[name]
                _tell(name, error)

    def close(self, failed: bool) -> None:
        """Close those that still work."""
        for name, logger in self.open.items():
            try:
                logger.close(failed)
            except Exception as error:
                _tell(name, error)
        self.open = {}


def _tell(name: str, error: Exception) -> None:
    print(f"saekit: {name} fails ({first_line(error)}); metrics.jsonl has everything", file=sys.stderr)


def files_of_loggers(folder: Path) -> list[Path]:
    """What loggers keep in a run's folder that a run in its place must not go on with."""
    return [folder / WANDB, *(folder / TENSORBOARD).glob(_EVENTS)]
