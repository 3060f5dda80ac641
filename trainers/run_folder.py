"""The folder of a run: what lies in it, how it is begun and found again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from saekit.errors import SaekitError
from saekit.files import (
    PART,
    check_free,
    check_writable,
    locked,
    remove_unfinished,
    replace_file,
    writable_folder,
)
from saekit.loading import load
from saekit.sae import SparseAutoencoder
from saekit.trainers.checkpoint import checkpoints
from saekit.trainers.config import TrainConfig
from saekit.trainers.loggers import files_of_loggers

CONFIG, METRICS, CHECKPOINTS, DICTIONARY = "config.yaml", "metrics.jsonl", "checkpoints", "sae"
STATISTICS, EVALUATION, REPORT = "statistics.safetensors", "eval.json", "report.html"


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        sae: the dictionary, in evaluation mode, for raw activations.
        path: the run's folder.
        config: what was asked, defaults filled in.
    """

    sae: SparseAutoencoder
    path: Path
    config: TrainConfig


def check_manner(resume: bool, overwrite: bool) -> None:
    """Raise SaekitError where a run is to be both resumed and overwritten."""
    if resume and overwrite:
        raise SaekitError("a run is either resumed or overwritten, not both")


def finished_run(config: TrainConfig) -> Run | None:
    """The run in ``config.out``, if it is finished.

    Raises:
        SaekitError: its dictionary is damaged.
    """
    if not (config.out / DICTIONARY / "cfg.json").exists():
        return None
    try:
        run = Run(load(config.out), config.out, config)
        return run if _trained_on(run) in (None, config.steps * config.batch_size) else None  # it goes on with more
    except SaekitError as error:
        again = config.steps in checkpoints(config.out / CHECKPOINTS)
        hint = f"; without the folder '{config.out / DICTIONARY}', --resume makes it again" if again else ""
        raise SaekitError(f"{error}{hint}") from None


def _trained_on(run: Run) -> int | None:
    """Tokens that the dictionary of a run was trained on, where it tells them."""
    own = run.sae.cfg.metadata.get("saekit")
    tokens = own.get("training_tokens") if isinstance(own, dict) else None
    return tokens if isinstance(tokens, int) else None


@contextmanager
def resumed_folder(config: TrainConfig) -> Iterator[TrainConfig]:
    """The config that a run was started with, whose folder no other process uses while this is entered.

    Whatever was set anew must equal it, but for what may change (``write_changes``) and for more tokens where the run
    is finished. Temporary files that a killed process left are deleted.

    Raises:
        SaekitError: it does not, the run that is to have more tokens is not finished, there is no run in
            ``config.out``, or another process trains there.
    """
    if not (config.out / CONFIG).is_file():
        raise SaekitError(f"there is no run to resume in '{config.out}': {CONFIG} is missing")
    with locked(config.out, "training"):
        check_writable(config.out)
        yield _config_to_resume(config)


def _config_to_resume(config: TrainConfig) -> TrainConfig:
    written = config.out / CONFIG
    before = TrainConfig.from_yaml(written, of_a_run=True)
    asked = {key: getattr(config, key) for key in config.given - {"out"}}
    changed = [key for key, value in asked.items() if value is not None and value != getattr(before, key, None)]
    more = "tokens" in changed and config.tokens > before.tokens
    free = before.keys_with("resumable") | ({"tokens"} if more else set())
    if lasting := [key for key in before.to_dict() if key in set(changed) - free]:
        told = ", ".join(f"{key} = {getattr(before, key)}, not {asked[key]}" for key in lasting)
        raise SaekitError(f"the run in '{config.out}' was started with {told}")
    if more and finished_run(before.replace(out=config.out)) is None:
        told = f"the run in '{config.out}' has not come to its {before.tokens:,} tokens"
        raise SaekitError(f"{told}; --resume without --tokens goes on with it, and more can follow")
    remove_unfinished(config.out, [CONFIG, METRICS, STATISTICS, EVALUATION, REPORT, f"{DICTIONARY}/*"])
    return before.replace(**{key: asked[key] for key in changed}, out=config.out)


def write_changes(config: TrainConfig, tell: Callable[[str], object]) -> None:
    """Let ``config.yaml`` tell what was set anew of a run that goes on; more tokens are told the user."""
    written = config.out / CONFIG
    before = TrainConfig.from_yaml(written, of_a_run=True)
    if (new := config.replace(out=before.out)) != before:
        replace_file(written, lambda path: path.write_text(new.to_yaml()))
    if config.tokens > before.tokens:
        tell(
            f"'{config.out}' goes on from {before.tokens:,} to {config.tokens:,} tokens; the learning rate is that of "
            f"a run of so many: it rises again, and the end of the schedule is taken once more"
        )


def begin_replacing(out: Path) -> None:
    """Take away what tells of a dictionary that a longer run is about to replace."""
    for name in (EVALUATION, REPORT) if (out / DICTIONARY / "cfg.json").exists() else ():
        (out / name).unlink(missing_ok=True)


def check_new(config: TrainConfig, *, overwrite: bool) -> None:
    """Raise SaekitError where a run cannot begin in ``config.out``."""
    if config.out.is_dir() and {path.name for path in config.out.iterdir()} <= {CONFIG + PART}:
        remove_unfinished(config.out, [CONFIG])  # of a start that was killed at once
    check_free(config.out, overwrite=overwrite, hint="choose another --out, or pass --resume or --overwrite")
    check_writable(config.out)


@contextmanager
def prepared_folder(config: TrainConfig, *, overwrite: bool) -> Iterator[None]:
    """Make the run's folder, which no other process uses while it is entered; what an earlier run left there goes.

    Raises:
        SaekitError: another process trains there, or something is there without ``overwrite``.
    """
    writable_folder(config.out, overwrite=True)
    with locked(config.out, "training"):
        check_free(config.out, overwrite=overwrite)  # another process may have come first
        _prepare(config)
        yield


def _prepare(config: TrainConfig) -> None:
    old = [
        *(config.out / name for name in (CONFIG, METRICS, STATISTICS, EVALUATION, REPORT))
    ]  # from here on, it is no run
    old += (config.out / CHECKPOINTS).glob("step-*")
    remove_unfinished(config.out, [STATISTICS, f"{CHECKPOINTS}/*", f"{DICTIONARY}/*"])
    for path in [*old, *files_of_loggers(config.out), *(config.out / DICTIONARY).glob("*")]:
        if path.is_file():
            path.unlink()
    replace_file(config.out / CONFIG, lambda path: path.write_text(config.to_yaml()))
