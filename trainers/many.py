"""Train dictionaries: one, or many on one stream, each as if it were alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any

from saekit.errors import SaekitError
from saekit.files import check_free, check_space, in_bytes, remove_unfinished
from saekit.machine import pick_device
from saekit.ranks import Ranks, ToldError, agreeing, current
from saekit.trainers.config import TrainConfig
from saekit.trainers.data import opened, origin
from saekit.trainers.initial import with_initial_width
from saekit.trainers.lanes import begun, in_groups
from saekit.trainers.loggers import check_installed
from saekit.trainers.loop import take_steps
from saekit.trainers.memory import Memory
from saekit.trainers.plan import PLAN, read_plan, write_plan
from saekit.trainers.run_folder import (
    CONFIG,
    DICTIONARY,
    Run,
    check_manner,
    check_new,
    finished_run,
    prepared_folder,
    resumed_folder,
    write_changes,
)


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
    ranks = current()
    _check_alike(configs, ranks)
    with agreeing(ranks):
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
    found, own, resumed = {}, {}, []
    quiet = quiet or not ranks.leads
    failed: dict[int, SaekitError] = {}
    with ExitStack() as stack:
        with agreeing(ranks):
            for number in _mine(configs, resume, ranks):
                config = configs[number]
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
                own[number] = config
        for config in resumed:
            write_changes(config, lambda line: None if quiet else print(line, file=sys.stderr))
        plan = dict(zip((folder.name for folder in folders), configs, strict=True))

        def write() -> None:
            if home is not None and ranks.leads:
                write_plan(home, plan, resume=resume)

        if ranks.world > 1:  # before any process makes a folder
            with agreeing(ranks):
                write()
        for group in by_origin(_of_all(own, ranks)):
            runs, errors = _together(group, own.keys(), there, overwrite, quiet, trust_remote_code, write)
            found, failed = found | runs, failed | errors
    every = ranks.told({str(number): str(error) for number, error in failed.items()})
    if errors_of_all := {int(number): text for each in every for number, text in each.items()}:
        number = min(errors_of_all)
        error = failed.get(number) or ToldError(errors_of_all[number])
        if len(configs) == 1:
            raise error
        told = f"{len(errors_of_all)} of {len(configs)} runs failed, the first in '{configs[number].out}': {error}"
        raise (SaekitError if ranks.leads else ToldError)(told)
    return [found[number] if number in found else _of_another(each) for number, each in enumerate(configs)]


def _check_alike(configs: Sequence[TrainConfig], ranks: Ranks) -> None:
    """Raise ToldError where processes were asked for different runs."""
    told = ranks.told([config.to_dict() for config in configs])
    for rank, others in enumerate(told):
        if len(others) != len(told[0]):
            raise ToldError(f"process {rank} was asked for {len(others)} runs, process 0 for {len(told[0])}")
        for first, other in zip(told[0], others, strict=True):
            if changed := [key for key in first if first[key] != other.get(key)]:
                raise ToldError(f"process {rank} was started with another {', '.join(changed)} than process 0")


def _mine(configs: Sequence[TrainConfig], resume: bool, ranks: Ranks) -> list[int]:
    """The numbers of the runs that this process trains; those that are still to be trained are shared out evenly."""
    there = [resume and (config.out / DICTIONARY).exists() for config in configs]
    return sorted(range(len(configs)), key=there.__getitem__)[ranks.rank :: ranks.world]


def _of_all(own: Mapping[int, TrainConfig], ranks: Ranks) -> dict[int, TrainConfig]:
    """The runs of all processes, by their numbers, as each knows its own."""
    told = ranks.told({str(number): config.to_dict() for number, config in own.items()}) if ranks.world > 1 else []
    others = {int(number): TrainConfig(**values) for each in told for number, values in each.items()}
    return dict(sorted({**others, **own}.items()))


def _of_another(config: TrainConfig) -> Run:
    """A run that another process has trained."""
    run = finished_run(TrainConfig.from_yaml(config.out / CONFIG, of_a_run=True).replace(out=config.out))
    assert run is not None
    return run


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


def by_origin(configs: Mapping[int, TrainConfig]) -> list[dict[int, TrainConfig]]:
    """The configs in groups that share their rows."""
    groups: dict[tuple[Any, ...], dict[int, TrainConfig]] = {}
    for number, config in configs.items():
        groups.setdefault(origin(config), {})[number] = config
    return [*groups.values()]


def _together(
    configs: Mapping[int, TrainConfig],
    own: Container[int],
    there: Sequence[bool],
    overwrite: bool,
    quiet: bool,
    trust_remote_code: bool,
    write: Callable[[], object],
) -> tuple[dict[int, Run], dict[int, SaekitError]]:
    """Train runs of one origin: those that were, and why the others were not; ``write`` is called before any begins.

    Several processes share a live harvest: each takes part in it as long as any needs rows, runs of its own or not.
    """
    ranks, first = current(), next(iter(configs.values()))
    mine = {number: config for number, config in configs.items() if number in own}
    device = pick_device(first.device)
    open_source = cache(partial(opened, first, device, trust_remote_code))
    groups = [[number] for number in mine] if len(mine) < 2 else _told(in_groups(mine, open_source(), device), quiet)
    spreads = ranks.world > 1 and first.cache is None
    passes = max(ranks.told(len(groups))) if spreads else len(groups)
    runs: dict[int, Run] = {}
    errors: dict[int, SaekitError] = {}
    for group in [*groups, *[[]] * (passes - len(groups))]:
        with ExitStack() as stack:
            some = configs if spreads else {number: mine[number] for number in group}
            with begun(some, group, there, open_source, device) as (trainers, lanes):
                home = first.out if len(configs) == 1 else first.out.parent
                check_space(home, sum(t.checkpoint_bytes for t in trainers.values()), "the run with its checkpoints")
                write()
                for number, trainer in trainers.items():  # all that can be refused has been by now
                    if not there[number]:
                        stack.enter_context(prepared_folder(trainer.config, overwrite=overwrite))
                failed = take_steps(lanes, quiet or not group)
            for number, trainer in sorted(trainers.items()):
                if trainer in failed:
                    errors[number] = failed[trainer]
                else:
                    runs[number] = trainer.finish()
    return runs, errors


def _told(groups: Sequence[tuple[list[int], Memory]], quiet: bool) -> list[list[int]]:
    """The groups, and a line for the user of what they take."""
    runs, most = sum(len(group) for group, _ in groups), max(memory.total for _, memory in groups)
    how = "at once" if len(groups) == 1 else f"in {len(groups)} groups, each with a pass of its own over the data"
    if not quiet:
        print(f"{runs} runs {how}: {in_bytes(most)} beside the model", file=sys.stderr)
    return [group for group, _ in groups]
