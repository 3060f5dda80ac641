"""``saekit train``: train a dictionary and evaluate it."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from saekit.commands.evaluating import evaluated, open_evaluator
from saekit.commands.help import among
from saekit.commands.report import SHOWN, report_on_run
from saekit.errors import SaekitError

_AGAIN = {"hook": "; give it again for a dictionary at each", "log": "; give it again for both"}


def add_flags() -> None:
    """Give ``train`` one flag for each field of TrainConfig, so that names, types and help stand in one place.

    This imports torch, so it is done for those alone who train or ask how to.
    """
    from saekit.trainers.config import TrainConfig, choices

    kinds: dict[Any, Any] = {int: int, float: float, int | None: int, float | None: float, bool: bool}
    flags = []
    for name, field in TrainConfig.model_fields.items():
        given = field.default_factory is None and field.default is not None and field.default is not False
        default = f" [default: {field.default}]" if given else ""
        again = _AGAIN.get(name, "")
        values = among(*known) if (known := choices(name)) else None
        option = typer.Option(help=f"{field.description}{default}{again}", show_default=False, autocompletion=values)
        kind: Any = Annotated[(list[str] if name in _AGAIN else kinds.get(field.annotation, str)) | None, option]
        flags.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))
    _show([*flags, *_OWN])


def _show(parameters: list[inspect.Parameter]) -> None:
    """Let Typer see these parameters of ``train``."""
    train.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    train.__annotations__ = {p.name: p.annotation for p in parameters}


def train(
    *,
    config: Path | None = typer.Option(None, help="YAML file of settings; flags win over it"),
    resume: bool = typer.Option(False, help="go on with the run in --out"),
    overwrite: bool = typer.Option(False, help="replace the run in --out"),
    eval_tokens: int = typer.Option(131_072, min=0, help="held-out tokens to evaluate on at the end; 0 for none"),
    features_shown: int = typer.Option(SHOWN, min=0, help="features with a page in report.html, spread over densities"),
    trust_remote_code: bool = typer.Option(False, help="let code run that comes with the model"),
    quiet: bool = typer.Option(False, help="no progress bar"),
    **flags: Any,
) -> None:
    """Train a dictionary, evaluate it on held-out text, and save both in the run's folder.

    With no model and no dataset named, the embedded ones are used.
    """
    from saekit.evals.report import groups_in
    from saekit.interrupt import Interrupted
    from saekit.trainers import TrainConfig, train_hooks
    from saekit.trainers import train as run_training
    from saekit.trainers.multi_hook import hooks_in
    from saekit.trainers.run_folder import REPORT

    hooks = flags.pop("hook") or []
    flags["log"] = flags["log"] or None
    if None not in (flags["width"], flags["expansion"]):
        raise SaekitError("--width and --expansion both say how wide the dictionary is; give one of them")
    if resume and config is None and flags["out"] is not None:
        started = Path(flags["out"]) / "config.yaml"
        config = started if started.is_file() else None
    settings = TrainConfig.from_yaml(config, hook=hooks[0] if len(hooks) == 1 else None, **flags)
    home = settings.out
    several = len(hooks) > 1 or (resume and not (home / "config.yaml").is_file() and bool(hooks_in(home)))
    finished = {path.parents[1] for place in ("sae", "*/sae") for path in home.glob(f"{place}/cfg.json") if resume}
    for file in (*home.glob("eval.json"), *home.glob("*/eval.json")) if resume else ():
        groups_in(file)  # better refused now than when all is done
    manner = {"resume": resume, "overwrite": overwrite, "quiet": quiet, "trust_remote_code": trust_remote_code}
    try:
        runs = [*train_hooks(settings, hooks, **manner).values()] if several else [run_training(settings, **manner)]
    except Interrupted as stop:
        print(f"\nsaekit: stopped; go on with: saekit train --out {home} --resume", file=sys.stderr)
        sys.exit(stop.code)
    for run in runs:
        if run.path in finished:
            print(f"the run in {run.path} was finished already")
    evaluator = None
    if eval_tokens:
        evaluator = open_evaluator(
            device=runs[0].config.device, tokens=eval_tokens, trust_remote_code=trust_remote_code
        )
    unevaluated = [run.path for run in runs if evaluator and "sparsity" not in groups_in(run.path / "eval.json")]
    if evaluator is not None and unevaluated:
        for path, report in evaluated(evaluator, unevaluated, quiet).items():
            report.join(Path(path) / "eval.json")
    for run in runs:
        print(f"run: {run.path}    dictionary: {run.path / 'sae'}")
    if runs[0].sae.cfg.affinity_scale != "none":
        one = runs[0].path if len(runs) == 1 else "RUN"
        print(
            f"its thresholds follow each token's norm, which SAELens cannot read; for the nearest plain ones:\n"
            f"  saekit convert {one} FOLDER --to saelens --lossy"
        )
    for run in runs:  # last: whatever goes wrong here, the run is whole, and --resume draws the report again
        if run.path in unevaluated or not (run.path / REPORT).exists():
            report_on_run(run.path, evaluator, features_shown, quiet)


_OWN = [p for p in inspect.signature(train).parameters.values() if p.kind is not p.VAR_KEYWORD]
_show(_OWN)
