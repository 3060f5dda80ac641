"""Dictionaries of several hook points of one model, trained side by side on one pass over the text."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from saekit.activations import ShuffledStream
from saekit.errors import SaekitError
from saekit.files import check_free
from saekit.kernels.workspace import Workspace
from saekit.trainers.config import TrainConfig
from saekit.trainers.data import data_of_hooks
from saekit.trainers.lock_step import take_steps
from saekit.trainers.run_folder import CONFIG, Run, check_manner, config_to_resume, finished_run, prepare_folder
from saekit.trainers.trainer import SAMPLE, Trainer, pick_device
from saekit.trainers.variants import VARIANTS

_OWN = {"hook", "out", "width", "k_aux"}  # settings that may differ: where the run is, and what follows from its d_in


def train_hooks(
    config: TrainConfig,
    hooks: Sequence[str] = (),
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
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

    Returns:
        The run of each hook.

    Raises:
        SaekitError: a hook is named twice or not in the model, the activations would come from a cache, the variant
            needs gradients, or what ``train`` raises for.
        Interrupted: by SIGINT or SIGTERM, after the step was finished and every state saved.
    """
    check_manner(resume, overwrite)
    hooks = hooks or (hooks_in(config.out) if resume else ())
    if not hooks:
        raise SaekitError(f"there is no run to resume in '{config.out}'" if resume else "no hook point is named")
    twice = [hook for number, hook in enumerate(hooks) if hook in hooks[:number]]
    if twice:
        raise SaekitError(f"the hook '{twice[0]}' is named twice")
    configs = [config.model_copy(update={"hook": hook, "out": config.out / hook}) for hook in hooks]
    if resume:
        configs = [config_to_resume(each) for each in configs]
        _check_alike(configs, config.out)
    elif (config.out / CONFIG).exists():
        raise SaekitError(f"'{config.out}' is the folder of one run; choose another --out for several hooks")
    else:
        check_free(config.out, overwrite=overwrite, hint="choose another --out, or pass --resume or --overwrite")
    _check_shareable(configs[0])
    runs = [finished_run(each) if resume else None for each in configs]
    trained = iter(_train([each for each, run in zip(configs, runs, strict=True) if run is None], resume, quiet))
    return {hook: run or next(trained) for hook, run in zip(hooks, runs, strict=True)}


def hooks_in(folder: Path) -> list[str]:
    """The hook points whose runs ``train_hooks`` began in a folder."""
    return sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))


def _train(configs: list[TrainConfig], resume: bool, quiet: bool) -> list[Run]:
    """Train what is not finished."""
    if not configs:
        return []
    device = pick_device(configs[0].device)
    data = data_of_hooks(configs[0], [each.hook or "" for each in configs], device)
    stream = ShuffledStream(data[0].rows(), configs[0].batch_size, data[0].buffer, configs[0].seed)
    with closing(stream):
        sample, workspace = stream.peek(SAMPLE), Workspace()
        trainers = [Trainer(*each, sample, device, workspace) for each in zip(configs, data, strict=True)]
        for trainer in trainers:  # all that can be refused has been by now
            if resume:
                trainer.restore()
            else:
                prepare_folder(trainer.config)
        take_steps(trainers, stream, quiet)
    return [trainer.finish() for trainer in trainers]


def _check_shareable(config: TrainConfig) -> None:
    if config.cache is not None:
        raise SaekitError(f"the cache '{config.cache}' has one hook; several are trained on a live harvest, without it")
    if VARIANTS[config.variant].needs_gradients:
        raise SaekitError(f"'{config.variant}' needs gradients, so it is trained one hook at a time, not several")


def _check_alike(configs: list[TrainConfig], folder: Path) -> None:
    first = configs[0].model_dump(exclude=_OWN)
    for each in configs[1:]:
        other = [key for key, value in each.model_dump(exclude=_OWN).items() if value != first[key]]
        if other:
            raise SaekitError(f"the runs in '{folder}' differ in {', '.join(other)}, so they cannot go on together")
