"""Dictionaries of several hook points of one model, trained side by side on one pass over the text."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import yaml

from saekit.errors import SaekitError
from saekit.files import replace_file, writable_folder
from saekit.kernels.workspace import Workspace
from saekit.machine import pick_device
from saekit.reading import read_yaml
from saekit.trainers.checkpoint import load_checkpoints
from saekit.trainers.config import TrainConfig
from saekit.trainers.data import data_of_hooks
from saekit.trainers.loggers import check_installed
from saekit.trainers.loop import take_steps
from saekit.trainers.run import SAMPLE, check_room
from saekit.trainers.run_folder import (
    CHECKPOINTS,
    CONFIG,
    PENDING,
    Run,
    check_manner,
    check_new,
    finished_run,
    prepared_folder,
    resumed_folder,
)
from saekit.trainers.trainer import Trainer, stream_state
from saekit.trainers.variants import VARIANTS


def train_hooks(
    config: TrainConfig,
    hooks: Sequence[str] = (),
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Run]:
    """Train one dictionary at each of several hook points of a model that goes over the text once.

    Each hook has an ordinary run folder, ``config.out / hook``, and the dictionary is the one that a run of its own
    would give, bit for bit on the processor; a hook inside attention makes the others' differ by rounding, because the
    model then goes step by step. The shuffling buffer holds all hooks, so its memory grows with their number.

    Args:
        config: what to train; its ``hook`` is not read, everything else holds for each hook.
        hooks: the hook points; with ``resume``, all in ``config.out`` if none are given.
        resume: go on from the newest checkpoint of each; finished ones are loaded.
        overwrite: replace runs of these hooks that ``config.out`` holds.
        quiet: show no progress bars.
        trust_remote_code: as for ``train``.

    Returns:
        The run of each hook.

    Raises:
        SaekitError: a hook is named twice or not in the model, the activations would come from a cache, the variant
            needs gradients, or what ``train`` raises for.
        Interrupted: by SIGINT or SIGTERM, after the step was finished and every state saved.
    """
    check_manner(resume, overwrite)
    if resume and (config.out / PENDING).is_file():  # it was killed before all folders were made: no step is lost
        begun, all_hooks = _read_begun(config.out)
        asked = config.to_dict(config.given - {"out", "hook"})
        told = begun.to_dict()
        changed = [key for key, value in asked.items() if value is not None and value != told.get(key)]
        lasting = [key for key in changed if key not in begun.keys_with("resumable")]
        if lasting or (hooks and list(hooks) != all_hooks):
            raise SaekitError(f"the runs in '{config.out}' were begun with another {', '.join(lasting) or 'hook'}")
        begun = begun.replace(**{key: getattr(config, key) for key in changed})
        return train_hooks(begun, all_hooks, overwrite=True, quiet=quiet, trust_remote_code=trust_remote_code)
    hooks = hooks or (hooks_in(config.out) if resume else ())
    if not hooks:
        raise SaekitError(f"there is no run to resume in '{config.out}'" if resume else "no hook point is named")
    twice = [hook for number, hook in enumerate(hooks) if hook in hooks[:number]]
    if twice:
        raise SaekitError(f"the hook '{twice[0]}' is named twice")
    configs = [config.replace(hook=hook, out=config.out / hook) for hook in hooks]
    with ExitStack() as stack:
        if resume:
            configs = [stack.enter_context(resumed_folder(each)) for each in configs]
            _check_alike(configs, config.out)
        elif (config.out / CONFIG).exists():
            raise SaekitError(f"'{config.out}' is the folder of one run; choose another --out for several hooks")
        else:
            check_new(config, overwrite=overwrite)
        _check_shareable(configs[0])
        runs = [finished_run(each) if resume else None for each in configs]
        unfinished = [each for each, run in zip(configs, runs, strict=True) if run is None]
        trained = iter(_train(unfinished, config.out, resume, overwrite, quiet, trust_remote_code))
    return {hook: run or next(trained) for hook, run in zip(hooks, runs, strict=True)}


def hooks_in(folder: Path) -> list[str]:
    """The hook points whose runs ``train_hooks`` began in a folder."""
    begun = _read_begun(folder)[1] if (folder / PENDING).is_file() else []
    return sorted({path.parent.name for path in folder.glob(f"*/{CONFIG}")} | set(begun))


def _train(
    configs: list[TrainConfig], home: Path, resume: bool, overwrite: bool, quiet: bool, trust_remote_code: bool
) -> list[Run]:
    """Train what is not finished."""
    if not configs:
        return []
    check_installed(configs[0].log)
    device = pick_device(configs[0].device)
    with ExitStack() as stack:
        found = load_checkpoints([config.out / CHECKPOINTS for config in configs], device) if resume else None
        states = found[1] if found else [None] * len(configs)
        hooks = [each.hook or "" for each in configs]
        before = [state and state["provenance"] for state in states]
        data = data_of_hooks(configs[0], hooks, device, trust_remote_code, before)
        stream = stack.enter_context(closing(data[0].stream(configs[0], stream_state(*states))))
        sample, workspace = stream.peek(SAMPLE) if found is None else None, Workspace()
        trainers = [
            Trainer(config, each, sample, device, workspace, state)
            for config, each, state in zip(configs, data, states, strict=True)
        ]  # all that can be refused has been by now
        del found, states  # as large as the runs themselves
        check_room(trainers, home)
        if not resume:
            _write_begun(home, configs)
            try:
                for trainer in trainers:
                    stack.enter_context(prepared_folder(trainer.config, overwrite=overwrite))
            except SaekitError:  # another process is there: nothing of ours has begun
                (home / PENDING).unlink()
                raise
            (home / PENDING).unlink()
        take_steps(trainers, stream, quiet)
        return [trainer.finish() for trainer in trainers]


def _write_begun(home: Path, configs: list[TrainConfig]) -> None:
    """Write down what all runs are, as long as not each of them has a folder that tells it."""
    writable_folder(home, overwrite=True)
    settings = configs[0].to_dict(configs[0].given - {"hook", "out"})
    text = yaml.safe_dump({"hooks": [config.hook for config in configs], "settings": settings}, sort_keys=False)
    replace_file(home / PENDING, lambda path: path.write_text(text))


def _read_begun(home: Path) -> tuple[TrainConfig, list[str]]:
    """What ``_write_begun`` wrote."""
    found = read_yaml(home / PENDING)
    hooks, settings = found.get("hooks"), found.get("settings")
    names = isinstance(hooks, list) and all(isinstance(hook, str) for hook in hooks)
    try:
        if not names or not isinstance(settings, dict) or settings.keys() & {"hook", "out"}:
            raise SaekitError("it names no hooks or no settings")
        return TrainConfig(**settings, out=home), list(hooks or ())
    except (SaekitError, TypeError):
        raise SaekitError(f"'{home / PENDING}' is damaged; --overwrite begins anew") from None


def _check_shareable(config: TrainConfig) -> None:
    if config.cache is not None:
        raise SaekitError(f"the cache '{config.cache}' has one hook; several are trained on a live harvest, without it")
    if VARIANTS[config.variant].needs_gradients(config):
        raise SaekitError(f"'{config.variant}' needs gradients, so it is trained one hook at a time, not several")


def _check_alike(configs: list[TrainConfig], folder: Path) -> None:
    first, own = configs[0].to_dict(), configs[0].keys_with("own")
    for each in configs[1:]:
        other = [key for key, value in each.to_dict().items() if key not in own and value != first.get(key)]
        if other:
            raise SaekitError(f"the runs in '{folder}' differ in {', '.join(other)}, so they cannot go on together")
