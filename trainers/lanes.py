"""Runs of one origin begin or go on: their trainers, in lanes that take the same batches of one stream."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from saekit.activations import ActivationCache, ActivationSource, ShuffledStream
from saekit.activations.finite import BadTokens
from saekit.activations.spread import assist, leave
from saekit.activations.stream import StreamState
from saekit.activations.tee import Tee
from saekit.kernels.workspace import Workspace
from saekit.ranks import current
from saekit.trainers.checkpoint import checkpoints, load_checkpoints
from saekit.trainers.config import TrainConfig
from saekit.trainers.data import TrainingData, shared_data, widths
from saekit.trainers.loop import Lane
from saekit.trainers.memory import Memory, groups_that_fit
from saekit.trainers.run_folder import CHECKPOINTS
from saekit.trainers.trainer import Trainer, stream_state

SAMPLE = 16_384  # rows of the stream that decide about the units of training


@dataclass
class _Order:
    """Runs that take the same batches from the same step on."""

    members: list[int]
    states: list[dict[str, Any] | None]

    def place(self, data: Mapping[int, TrainingData]) -> StreamState | None:
        """Where their stream stands: rows that wait for the next fill are put together from their columns."""
        states = {(data[m].columns.start or 0): state for m, state in zip(self.members, self.states, strict=True)}
        return stream_state(*(state for _, state in sorted(states.items(), key=lambda item: item[0])))


def in_groups(
    configs: Mapping[int, TrainConfig], source: ActivationSource | ActivationCache, device: torch.device
) -> list[tuple[list[int], Memory]]:
    """The numbers of runs of one origin in groups that memory holds, each of which takes a pass of its own.

    Raises:
        SaekitError: a run asks for more features a token than its width has.
    """
    numbers, some = list(configs), list(configs.values())
    found = widths(list(dict.fromkeys(config.hook for config in some)), source)
    groups = groups_that_fit(some, [found[config.hook] for config in some], device)
    return [([numbers[m] for m in group], memory) for group, memory in groups]


@contextmanager
def begun(
    configs: Mapping[int, TrainConfig],
    group: Sequence[int],
    there: Sequence[bool],
    source: Callable[[], ActivationSource | ActivationCache],
    device: torch.device,
) -> Iterator[tuple[dict[int, Trainer], list[Lane]]]:
    """The trainers of runs of one origin by number, and in lanes; their streams run while it is entered.

    The source is opened when checkpoints have been read: a damaged one is told before a model is loaded.

    Args:
        configs: the runs of all processes that share the harvest, by number.
        group: the numbers of those that this process begins; with none it takes part in the harvest alone.
        there: of each number, whether it goes on.
        source: opens what they are trained on.
        device: where they are trained.
    """
    orders = _orders({number: configs[number] for number in group}, there, device)
    states = {m: state for order in orders for m, state in zip(order.members, order.states, strict=True)}
    before = _limits(configs, {m: state["provenance"] for m, state in states.items() if state})
    data = dict(zip(configs, shared_data([*configs.values()], source(), before), strict=True))
    workspace, trainers, lanes = Workspace(), {}, []
    with _streams(configs, data, orders) as streams:
        for order, stream, own in streams:
            sample = stream.peek(SAMPLE) if order.states[0] is None else None
            for m in order.members:
                trainers[m] = Trainer(configs[m], own[m], sample, device, workspace, states.pop(m))
            lanes.append(Lane(stream, [trainers[m] for m in order.members]))
            order.states.clear()  # as large as the runs themselves
        yield trainers, lanes


def _limits(configs: Mapping[int, TrainConfig], own: Mapping[int, Mapping[str, Any]]) -> list[Mapping[str, Any] | None]:
    """The provenance of each run that goes on; of another process's its limit of the norm, which leaves rows out."""
    told: list[dict[str, Any]] = [{}]
    first = next(iter(configs.values()))
    if first.max_norm is not None and first.cache is None:
        told = current().told({str(m): {"norm_limit": facts.get("norm_limit")} for m, facts in own.items()})
    others = {int(m): facts for each in told for m, facts in each.items()}
    return [own.get(number) or others.get(number) for number in configs]


