"""Train dictionaries: one, or many on one stream, each as if it were alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from saekit.activations import ActivationCache, ActivationSource, ShuffledStream
from saekit.activations.finite import BadTokens
from saekit.activations.stream import StreamState
from saekit.activations.tee import Tee
from saekit.errors import SaekitError
from saekit.files import check_free, check_space, in_bytes, remove_unfinished
from saekit.kernels.workspace import Workspace
from saekit.machine import pick_device
from saekit.trainers.checkpoint import checkpoints, load_checkpoints
from saekit.trainers.config import TrainConfig
from saekit.trainers.data import TrainingData, opened, origin, shared_data, widths
from saekit.trainers.initial import with_initial_width
from saekit.trainers.loggers import check_installed
from saekit.trainers.loop import Lane, take_steps
from saekit.trainers.memory import Memory, groups_that_fit
from saekit.trainers.plan import PLAN, read_plan, write_plan
from saekit.trainers.run_folder import (
    CHECKPOINTS,
    CONFIG,
    Run,
    check_manner,
    check_new,
    finished_run,
    prepared_folder,
    resumed_folder,
    write_changes,
)
from saekit.trainers.trainer import Trainer, stream_state

SAMPLE = 16_384  # rows of the stream that decide about the units of training


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    trust_remote_code: bool = False,
) -> Run:
    """Train a dictionary and save it.

    The run's folder receives ``config.yaml``, ``metrics.jsonl``, ``checkpoints/``, the dictionary in ``sae/`` and, of
    each feature, ``density``, ``rank``, ``since_fired``, ``smallest_kept`` and tensors of the variant (``budgets``) in
    ``statistics.safetensors``.

    Args:
        config: what to train.
        resume: go on from the newest checkpoint in ``config.out``; a finished run is loaded and returned.
        overwrite: replace a run that ``config.out`` holds.
        quiet: show no progress bar.
        trust_remote_code: whether code that comes with the model may run; no setting of ``config.yaml``, which may
            come from others.

    Raises:
        SaekitError: the config, the data or the folder is not as it must be; or activations or loss are not finite.
        WriteError: the disk is full or not to be written to; the last checkpoint is kept.
        Interrupted: by SIGINT or SIGTERM, after the step was finished and the state saved.
    """
    return train_many([config], resume=resume, overwrite=overwrite, quiet=quiet, trust_remote_code=trust_remote_code)[0]


def train_many(
    configs: Sequence[TrainConfig],
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    trust_remote_code: bool = False,
    home: Path | None = None,
) -> list[Run]:
    """Train several dictionaries, those that can on one pass of the model over the text.

    Each has an ordinary run folder, and is the one that a run of its own would give, bit for bit on the processor; a
    hook inside attention makes the others' differ by rounding, because the model then goes step by step, and a token
    that ``max_norm`` or ``skip_bad_tokens`` leaves out at one hook is left out at all. Runs share rows where all that
    decides about these is the same (``origin``), a cache or a model and its text; the others come one group after the
    other.

    Args:
        configs: what to train, each in a folder of its own.
        resume: go on from the newest checkpoints; finished runs are loaded, or go on where the configs have more
            tokens, and those that have no folder yet begin.
        overwrite: replace runs that the folders hold.
        quiet: show no progress bars.
        trust_remote_code: as for ``train``.
        home: the folder of the runs' folders, where a plan tells them all, so that it can be resumed without naming
            any; none is written if not given.

    Returns:
        The runs, in the order of the configs.

    Raises:
        SaekitError: two have one folder, there is nothing to resume, or what ``train`` raises for.
        Interrupted: by SIGINT or SIGTERM, after the step was finished and every state saved.
    """
    check_manner(resume, overwrite)
    folders = [config.out.resolve() for config in configs]
    twice = [folder for number, folder in enumerate(folders) if folder in folders[:number]]
    if twice:
        raise SaekitError(f"two of the runs would have the folder '{twice[0]}'")
    if home is not None and (home / CONFIG).exists():
        raise SaekitError(f"'{home}' is the folder of one run; choose another --out for several")
    if home is not None and home.is_dir():
        remove_unfinished(home, [PLAN])
    if home is not None and not resume:
        check_free(home, overwrite=overwrite, hint="choose another --out, or pass --resume or --overwrite")
    there = [resume and (config.out / CONFIG).is_file() for config in configs]
    if resume and not any(there) and (home is None or not (home / PLAN).is_file()):
        raise SaekitError(f"there is no run to resume in '{configs[0].out}': {CONFIG} is missing")
    found: dict[int, Run] = {}
    resumed: list[TrainConfig] = []
    groups: dict[tuple[Any, ...], dict[int, TrainConfig]] = {}
    with ExitStack() as stack:
        for number, config in enumerate(configs):
            if there[number]:
                config = stack.enter_context(resumed_folder(config))
                resumed.append(config)
                if (run := finished_run(config)) is not None:
                    found[number] = run
                    continue
            else:
                check_new(config, overwrite=overwrite)
                config = with_initial_width(config)
            check_installed(config.log)
            groups.setdefault(origin(config), {})[number] = config
        for config in resumed:
            write_changes(config, lambda line: None if quiet else print(line, file=sys.stderr))
        plan = dict(zip((folder.name for folder in folders), configs, strict=True))
        write = partial(write_plan, home, plan, resume=resume) if home is not None else lambda: None
        failed: dict[int, SaekitError] = {}
        for group in groups.values():
            numbers, new = list(group), [not there[number] for number in group]
            runs, errors = _together([*group.values()], new, overwrite, quiet, trust_remote_code, write)
            found |= {numbers[m]: run for m, run in runs.items()}
            failed |= {numbers[m]: error for m, error in errors.items()}
    if failed:
        number, error = min(failed.items())
        if len(configs) == 1:
            raise error
        raise SaekitError(f"{len(failed)} of {len(configs)} runs failed, the first in '{configs[number].out}': {error}")
    return [found[number] for number in range(len(configs))]


def train_hooks(
    config: TrainConfig,
    hooks: Sequence[str] = (),
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Run]:
    """``train_many`` at several hook points, each run in ``config.out / hook``.

    Args:
        config: what to train; its ``hook`` is not read, everything else holds for each hook.
        hooks: the hook points; with ``resume``, all in ``config.out`` if none are given.
        resume, overwrite, quiet, trust_remote_code: as for ``train_many``.

    Raises:
        SaekitError: no hook is named, one is named twice, or what ``train_many`` raises for.
        Interrupted: as ``train_many``.
    """
    if twice := [hook for number, hook in enumerate(hooks) if hook in hooks[:number]]:
        raise SaekitError(f"the hook '{twice[0]}' is named twice")
    configs = {hook: config.replace(hook=hook, out=config.out / hook) for hook in hooks}
    if resume and not hooks:
        configs = resumable(config)
    if not configs:
        raise SaekitError(f"there is no run to resume in '{config.out}'" if resume else "no hook point is named")
    manner = {"resume": resume, "overwrite": overwrite, "quiet": quiet, "trust_remote_code": trust_remote_code}
    return dict(zip(configs, train_many([*configs.values()], home=config.out, **manner), strict=True))


def resumable(asked: TrainConfig) -> dict[str, TrainConfig]:
    """The runs that were begun in the folder ``asked.out``, by name, with the settings that are given anew.

    Raises:
        SaekitError: the plan there is damaged, or a run that has no folder yet was begun with other settings.
    """
    home = asked.out
    planned = read_plan(home) if (home / PLAN).is_file() else {}
    names = dict.fromkeys([*planned, *sorted(path.parent.name for path in home.glob(f"*/{CONFIG}"))])
    again = asked.given - {"out", "hook"}
    found = {}
    for name in names:
        if (home / name / CONFIG).is_file():
            found[name] = asked.replace(out=home / name)
            continue
        first = TrainConfig(**planned[name], out=home / name)
        anew = {key: getattr(asked, key) for key in again}
        lasting = first.keys_with("decides") - first.keys_with("resumable")
        if changed := [key for key, value in anew.items() if key in lasting and value != getattr(first, key, None)]:
            raise SaekitError(f"the runs in '{home}' were begun with another {', '.join(changed)}")
        found[name] = first.replace(**anew)
    return found


def by_origin(configs: Iterable[TrainConfig]) -> list[list[TrainConfig]]:
    """The configs in groups that share their rows."""
    groups: dict[tuple[Any, ...], list[TrainConfig]] = {}
    for config in configs:
        groups.setdefault(origin(config), []).append(config)
    return [*groups.values()]


@dataclass
class _Order:
    """Runs that take the same batches from the same step on."""

    members: list[int]
    states: list[dict[str, Any] | None]

    def place(self, data: Sequence[TrainingData]) -> StreamState | None:
        """Where their stream stands: rows that wait for the next fill are put together from their columns."""
        states = {(data[m].columns.start or 0): state for m, state in zip(self.members, self.states, strict=True)}
        return stream_state(*(state for _, state in sorted(states.items(), key=lambda item: item[0])))


def _together(
    configs: list[TrainConfig],
    new: Sequence[bool],
    overwrite: bool,
    quiet: bool,
    trust_remote_code: bool,
    write: Callable[[], object],
) -> tuple[dict[int, Run], dict[int, SaekitError]]:
    """Train runs of one origin: those that were, and why the others were not; ``write`` is called before any begins."""
    device = pick_device(configs[0].device)
    open_source = cache(partial(opened, configs[0], device, trust_remote_code))
    groups = [[0]] if len(configs) == 1 else _told(in_groups(configs, open_source(), device), quiet)
    runs: dict[int, Run] = {}
    errors: dict[int, SaekitError] = {}
    for group in groups:
        with ExitStack() as stack:
            some = [configs[m] for m in group]
            trainers, lanes = stack.enter_context(begun(some, [new[m] for m in group], open_source, device))
            home = configs[0].out if len(configs) == 1 else configs[0].out.parent
            check_space(home, sum(t.checkpoint_bytes for t in trainers.values()), "the run with its checkpoints")
            write()
            for m, trainer in trainers.items():  # all that can be refused has been by now
                if new[group[m]]:
                    stack.enter_context(prepared_folder(trainer.config, overwrite=overwrite))
            failed = take_steps(lanes, quiet)
            for m, trainer in sorted(trainers.items()):
                if trainer in failed:
                    errors[group[m]] = failed[trainer]
                else:
                    runs[group[m]] = trainer.finish()
    return runs, errors


def in_groups(
    configs: list[TrainConfig], source: ActivationSource | ActivationCache, device: torch.device
) -> list[tuple[list[int], Memory]]:
    """The numbers of runs of one origin in groups that memory holds, each of which takes a pass of its own.

    Raises:
        SaekitError: a run asks for more features a token than its width has.
    """
    found = widths(list(dict.fromkeys(config.hook for config in configs)), source)
    return groups_that_fit(configs, [found[config.hook] for config in configs], device)


def _told(groups: Sequence[tuple[list[int], Memory]], quiet: bool) -> list[list[int]]:
    """The groups, and a line for the user of what they take."""
    runs, most = sum(len(group) for group, _ in groups), max(memory.total for _, memory in groups)
    how = "at once" if len(groups) == 1 else f"in {len(groups)} groups, each with a pass of its own over the data"
    if not quiet:
        print(f"{runs} runs {how}: {in_bytes(most)} beside the model", file=sys.stderr)
    return [group for group, _ in groups]


@contextmanager
def begun(
    configs: list[TrainConfig],
    new: Sequence[bool],
    source: Callable[[], ActivationSource | ActivationCache],
    device: torch.device,
) -> Iterator[tuple[dict[int, Trainer], list[Lane]]]:
    """The trainers of runs of one origin by number, and in lanes; their streams run while it is entered.

    The source is opened when checkpoints have been read: a damaged one is told before a model is loaded.
    """
    orders = _orders(configs, new, device)
    states = {m: state for order in orders for m, state in zip(order.members, order.states, strict=True)}
    before = [state and state["provenance"] for _, state in sorted(states.items())]
    data = shared_data(configs, source(), before)
    workspace, trainers, lanes = Workspace(), {}, []
    with _streams(configs, data, orders) as streams:
        for order, stream, own in streams:
            sample = stream.peek(SAMPLE) if order.states[0] is None else None
            for m in order.members:
                trainers[m] = Trainer(configs[m], own[m], sample, device, workspace, states.pop(m))
            lanes.append(Lane(stream, [trainers[m] for m in order.members]))
            order.states.clear()  # as large as the runs themselves
        yield trainers, lanes


def _orders(configs: list[TrainConfig], new: Sequence[bool], device: torch.device) -> list[_Order]:
    """The runs by the order of their rows and the step from which they go on.

    Runs that were killed while they saved go on from the newest step that all of them have; one that was added later
    begins, and catches up.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for number, config in enumerate(configs):
        alike.setdefault(config.order, []).append(number)
    orders = []
    for members in alike.values():
        saved = {m: set() if new[m] else set(checkpoints(configs[m].out / CHECKPOINTS)) for m in members}
        while saved:
            step = min(max(steps, default=0) for steps in saved.values())
            joined = [m for m, steps in saved.items() if step in steps or not (step or steps)]
            folders = [configs[m].out / CHECKPOINTS for m in joined if not new[m]]
            found = load_checkpoints(folders, device) if folders else None
            orders.append(_Order(joined, list(found[1]) if found else [None] * len(joined)))
            saved = {m: steps for m, steps in saved.items() if m not in joined}
    return orders


