"""The folder of a run: what lies in it, how it is begun and found again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from saekit.errors import SaekitError
from saekit.files import replace_file, writable_folder
from saekit.sae import SparseAutoencoder
from saekit.trainers.checkpoint import checkpoints
from saekit.trainers.config import TrainConfig

CONFIG, METRICS, CHECKPOINTS, DICTIONARY = "config.yaml", "metrics.jsonl", "checkpoints", "sae"
STATISTICS, EVALUATION = "statistics.safetensors", "eval.json"


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
    """The run in ``config.out``, if it is finished."""
    import saekit

    if not (config.out / DICTIONARY / "cfg.json").exists():
        return None
    return Run(saekit.load(config.out), config.out, config)


def config_to_resume(config: TrainConfig) -> TrainConfig:
    """The config that a run was started with; whatever was set anew must equal it.

    Raises:
        SaekitError: it does not, or there is no run in ``config.out``.
    """
    written = config.out / CONFIG
    if not written.is_file():
        raise SaekitError(f"there is no run to resume in '{config.out}': {CONFIG} is missing")
    before = TrainConfig.from_yaml(written)
    asked = {key: getattr(config, key) for key in TrainConfig.model_fields if key in config.model_fields_set - {"out"}}
    changed = [key for key, value in asked.items() if value is not None and value != getattr(before, key)]
    if changed:
        raise SaekitError(f"the run in '{config.out}' was started with another {', '.join(changed)}")
    return before.model_copy(update={"out": config.out})


def prepare_folder(config: TrainConfig) -> None:
    """Make the run's folder; what an earlier run left there goes."""
    writable_folder(config.out, overwrite=True)
    old = [*(config.out / name for name in (METRICS, STATISTICS, EVALUATION)), *checkpoints(config.out / CHECKPOINTS)]
    for path in [*old, *(config.out / DICTIONARY).glob("*")]:
        if path.is_file():
            path.unlink()
    replace_file(config.out / CONFIG, lambda path: path.write_text(config.to_yaml()))
