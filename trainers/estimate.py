"""What runs would take, by a few steps of each that leave nothing behind."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median

import torch
from torch import Tensor

from saekit.activations.mixing import BYTES
from saekit.files import in_bytes
from saekit.trainers.config import TrainConfig
from saekit.trainers.loop import Lane
from saekit.trainers.many import begun, by_origin
from saekit.trainers.trainer import Trainer

_STEPS = 3
_FILLS = 3  # of a stream: one is taken, one is ready, one is being made


@dataclass(frozen=True)
class Estimate:
    """What a run would take on this machine.

    Attributes:
        config: what would be trained, defaults filled in.
        bytes: of weights, gradients and the optimiser's moments.
        step_seconds: one step, without waiting for rows: the median of three.
        stream: number of the stream that it shares with others.
        stream_bytes: of that stream's rows: a fill is taken, one is ready, one is being made.
        origin: number of the pass over the text that it shares with others.
        row_seconds: that one row of that pass takes; None where the text is too short to tell.
    """

    config: TrainConfig
    bytes: int
    step_seconds: float
    stream: int
    stream_bytes: int
    origin: int
    row_seconds: float | None


def estimate(configs: Sequence[TrainConfig], *, trust_remote_code: bool = False) -> list[Estimate]:
    """Make two fills of rows and take three steps of each run, in no folder.

    Raises:
        SaekitError: what ``train_many`` raises for before it begins.
    """
    found: list[Estimate] = []
    streams = 0
    for number, group in enumerate(by_origin(configs)):
        with begun(group, [True] * len(group), trust_remote_code) as (trainers, lanes):
            row_seconds = _time_rows(lanes[0])
            for _, trainer in sorted(trainers.items()):
                place = next(i for i, lane in enumerate(lanes) if trainer in lane.trainers)
                size = trainer.config.batch_size
                rows = torch.split(lanes[place].stream.peek(_STEPS * size), size)
                buffered = _FILLS * max(trainer.config.buffer, size) * rows[0].shape[1] * 4
                held = 16 * sum(p.numel() for p in trainer.optimizer.parameters.values())
                found.append(
                    Estimate(
                        trainer.config, held, _time_steps(trainer, rows), streams + place, buffered, number, row_seconds
                    )
                )
            streams += len(lanes)
    return found


def _time_steps(trainer: Trainer, rows: Sequence[Tensor]) -> float:
    seconds = []
    for batch in rows:
        start = time.perf_counter()
        trainer.advance(batch)
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def _time_rows(lane: Lane) -> float | None:
    """Seconds a row, from the time between one fill and the next."""
    lane.stream.peek(1)
    start = time.perf_counter()
    fill = max(lane.config.buffer, lane.config.batch_size)
    taken = sum(1 for _ in islice(lane.stream, fill // lane.config.batch_size + 1))
    return (time.perf_counter() - start) / fill if taken > fill // lane.config.batch_size else None


def told(estimates: Sequence[Estimate]) -> list[str]:
    """Lines for the user: each run, then what all take together."""
    lines = []
    for each in estimates:
        config = each.config
        lines.append(
            f"{config.out.name}: {config.variant}, k {getattr(config, 'k', '-')}, {config.width:,} features at "
            f"{config.hook}, {config.steps:,} steps of {each.step_seconds * 1000:.0f} ms"
        )
    memory = sum(each.bytes for each in estimates)
    memory += sum({each.stream: each.stream_bytes for each in estimates}.values())
    memory += BYTES * sum({each.origin: each.config.pool or 0 for each in estimates if not each.config.cache}.values())
    steps = sum(each.step_seconds * each.config.steps for each in estimates)
    harvest = {
        each.origin: (each.row_seconds or 0) * max(e.config.tokens for e in estimates if e.origin == each.origin)
        for each in estimates
    }
    passes = len(harvest)
    lines.append(
        f"{len(estimates)} runs from {passes} pass{'es' if passes > 1 else ''} over the text: "
        f"{in_bytes(memory)} beside the model; about {_time(steps)} of steps and {_time(sum(harvest.values()))} of "
        f"harvest, which overlap where there are processors for both"
    )
    return lines


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
