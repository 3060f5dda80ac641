"""The loop: one trainer, or several that share a stream, take their steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Protocol

from torch import Tensor

from saekit.activations.stream import ShuffledStream, StreamState
from saekit.errors import SaekitError
from saekit.interrupt import Interrupted, InterruptGuard
from saekit.trainers.config import TrainConfig
from saekit.trainers.progress import TrainingProgress, bars


class Trainer(Protocol):
    """What the loop drives."""

    config: TrainConfig
    step: int

    def advance(self, rows: Tensor) -> dict[str, float]:
        """One step on one batch of the stream; gives its figures."""

    def line(self, latest: dict[str, float], waited: float) -> dict[str, float]:
        """What a line of metrics tells."""

    def save(self, stream: StreamState) -> None:
        """Write a checkpoint."""


def take_steps(trainers: Sequence[Trainer], stream: ShuffledStream, quiet: bool = False) -> None:
    """All remaining steps; the last state of each trainer is in a checkpoint when it returns or is interrupted.

    Args:
        trainers: of runs that differ in nothing but their columns of the stream; all stand at the same step.
        stream: at the place of that step.
        quiet: show no progress bar.

    Raises:
        SaekitError: activations or a loss are not finite, or the loss diverges.
        WriteError: a checkpoint cannot be written; those before are kept.
        Interrupted: by SIGINT or SIGTERM, after the step was finished and every state saved.
    """
    config, first = trainers[0].config, trainers[0].step
    stream.waited = 0.0
    with bars(quiet) as screen, ExitStack() as files, InterruptGuard() as guard:
        progress = [
            files.enter_context(TrainingProgress(t.config, t.step, screen, _name(t.config, len(trainers) == 1)))
            for t in trainers
        ]
        batches = iter(stream)
        for step in range(first, config.steps):
            rows = _next(batches, trainers, stream)
            last = step + 1 == config.steps
            for trainer, shown in zip(trainers, progress, strict=True):
                metrics = trainer.advance(rows)
                if trainer.step % config.log_every == 0 or last:
                    shown.log(trainer.step, trainer.line(metrics, stream.waited))
                shown.advance()
            stopped = guard.received  # looked at once: all are saved or none
            for trainer in trainers:
                if trainer.step % config.checkpoint_every == 0 or last or stopped:
                    trainer.save(stream.place)
            if stopped:
                raise Interrupted(stopped)


def _next(batches: Iterator[Tensor], trainers: Sequence[Trainer], stream: ShuffledStream) -> Tensor:
    """The next batch; where there is none to be had, what was learned so far is saved first."""
    try:
        return next(batches)
    except SaekitError:
        if trainers[0].step > 0:
            for trainer in trainers:
                trainer.save(stream.place)
        raise


def _name(config: TrainConfig, alone: bool) -> str:
    """What stands beside a bar."""
    return config.variant if alone or config.hook is None else "\n".join(config.hook.rsplit(".", 1))
