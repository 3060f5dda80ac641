"""``saekit train``: train a dictionary and evaluate it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from saekit.activations.settings import SourceSettings
from saekit.commands.evaluating import evaluated, open_evaluator, show
from saekit.commands.flags import flag, flags, joined, named_flag, panel_of, takes_several, values_of, with_flags
from saekit.commands.report import SHOWN, report_on_run
from saekit.errors import SaekitError
from saekit.trainers.auxiliary_losses import AUXILIARY
from saekit.trainers.config import OLD_NAMES, PARTS, TrainConfig, settings_in, variants_with
from saekit.trainers.variants import VARIANTS

_AGAIN = {"hook": "; commas and * for a dictionary at each", "log": "; give it again for both"}
_OF_THE_MODEL = ("model_dtype", "model_quantization", "model_device", "model_device_map")
_PANELS = {"source": "Data", "data": "Data", "dictionary": "Dictionary", "optimizer": "Optimisation", "run": "Run"}


def train_flags() -> list[inspect.Parameter]:
    """One flag for each setting of each part, of all variants and auxiliary losses too."""
    names = [
        named_flag("variant", "allocation rule", VARIANTS, "mutual_choice", "Dictionary"),
        named_flag("aux", "auxiliary loss", AUXILIARY, "none", "Dictionary"),
    ]
    own = [
        flag(key, field, "Dictionary", of=owners if len(owners) < len(VARIANTS) / 2 else (), several=True)
        for key, (field, owners) in variants_with().items()
    ]
    old = {new: before for before, new in OLD_NAMES.items()}
    parts = [
        each
        for part, kind in PARTS.items()
        for each in flags(kind, _PANELS[part], repeated=_AGAIN, old=old, several=True)
    ]
    order = ("Data", "Dictionary", "Optimisation", "Run")
    return sorted([*names, *own, *parts], key=lambda each: order.index(panel_of(each)))


def train(
    *,
    config: Path | None = typer.Option(None, help="YAML file of settings; flags win over it"),
    resume: bool = typer.Option(False, help="go on with the run in --out; with more --tokens, with a finished one"),
    overwrite: bool = typer.Option(False, help="replace the run in --out"),
    dry_run: bool = typer.Option(False, help="train nothing; say which runs there would be, their memory and time"),
    eval_tokens: int = typer.Option(131_072, min=0, help="held-out tokens to evaluate on at the end; 0 for none"),
    features_shown: int = typer.Option(SHOWN, min=0, help="features with a page in report.html, spread over densities"),
    trust_remote_code: bool = typer.Option(False, help="let code run that comes with the model"),
    quiet: bool = typer.Option(False, help="no progress bar"),
    **flags: Any,
) -> None:
    """Train a dictionary, evaluate it on held-out text, and save both in the run's folder.

    With no model and no dataset named, the embedded ones are used. Several values with commas between them, as in
    --k 16,32 --seed 0,1, train a dictionary for each combination, in a folder of its own below --out.
    """
    from saekit.evals.report import groups_in, report_in
    from saekit.interrupt import Interrupted
    from saekit.ranks import agreeing, current, restarted
    from saekit.trainers import train_many
    from saekit.trainers.many import resumable
    from saekit.trainers.plan import combined
    from saekit.trainers.run_folder import REPORT

    fields = {key: field for kind in PARTS.values() for key, field in kind.model_fields.items()}
    fields |= {key: field for key, (field, _) in variants_with().items()}
    flags = joined(flags, SourceSettings)
    single = {key for key, field in fields.items() if not takes_several(key, field)}
    flags = {key: value if key in single else values_of(key, value, fields.get(key)) for key, value in flags.items()}
    flags["log"] = flags["log"] or None
    ranks = current()
    quiet = quiet or not ranks.leads
    if restarted():
        resume, overwrite = _begun(flags["out"]), False
    with agreeing(ranks):
        if None not in (flags["width"], flags["expansion"]):
            raise SaekitError("--width and --expansion both say how wide the dictionary is; give one of them")
        started = Path(flags["out"]) / "config.yaml" if resume and flags["out"] is not None else None
        if started is not None and config is None and started.is_file():
            config = started
        values = settings_in(config, of_a_run=config == started, **flags)
        if "*" in str(values.get("hook")):
            values["hook"] = _hooks(values, trust_remote_code)
        runs_asked = combined(values)
        if list(runs_asked) == [""]:
            asked = TrainConfig(**runs_asked[""])
            begun = resumable(asked) if resume and not (asked.out / "config.yaml").is_file() else {}
            home, alone, configs = asked.out, not begun, [*begun.values()] or [asked]
        else:
            place = Path(values.get("out") or "runs/sweep")
            configs = [TrainConfig(**{**each, "out": place / name}) for name, each in runs_asked.items()]
            home, alone = configs[0].out.parent, False
    if dry_run:
        from saekit.trainers.estimate import estimate, told

        print(*told(estimate(configs, trust_remote_code=trust_remote_code)), sep="\n")
        return
    there = [path for place in ("sae", "*/sae") for path in home.glob(f"{place}/cfg.json") if resume]
    written = {path: path.stat().st_mtime_ns for path in there}
    for file in (*home.glob("eval.json"), *home.glob("*/eval.json")) if resume else ():
        groups_in(file)  # better refused now than when all is done
    manner = {"resume": resume, "overwrite": overwrite, "quiet": quiet, "trust_remote_code": trust_remote_code}
    try:
        runs = train_many(configs, home=None if alone else home, **manner)
    except Interrupted as stop:
        print(f"\nsaekit: stopped; go on with: saekit train --out {home} --resume", file=sys.stderr)
        sys.exit(stop.code)
    for run in runs:
        if (cfg := run.path / "sae" / "cfg.json") in written and cfg.stat().st_mtime_ns == written[cfg]:
            print(f"the run in {run.path} was finished already")
    evaluator = None
    if eval_tokens:
        first = runs[0].config
        where = {name: value for name in ("model_device", "model_device_map") if (value := getattr(first, name))}
        evaluator = open_evaluator(
            device=first.device, tokens=eval_tokens, trust_remote_code=trust_remote_code, **where
        )
    by_hook = sorted(runs, key=lambda run: str(run.config.hook))  # whose activations are held for one hook at a time
    unevaluated = [run.path for run in by_hook if evaluator and "sparsity" not in groups_in(run.path / "eval.json")]
    mine = by_hook[ranks.rank :: ranks.world]
    with agreeing(ranks):
        own = [run.path for run in mine if run.path in unevaluated]
        if evaluator is not None and own:
            for path, report in evaluated(evaluator, own, quiet, tell=ranks.world == 1).items():
                report.join(Path(path) / "eval.json")
    if unevaluated and ranks.world > 1 and ranks.leads:
        show({str(path): report_in(path / "eval.json") for path in unevaluated})
    for run in runs:
        print(f"run: {run.path}    dictionary: {run.path / 'sae'}")
    if runs[0].sae.cfg.affinity_scale != "none":
        one = runs[0].path if len(runs) == 1 else "RUN"
        print(
            f"its thresholds follow each token's norm, which SAELens cannot read; for the nearest plain ones:\n"
            f"  saekit convert {one} FOLDER --to saelens --lossy"
        )
    for run in mine:  # last: whatever goes wrong here, the run is whole, and --resume draws the report again
        if run.path in unevaluated or not (run.path / REPORT).exists():
            report_on_run(run.path, evaluator, features_shown, quiet)


def _begun(out: object) -> bool:
    """Whether there is a run, or a plan of several, to go on with: torchrun has started this again after a failure."""
    return out is not None and any((Path(str(out)) / name).is_file() for name in ("config.yaml", "sweep.yaml"))


def _hooks(values: Mapping[str, Any], trust_remote_code: bool) -> list[str]:
    """The hook points that are meant by names in which ``*`` stands for anything."""
    from saekit.activations.model import EMBEDDED, hooks_matching, load_model
    from saekit.activations.placement import how_loaded
    from saekit.machine import pick_device

    asked = values["hook"] if isinstance(values["hook"], list) else [values["hook"]]
    named: Any = {key: value for key in _OF_THE_MODEL if isinstance(value := values.get(key), str)}
    how = how_loaded(SourceSettings(**named), str(pick_device(str(values.get("device") or "auto"))))
    model = load_model(str(values.get("model") or EMBEDDED), trust_remote_code=trust_remote_code, **how)
    every = [name for each in asked for name in (hooks_matching(model, each) if "*" in each else [each])]
    return list(dict.fromkeys(every))


with_flags(train, train_flags(), own_panel="Run")