@contextmanager
def _streams(
    configs: list[TrainConfig], data: list[TrainingData], orders: list[_Order]
) -> Iterator[list[tuple[_Order, ShuffledStream, dict[int, TrainingData]]]]:
    """The stream of each order, and the data of its members: their columns of it, and what is left out of it."""
    places = [order.place(data) for order in orders]
    tee = None
    if configs[0].cache is None and len(orders) > 1:
        starts = [place or StreamState() for place in places]
        data[0].bad.count = min(starts, key=lambda place: place.pieces).skipped
        # No stream is asked for more than a look ahead and a fill before the others are, and it reads up to three fills
        # ahead of what it is asked for; within this window none waits for one that nobody asks.
        window = SAMPLE + 6 * max(
            max(each.buffer, config.batch_size) for each, config in zip(data, configs, strict=True)
        )
        tee = Tee(data[0].rows, [place.pieces for place in starts], window, data[0].bad)
    found = []
    with ExitStack() as stack:
        for number, (order, place) in enumerate(zip(orders, places, strict=True)):
            lead = data[order.members[0]]
            own = {m: replace(data[m], bad=lead.bad) for m in order.members}
            rows = None
            if tee is not None:
                bad = BadTokens(lead.bad.skip, limits=lead.bad.limits)
                taken = sorted({(c.start, c.stop) for m in order.members if (c := data[m].columns).stop is not None})
                ends = dict(zip(taken, accumulate(stop - start for start, stop in taken), strict=True))
                for m in order.members:
                    c = data[m].columns
                    end = ends.get((c.start, c.stop))
                    narrow = c if end is None else slice(end - (c.stop - c.start), end)
                    own[m] = replace(data[m], bad=bad, columns=narrow)
                rows = tee.reader(number, bad, [slice(*each) for each in taken])
            member = order.members[0]
            stream = stack.enter_context(closing(own[member].stream(configs[member], place, rows)))
            if tee is not None:
                stack.callback(tee.close)  # first of all, so that no stream waits for another
            found.append((order, stream, own))
        yield found
