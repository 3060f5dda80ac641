"""What runs would take, by a few steps of each that leave nothing behind."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from statistics import median

import torch
from torch import Tensor

from saekit.files import in_bytes
from saekit.machine import pick_device
from saekit.trainers.config import TrainConfig
from saekit.trainers.data import opened
from saekit.trainers.initial import with_initial_width
from saekit.trainers.lanes import begun, in_groups
from saekit.trainers.loop import Lane
from saekit.trainers.many import by_origin
from saekit.trainers.trainer import Trainer

_STEPS = 3


@dataclass(frozen=True)
class Estimate:
    """What a run would take on this machine.

    Attributes:
        config: what would be trained, defaults filled in.
        step_seconds: one step, without waiting for rows: the median of three.
        group: number of the runs that share a pass over the data with it.
        memory: bytes of that group, beside the model.
        row_seconds: that one row of that pass takes; None where the text is too short to tell.
    """

    config: TrainConfig
    step_seconds: float
    group: int
    memory: int
    row_seconds: float | None


def estimate(configs: Sequence[TrainConfig], *, trust_remote_code: bool = False) -> list[Estimate]:
    """Make two fills of rows and take three steps of each run, in no folder.

    Raises:
        SaekitError: what ``train_many`` raises for before it begins.
    """
    found: list[Estimate] = []
    passes = 0
    for alike in by_origin(dict(enumerate(map(with_initial_width, configs)))):
        first = next(iter(alike.values()))
        device = pick_device(first.device)
        open_source = cache(partial(opened, first, device, trust_remote_code))
        for group, memory in in_groups(alike, open_source(), device):
            some = {number: alike[number] for number in group}
            with begun(some, group, [False] * len(configs), open_source, device) as (trainers, lanes):
                row_seconds = _time_rows(lanes[0])
                for _, trainer in sorted(trainers.items()):
                    stream = next(lane.stream for lane in lanes if trainer in lane.trainers)
                    size = trainer.config.batch_size
                    seconds = _time_steps(trainer, torch.split(stream.peek(_STEPS * size), size))
                    found.append(Estimate(trainer.config, seconds, passes, memory.total, row_seconds))
            passes += 1
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
    groups = {each.group: each for each in estimates}
    steps = sum(each.step_seconds * each.config.steps for each in estimates)
    tokens = {number: max(e.config.tokens for e in estimates if e.group == number) for number in groups}
    harvest = sum((each.row_seconds or 0) * tokens[number] for number, each in groups.items())
    memory = in_bytes(max(each.memory for each in estimates))
    lines.append(
        f"{len(estimates)} runs from {len(groups)} pass{'es' if len(groups) > 1 else ''} over the data: "
        f"{memory} beside the model{' at a time' if len(groups) > 1 else ''}; about {_time(steps)} of steps and "
        f"{_time(harvest)} of harvest, which overlap where there are processors for both"
    )
    return lines


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