def _orders(configs: Mapping[int, TrainConfig], there: Sequence[bool], device: torch.device) -> list[_Order]:
    """The runs by the order of their rows and the step from which they go on.

    Runs that were killed while they saved go on from the newest step that all of them have; one that was added later
    begins, and catches up.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for number, config in configs.items():
        alike.setdefault(config.order, []).append(number)
    orders = []
    for members in alike.values():
        saved = {m: set(checkpoints(configs[m].out / CHECKPOINTS)) if there[m] else set() for m in members}
        while saved:
            step = min(max(steps, default=0) for steps in saved.values())
            joined = [m for m, steps in saved.items() if step in steps or not (step or steps)]
            folders = [configs[m].out / CHECKPOINTS for m in joined if there[m]]
            found = load_checkpoints(folders, device) if folders else None
            orders.append(_Order(joined, list(found[1]) if found else [None] * len(joined)))
            saved = {m: steps for m, steps in saved.items() if m not in joined}
    return orders


@contextmanager
def _streams(
    configs: Mapping[int, TrainConfig], data: Mapping[int, TrainingData], orders: list[_Order]
) -> Iterator[list[tuple[_Order, ShuffledStream, dict[int, TrainingData]]]]:
    """The stream of each order, and the data of its members: their columns of it, and what is left out of it."""
    places = [order.place(data) for order in orders]
    tee, any_data = None, next(iter(data.values()))
    if not orders:
        assist(any_data.rows(None))
    if any_data.live and len(orders) > 1:
        starts = [place or StreamState() for place in places]
        any_data.bad.count = min(starts, key=lambda place: place.pieces).skipped
        # No stream is asked for more than a look ahead and a fill before the others are, and it reads up to three fills
        # ahead of what it is asked for; within this window none waits for one that nobody asks.
        window = SAMPLE + 6 * max(max(data[m].buffer, config.batch_size) for m, config in configs.items())
        tee = Tee(any_data.rows, [place.pieces for place in starts], window, any_data.bad)
    found = []
    with ExitStack() as stack:
        for number, (order, place) in enumerate(zip(orders, places, strict=True)):
            lead = data[order.members[0]]
            own = {m: replace(data[m], bad=lead.bad) for m in order.members}
            rows: Iterator[Tensor] | None = None
            taken = sorted({(c.start, c.stop) for m in order.members if (c := data[m].columns).stop is not None})
            columns = [slice(*each) for each in taken]
            if tee is not None:
                bad = BadTokens(lead.bad.skip, limits=lead.bad.limits)
                own = _narrowed({m: replace(data[m], bad=bad) for m in order.members}, taken)
                rows = tee.reader(number, bad, columns)
            elif taken and len(taken) < len({each.columns.start for each in data.values()}):  # others' are elsewhere
                own = _narrowed(own, taken)
                rows = _of_columns(lead.rows((place or StreamState()).pieces), columns)
            member = order.members[0]
            stream = stack.enter_context(closing(own[member].stream(configs[member], place, rows)))
            if tee is not None:
                stack.callback(tee.close)  # first of all, so that no stream waits for another
            found.append((order, stream, own))
        yield found


def _narrowed(data: Mapping[int, TrainingData], taken: Sequence[tuple[int, int]]) -> dict[int, TrainingData]:
    """The data of runs where of each row the taken columns are left, side by side."""
    ends = dict(zip(taken, accumulate(stop - start for start, stop in taken), strict=True))
    found = {}
    for number, each in data.items():
        c = each.columns
        end = ends.get((c.start, c.stop))
        found[number] = each if end is None else replace(each, columns=slice(end - (c.stop - c.start), end))
    return found


def _of_columns(rows: Iterator[Tensor], columns: Sequence[slice]) -> Iterator[Tensor]:
    """Some columns of rows, side by side."""
    try:
        for piece in rows:
            yield torch.cat([piece[:, part] for part in columns], dim=1)
    finally:
        if isinstance(rows, Generator):
            leave(rows)
