"""The loop: one trainer, or several that share a stream, take their steps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from saekit.activations import ShuffledStream
from saekit.trainers.config import TrainConfig
from saekit.trainers.interrupt import Interrupted, InterruptGuard
from saekit.trainers.progress import TrainingProgress, bars

if TYPE_CHECKING:
    from saekit.trainers.trainer import Trainer


def take_steps(trainers: Sequence[Trainer], stream: ShuffledStream, quiet: bool = False) -> None:
    """All remaining steps; the last state of each trainer is in a checkpoint when it returns or is interrupted.

    Trainers may stand at different steps, where a process was killed between their checkpoints: those that are ahead
    wait until the stream reaches their step.

    Args:
        trainers: of runs that differ in nothing but their columns of the stream.
        stream: from its beginning.
        quiet: show no progress bar.

    Raises:
        SaekitError: activations or a loss are not finite.
        Interrupted: by SIGINT or SIGTERM, after the step was finished and every state saved.
    """
    config = trainers[0].config
    first = min(trainer.step for trainer in trainers)
    if 0 < first < config.steps:  # past the batches that all have been trained on
        next(itertools.islice(stream, first - 1, first), None)
    stream.waited = 0.0
    with bars(quiet) as screen, ExitStack() as files, InterruptGuard() as guard:
        progress = [
            files.enter_context(TrainingProgress(t.config, t.step, screen, _name(t.config, len(trainers) == 1)))
            for t in trainers
        ]
        for step, rows in enumerate(itertools.islice(stream, config.steps - first), first):
            due = [pair for pair in zip(trainers, progress, strict=True) if pair[0].step == step]
            last = step + 1 == config.steps
            for trainer, shown in due:
                metrics = trainer.advance(rows)
                if trainer.step % config.log_every == 0 or last:
                    shown.log(trainer.step, trainer.line(metrics, stream.waited))
                shown.advance()
            stopped = guard.received  # looked at once: all are saved or none
            for trainer, _ in due:
                if trainer.step % config.checkpoint_every == 0 or last or stopped:
                    trainer.save()
            if stopped:
                raise Interrupted(stopped)


def _name(config: TrainConfig, alone: bool) -> str:
    """What stands beside a bar."""
    return config.variant if alone or config.hook is None else "\n".join(config.hook.rsplit(".", 1))
