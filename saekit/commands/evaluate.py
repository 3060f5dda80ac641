"""``saekit eval``: judge dictionaries on held-out text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from saekit.commands.evaluating import bars, evaluated, open_evaluator, show
from saekit.commands.help import DTYPES, among
from saekit.commands.report import SHOWN, report_on_several
from saekit.errors import SaekitError, did_you_mean
from saekit.files import check_writable, replace_file, writable_folder


def evaluate(
    dictionaries: list[str] = typer.Argument(help="folders of dictionaries or runs, or hf://owner/repo/path"),
    model: str | None = typer.Option(None, help="the model [what the dictionary names]"),
    hook: str | None = typer.Option(None, help="the hook point [what the dictionary names]"),
    dataset: str | None = typer.Option(None, help="text to judge by [the dictionary's own, held-out part]"),
    column: str | None = typer.Option(None, help="column of the dataset that holds the text"),
    split: str | None = typer.Option(None, help="split of a dataset of the hub"),
    dataset_config: str | None = typer.Option(None, help="configuration of a dataset that has several"),
    context_length: int | None = typer.Option(None, min=3, help="tokens a context"),
    skip_first: int | None = typer.Option(
        None, min=1, help="positions at the start of each context that are not scored [what the dictionary names]"
    ),
    max_norm: float | None = typer.Option(
        None, help="leave out tokens of more than so many times the median norm (attention sinks)"
    ),
    prepend_bos: bool | None = typer.Option(
        None, help="whether contexts begin with BOS [what the dictionary names, or the model's own]"
    ),
    model_dtype: str | None = typer.Option(
        None, help="in which the model runs: float32, bfloat16, float16", autocompletion=among(*DTYPES)
    ),
    cache: Path | None = typer.Option(None, help="judge by the held-out rows of this cache instead"),
    tokens: int = typer.Option(131_072, min=1, help="held-out tokens"),
    out: Path | None = typer.Option(None, help="write a JSON file of all reports"),
    html: Path | None = typer.Option(None, help="write a report for the browser, with pages of the first's features"),
    features_shown: int = typer.Option(SHOWN, min=0, help="features with a page in --html, spread over densities"),
    suite: str = typer.Option(
        "standard",
        help="standard, or dark_matter: what dictionaries of one hook point miss",
        autocompletion=among("standard", "dark_matter"),
    ),
    earlier: list[str] | None = typer.Option(
        None, help="dark_matter: a dictionary of an earlier part, to predict the errors from; may be given again"
    ),
    pursuit: bool = typer.Option(False, help="dark_matter: also with features chosen by gradient pursuit"),
    ce_tokens: int | None = typer.Option(
        None, min=0, help="dark_matter: about so many tokens to splice; 0 for none [65536]", show_default=False
    ),
    figures: Path | None = typer.Option(None, help="dark_matter: folder that receives figures"),
    device: str = typer.Option("auto", help="auto, cpu, cuda, mps"),
    trust_remote_code: bool = typer.Option(False, help="let code run that comes with the model"),
    quiet: bool = typer.Option(False, help="no progress bar"),
) -> None:
    """Judge dictionaries on held-out text by their inference rule; several give one table.

    The suite dark_matter takes their errors apart; its figures join those in a run's eval.json.
    """
    if suite not in ("standard", "dark_matter"):
        raise SaekitError(f"unknown suite '{suite}'{did_you_mean(suite, ('standard', 'dark_matter'))}")
    asked = {"earlier": earlier, "pursuit": pursuit, "ce-tokens": ce_tokens is not None, "figures": figures}
    if suite == "standard" and (given := [name for name, value in asked.items() if value]):
        raise SaekitError(f"--{given[0]} goes with --suite dark_matter")
    if suite != "standard" and html is not None:
        raise SaekitError("--html goes with --suite standard; it shows what dark_matter has left in a run's eval.json")
    for path, flag in ((out, "--out"), (html, "--html")):
        if path is not None:
            _check_new_file(path, flag)
    if out is not None and html is not None and out.resolve() == html.resolve():
        raise SaekitError(f"--out and --html are the same file, '{out}'; choose two")
    settings: dict[str, Any] = dict(
        model=model,
        hook=hook,
        dataset=dataset,
        column=column,
        split=split,
        dataset_config=dataset_config,
        context_length=context_length,
        skip_first=skip_first,
        max_norm=max_norm,
        prepend_bos=prepend_bos,
        dtype=model_dtype,
        cache=cache,
        tokens=tokens,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    if suite == "dark_matter":
        few = 65_536 if ce_tokens is None else ce_tokens
        _take_apart(dictionaries, quiet, out, figures, settings, earlier=earlier or (), pursuit=pursuit, ce_tokens=few)
        return
    evaluator = open_evaluator(**settings)
    reports = evaluated(evaluator, dictionaries, quiet)
    if out is not None and len(reports) == 1:
        next(iter(reports.values())).save(out)
    elif out is not None:
        everything = {name: json.loads(report.to_json()) for name, report in reports.items()}
        replace_file(out, lambda part: part.write_text(json.dumps(everything, indent=2) + "\n"))
    if html is not None:
        report_on_several(html, reports, evaluator, features_shown, quiet)


def _check_new_file(path: Path, flag: str) -> None:
    """Raise SaekitError where a file cannot be written, or is there already."""
    if path.exists():
        raise SaekitError(f"'{path}' exists already; choose another {flag}")
    if not path.parent.is_dir():
        raise SaekitError(f"there is no folder '{path.parent}' to write '{path.name}' into")
    check_writable(path.parent)


def _take_apart(
    paths: list[str], quiet: bool, out: Path | None, folder: Path | None, settings: dict[str, Any], **asked: Any
) -> None:
    """The suite dark_matter: prints one table and writes what was found."""
    from saekit.evals.dark_matter.figures import draw
    from saekit.evals.dark_matter.saved import DarkMatterEvaluator
    from saekit.evals.report import groups_in, to_json

    runs = {path: Path(path) for path in paths if (Path(path) / "config.yaml").is_file()}
    for run in runs.values():
        groups_in(run / "eval.json")  # better refused now than when all is done
        check_writable(run)
    if folder is not None:
        writable_folder(folder, overwrite=True)
    evaluator = open_evaluator(**settings)
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
