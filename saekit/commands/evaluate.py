"""``saekit eval``: judge dictionaries on held-out text."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, get_origin

import typer

from saekit.activations.settings import SourceSettings
from saekit.commands.evaluating import bars, evaluated_by_all, open_evaluator, show
from saekit.commands.flags import among, flag, joined, with_flags
from saekit.commands.report import SHOWN, report_on_several
from saekit.errors import SaekitError, did_you_mean
from saekit.evals.dark_matter.settings import DarkMatterSettings
from saekit.evals.registry import EVALUATIONS, settings_of
from saekit.files import check_new_file, check_writable, replace_file, writable_folder
from saekit.settings import partial

_NAMED = " [what the dictionary names]"
_SOURCE = "Data"
_PANELS = {"standard": "Figures", "dark_matter": "Suite dark_matter"}


def evaluation_flags() -> list[inspect.Parameter]:
    """Flags of the source, None where the dictionary decides, and those of all evaluations."""
    source = partial(SourceSettings)
    found = [flag(name, field, _SOURCE, note=_NAMED) for name, field in source.model_fields.items()]
    for name in EVALUATIONS:
        panel = _PANELS["dark_matter" if name == "dark_matter" else "standard"]
        for key, field in settings_of(name).model_fields.items():
            repeated = "" if get_origin(field.annotation) is list else None
            found.append(flag(key, field, panel, repeated))
    return found


def evaluate(
    dictionaries: list[str] = typer.Argument(help="folders of dictionaries or runs, or hf://owner/repo/path"),
    cache: Path | None = typer.Option(
        None, help="judge by the held-out rows of this cache instead", rich_help_panel=_SOURCE
    ),
    tokens: int = typer.Option(131_072, min=1, help="held-out tokens", rich_help_panel=_SOURCE),
    out: Path | None = typer.Option(None, help="write a JSON file of all reports"),
    html: Path | None = typer.Option(None, help="write a report for the browser, with pages of the first's features"),
    features_shown: int = typer.Option(SHOWN, min=0, help="features with a page in --html, spread over densities"),
    suite: str = typer.Option(
        "standard",
        help="standard, or dark_matter: what dictionaries of one hook point miss",
        autocompletion=among("standard", "dark_matter"),
    ),
    device: str = typer.Option("auto", help="auto, cpu, cuda, mps"),
    trust_remote_code: bool = typer.Option(False, help="let code run that comes with the model"),
    quiet: bool = typer.Option(False, help="no progress bar"),
    **flags: Any,
) -> None:
    """Judge dictionaries on held-out text by their inference rule; several give one table.

    The suite dark_matter takes their errors apart; its figures join those in a run's eval.json.
    """
    from saekit.ranks import agreeing, current

    ranks = current()
    with agreeing(ranks):
        if suite not in ("standard", "dark_matter"):
            raise SaekitError(f"unknown suite '{suite}'{did_you_mean(suite, ('standard', 'dark_matter'))}")
        flags = joined(flags, SourceSettings)
        given = {key: value for key, value in flags.items() if value is not None and value is not False and value != []}
        source = {key: flags[key] for key in SourceSettings.model_fields if flags[key] is not None}
        apart = DarkMatterSettings.model_fields.keys() & given.keys()
        if suite == "standard" and apart:
            first = next(key for key in DarkMatterSettings.model_fields if key in apart)
            raise SaekitError(f"--{first.replace('_', '-')} goes with --suite dark_matter")
        if suite != "standard" and html is not None:
            raise SaekitError(
                "--html goes with --suite standard; it shows what dark_matter has left in a run's eval.json"
            )
        for path, option in ((out, "--out"), (html, "--html")):
            if path is not None:
                check_new_file(path, option)
        if out is not None and html is not None and out.resolve() == html.resolve():
            raise SaekitError(f"--out and --html are the same file, '{out}'; choose two")
        if ranks.world > 1 and (html is not None or suite != "standard"):
            raise SaekitError("--html and --suite dark_matter run on one process, not under torchrun")
    asked: dict[str, Any] = {**source, "cache": cache, "tokens": tokens, "device": device}
    asked["trust_remote_code"] = trust_remote_code
    if suite == "dark_matter":
        apart_settings = DarkMatterSettings(**{key: flags[key] for key in apart})
        _take_apart(dictionaries, quiet, out, asked, apart_settings)
        return
    own = {key: value for key, value in given.items() if key not in SourceSettings.model_fields}
    evaluator = open_evaluator(**asked, settings=own)
    reports = evaluated_by_all(evaluator, dictionaries, quiet, ranks)
    if not ranks.leads:
        return
    if out is not None and len(reports) == 1:
        next(iter(reports.values())).save(out)
    elif out is not None:
        everything = {name: json.loads(report.to_json()) for name, report in reports.items()}
        replace_file(out, lambda part: part.write_text(json.dumps(everything, indent=2) + "\n"))
    if html is not None:
        report_on_several(html, reports, evaluator, features_shown, quiet)


def _take_apart(
    paths: list[str], quiet: bool, out: Path | None, source: dict[str, Any], settings: DarkMatterSettings
) -> None:
    """The suite dark_matter: prints one table and writes what was found."""
    from saekit.evals.dark_matter.figures import draw
    from saekit.evals.dark_matter.saved import DarkMatterEvaluator
    from saekit.evals.report import groups_in, to_json

    runs = {path: Path(path) for path in paths if (Path(path) / "config.yaml").is_file()}
    for run in runs.values():
        groups_in(run / "eval.json")  # better refused now than when all is done
        check_writable(run)
    if settings.figures is not None:
        writable_folder(settings.figures, overwrite=True)
    evaluator, folder = open_evaluator(**source), settings.figures
    asked = settings.model_dump(exclude={"figures"})
    with bars(evaluator, quiet):
        reports, compared = DarkMatterEvaluator(evaluator, **asked)(paths)
    show(reports)
    if out is not None and len(reports) == 1:
        next(iter(reports.values())).save(out)
    elif out is not None:
        everything: dict[str, Any] = {name: report.to_dict() for name, report in reports.items()}
        text = to_json({**everything, "compared": compared})
        replace_file(out, lambda part: part.write_text(text + "\n"))
    for path, run in runs.items():
        reports[path].join(run / "eval.json")
        print(f"added to {run / 'eval.json'}; a report with it: saekit eval {path} --html FILE")
    if folder is not None:
        for file in draw({path: report["dark_matter"] for path, report in reports.items()}, compared, folder):
            print(f"figure: {file}")


with_flags(evaluate, evaluation_flags())
