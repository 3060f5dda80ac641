"""The loop: trainers take their steps, those that share a stream together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from saekit.activations.stream import ShuffledStream, StreamState
from saekit.errors import SaekitError
from saekit.interrupt import Interrupted, InterruptGuard
from saekit.ranks import current
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


@dataclass
class Lane:
    """Trainers that stand at the same step and take the same batches of a stream."""

    stream: ShuffledStream
    trainers: list[Trainer]

    @property
    def config(self) -> TrainConfig:
        """Of one of the runs; steps and batch size are those of all."""
        return self.trainers[0].config

    @property
    def tokens(self) -> int:
        """That each has been trained on."""
        return self.trainers[0].step * self.config.optimizer.batch_size

    @property
    def ends(self) -> bool:
        """Whether there is nothing left to do."""
        return not self.trainers or self.trainers[0].step >= self.config.steps


def take_steps(lanes: Sequence[Lane], quiet: bool = False) -> dict[Trainer, SaekitError]:
    """All remaining steps; the last state of each trainer is in a checkpoint when it returns or is interrupted.

    The lane that has seen the fewest tokens goes first. A trainer that fails is left where it is; the others go on.

    Args:
        lanes: each at a step of its own.
        quiet: show no progress bar.

    Returns:
        The trainers that failed, and why: a loss that is not finite, or diverges.

    Raises:
        SaekitError: activations are not finite.
        WriteError: a checkpoint cannot be written; those before are kept.
        Interrupted: by SIGINT or SIGTERM, after the step was finished and every state saved.
    """
    every = [trainer for lane in lanes for trainer in lane.trainers]
    failed: dict[Trainer, SaekitError] = {}
    with bars(quiet) as screen, ExitStack() as files, InterruptGuard() as guard:
        progress = {
            t: files.enter_context(TrainingProgress(t.config, t.step, screen, _name(t.config, len(every) == 1)))
            for t in every
        }
        batches = [iter(lane.stream) for lane in lanes]
        for lane in lanes:
            lane.stream.waited = 0.0
        while any(not lane.ends for lane in lanes):
            number = min((i for i, lane in enumerate(lanes) if not lane.ends), key=lambda i: lanes[i].tokens)
            lane = lanes[number]
            rows = _next(batches[number], lanes, guard)
            for trainer in list(lane.trainers):
                try:
                    metrics = trainer.advance(rows)
                except SaekitError as error:
                    lane.trainers.remove(trainer)
                    failed[trainer], progress[trainer].failed = error, True
                    continue
                if trainer.step % trainer.config.log_every == 0 or trainer.step == trainer.config.steps:
                    progress[trainer].log(trainer.step, trainer.line(metrics, lane.stream.waited))
                progress[trainer].advance()
            if not lane.trainers:
                lane.stream.close()  # others that read the same rows do not wait for it
            stopped = guard.received  # looked at once: all are saved or none
            for trainer in lane.trainers:
                if trainer.step % trainer.config.checkpoint_every == 0 or lane.ends or stopped:
                    trainer.save(lane.stream.place)
            if stopped:
                current().stopped = True
                _save(other for other in lanes if other is not lane)
                raise Interrupted(stopped)
    return failed


def _next(batches: Iterator[Tensor], lanes: Sequence[Lane], guard: InterruptGuard) -> Tensor:
    """The next batch; where there is none to be had, what was learned so far is saved first."""
    try:
        return next(batches)
    except SaekitError:
        _save(lanes)
        if guard.received:  # as another process was, which harvests no more
            raise Interrupted(guard.received) from None
        raise


def _save(lanes: Iterable[Lane]) -> None:
    for lane in lanes:
        for trainer in lane.trainers:
            if 0 < trainer.step < trainer.config.steps:
                trainer.save(lane.stream.place)


def _name(config: TrainConfig, alone: bool) -> str:
    """What stands beside a bar."""
    return config.variant if alone else "\n".join(config.out.name.rsplit(".", 1))
