"""The command line: ``saekit train``, ``cache``, ``eval``, ``convert`` and ``info``."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saekit.errors import SaekitError, did_you_mean
from saekit.files import check_free, replace_file, writable_folder

if TYPE_CHECKING:
    from saekit.evals import Judge, Report
    from saekit.sae import SparseAutoencoder

app = typer.Typer(
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Train, load and judge sparse autoencoders of language-model activations.",
)
_DEBUG = "--debug"
_UsageError: Any = typer.BadParameter.__base__  # click's, which typer may carry inside itself


def main() -> None:
    """Run the command line; a mistake is one line on standard error and exit code 2."""
    arguments = [argument for argument in sys.argv[1:] if argument != _DEBUG] or ["--help"]
    debug = _DEBUG in sys.argv
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        sys.exit(typer.main.get_command(app).main(arguments, prog_name="saekit", standalone_mode=False))
    except (SaekitError, _UsageError) as error:
        if debug:
            raise
        message = str(error) if isinstance(error, SaekitError) else error.format_message()
        print("saekit: " + " ".join(message.split()), file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort) as error:
        print("saekit: interrupted", file=sys.stderr)
        sys.exit(getattr(error, "code", 130))


def _flags_of_config(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one flag for each field of TrainConfig, so that names, types and help stand in one place."""
    from saekit.trainers.config import TrainConfig

    kinds: dict[Any, Any] = {int: int, float: float, int | None: int, float | None: float, bool: bool}
    fixed = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
    flags = []
    for name, field in TrainConfig.model_fields.items():
        default = "" if field.default is None or field.default_factory else f" [default: {field.default}]"
        again = "; give it again for a dictionary at each" if name == "hook" else ""
        option = typer.Option(help=f"{field.description}{default}{again}", show_default=False)
        kind: Any = Annotated[(list[str] if name == "hook" else kinds.get(field.annotation, str)) | None, option]
        flags.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))
    command.__signature__ = inspect.Signature([*flags, *fixed])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in [*flags, *fixed]}
    return command


def train(
    *,
    config: Path | None = typer.Option(None, help="YAML file of settings; flags win over it"),
    resume: bool = typer.Option(False, help="go on with the run in --out"),
    overwrite: bool = typer.Option(False, help="replace the run in --out"),
    eval_tokens: int = typer.Option(131_072, min=0, help="held-out tokens to evaluate on at the end; 0 for none"),
    quiet: bool = typer.Option(False, help="no progress bar"),
    **flags: Any,
) -> None:
    """Train a dictionary, evaluate it on held-out text, and save both in the run's folder.

    With no model and no dataset named, the embedded ones are used. Example:

    saekit train --variant mutual_choice --width 4096 --k 32 --tokens 2000000 --out runs/demo
    """
    from saekit.evals.report import groups_in
    from saekit.trainers import TrainConfig, train_hooks
    from saekit.trainers import train as run_training
    from saekit.trainers.interrupt import Interrupted
    from saekit.trainers.several import hooks_in

    hooks = flags.pop("hook") or []
    if resume and config is None and flags["out"] is not None:
        started = Path(flags["out"]) / "config.yaml"
        config = started if started.is_file() else None
    settings = TrainConfig.from_yaml(config, hook=hooks[0] if len(hooks) == 1 else None, **flags)
    home = settings.out
    several = len(hooks) > 1 or (resume and not (home / "config.yaml").is_file() and bool(hooks_in(home)))
    finished = {path.parents[1] for place in ("sae", "*/sae") for path in home.glob(f"{place}/cfg.json") if resume}
    try:
        if several:
            runs = [*train_hooks(settings, hooks, resume=resume, overwrite=overwrite, quiet=quiet).values()]
        else:
            runs = [run_training(settings, resume=resume, overwrite=overwrite, quiet=quiet)]
    except Interrupted as stop:
        print(f"\nsaekit: stopped; go on with: saekit train --out {home} --resume", file=sys.stderr)
        sys.exit(stop.code)
    for run in runs:
        if run.path in finished:
            print(f"the run in {run.path} was finished already")
    if eval_tokens and (unjudged := [run.path for run in runs if "sparsity" not in groups_in(run.path / "eval.json")]):
        for path, report in _judge(unjudged, quiet, tokens=eval_tokens, device=runs[0].config.device).items():
            report.join(Path(path) / "eval.json")
    for run in runs:
        print(f"run: {run.path}    dictionary: {run.path / 'sae'}")
    if runs[0].sae.cfg.affinity_scale != "none":
        one = runs[0].path if len(runs) == 1 else "RUN"
        print(
            f"its thresholds follow each token's norm, which SAELens cannot read; for the nearest plain ones:\n"
            f"  saekit convert {one} FOLDER --to saelens --lossy"
        )


def cache(
    out: Path = typer.Option(..., help="folder of the cache"),
    tokens: int = typer.Option(2_000_000, min=1, help="tokens to store"),
    model: str = typer.Option("embedded", help="'embedded', a local Hugging Face folder, or a name on the hub"),
    hook: str | None = typer.Option(None, help="TransformerLens hook point [the residual after half of the blocks]"),
    dataset: str = typer.Option("python", help="'python', a local text/JSONL/Parquet file, or a name on the hub"),
    column: str = typer.Option("text", help="column of the dataset that holds the text"),
    split: str = typer.Option("train", help="split of a dataset of the hub"),
    streaming: bool = typer.Option(True, help="read a dataset of the hub as it downloads"),
    context_length: int | None = typer.Option(None, min=3, help="tokens a context"),
    dtype: str = typer.Option("bfloat16", help="how activations are stored: float32, bfloat16, float16"),
    model_dtype: str = typer.Option("float32", help="in which the model runs: float32, bfloat16, float16"),
    gradients: bool = typer.Option(False, help="store the gradients of the next-token loss too, for gradient_topk"),
    device: str = typer.Option("auto", help="auto, cpu, cuda, mps"),
    overwrite: bool = typer.Option(False, help="replace a cache in --out"),
    quiet: bool = typer.Option(False, help="no progress bar"),
) -> None:
    """Harvest activations of the training text into a cache that `saekit train --cache` reads."""
    from rich.progress import Progress

    from saekit.activations import ActivationCache, ActivationSource
    from saekit.activations.cache import check_writable
    from saekit.activations.gradients import check_causal
    from saekit.trainers.trainer import pick_device

    check_writable(out, dtype, overwrite)
    source = ActivationSource.open(
        model,
        hook,
        dataset,
        column=column,
        split=split,
        streaming=streaming,
        context_length=context_length,
        device=str(pick_device(device)),
        dtype=model_dtype,
    )
    if gradients:
        check_causal(source.model)
    with Progress(disable=quiet) as progress:
        task = progress.add_task(f"{source.hook}", total=tokens)

        def counted() -> Any:
            for batch in source.batches("train", tokens, gradients=gradients):
                yield batch
                progress.advance(task, len(batch.x))

        passport = source.passport("train", gradients=gradients)
        made = ActivationCache.write(out, counted(), passport, dtype=dtype, overwrite=overwrite)
    if len(made) < tokens:
        print(f"saekit: the text held only {len(made):,} of {tokens:,} tokens", file=sys.stderr)
    print(f"cache: {out}    {len(made):,} tokens of width {made.d_in}, {made.dtype}, {len(made.shards)} shards")


def evaluate(
    dictionaries: list[Path] = typer.Argument(help="folders of dictionaries or runs"),
    model: str | None = typer.Option(None, help="the model [what the dictionary names]"),
    hook: str | None = typer.Option(None, help="the hook point [what the dictionary names]"),
    dataset: str | None = typer.Option(None, help="text to judge by [the dictionary's own, held-out part]"),
    column: str | None = typer.Option(None, help="column of the dataset that holds the text"),
    split: str | None = typer.Option(None, help="split of a dataset of the hub"),
    context_length: int | None = typer.Option(None, min=3, help="tokens a context"),
    model_dtype: str | None = typer.Option(None, help="in which the model runs: float32, bfloat16, float16"),
    cache: Path | None = typer.Option(None, help="judge by the held-out rows of this cache instead"),
    tokens: int = typer.Option(131_072, min=1, help="held-out tokens"),
    out: Path | None = typer.Option(None, help="write a JSON file of all reports"),
    suite: str = typer.Option("standard", help="standard, or dark_matter: what dictionaries of one hook point miss"),
    earlier: list[Path] | None = typer.Option(
        None, help="dark_matter: a dictionary of an earlier part, to foretell the errors from; may be given again"
    ),
    pursuit: bool = typer.Option(False, help="dark_matter: also with features chosen by gradient pursuit"),
    ce_tokens: int | None = typer.Option(
        None, min=0, help="dark_matter: about so many tokens to splice; 0 for none [65536]", show_default=False
    ),
    figures: Path | None = typer.Option(None, help="dark_matter: folder that receives figures"),
    device: str = typer.Option("auto", help="auto, cpu, cuda, mps"),
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
    if out is not None and out.exists():
        raise SaekitError(f"'{out}' exists already; choose another --out")
    if out is not None and not out.parent.is_dir():
        raise SaekitError(f"there is no folder '{out.parent}' to write '{out.name}' into")
    settings: dict[str, Any] = dict(
        model=model,
        hook=hook,
        dataset=dataset,
        column=column,
        split=split,
        context_length=context_length,
        dtype=model_dtype,
        cache=cache,
        tokens=tokens,
        device=device,
    )
    if suite == "dark_matter":
        few = 65_536 if ce_tokens is None else ce_tokens
        _take_apart(dictionaries, quiet, out, figures, settings, earlier=earlier or (), pursuit=pursuit, ce_tokens=few)
        return
    reports = _judge(dictionaries, quiet, **settings)
    if out is not None and len(reports) == 1:
        next(iter(reports.values())).save(out)
    elif out is not None:
        everything = {name: json.loads(report.to_json()) for name, report in reports.items()}
        replace_file(out, lambda part: part.write_text(json.dumps(everything, indent=2) + "\n"))


def convert(
    source: Path = typer.Argument(help="folder of a dictionary or run"),
    target: Path = typer.Argument(help="folder to write"),
    to: str = typer.Option("saelens", help="format: saelens"),
    lossy: bool = typer.Option(False, help="write the nearest dictionary where the format cannot hold this one"),
    model: str | None = typer.Option(None, help="--lossy: the model [what the dictionary names]"),
    hook: str | None = typer.Option(None, help="--lossy: the hook point [what the dictionary names]"),
    dataset: str | None = typer.Option(None, help="--lossy: text to set thresholds on [what the dictionary names]"),
    cache: Path | None = typer.Option(None, help="--lossy: activation cache to set them on instead"),
    tokens: int = typer.Option(131_072, min=1024, help="--lossy: tokens to set them on, and to compare both on"),
    overwrite: bool = typer.Option(False, help="replace a dictionary in the target folder"),
    device: str = typer.Option("auto", help="auto, cpu, cuda, mps"),
) -> None:
    """Write a dictionary in the format of another package."""
    import saekit

    check_free(target, overwrite=overwrite, hint="choose another folder, or pass --overwrite")
    if to != "saelens":
        raise SaekitError(f"unknown format '{to}'; choose from saelens")
    sae = saekit.load(source)
    if sae.cfg.affinity_scale != "none":
        if not lossy:
            raise SaekitError(
                f"the thresholds of '{source}' follow each token's norm, which the format of SAELens cannot hold; "
                f"--lossy writes the nearest plain ones and compares both"
            )
        facts: dict[str, Any] = {"model": model, "hook": hook, "dataset": dataset, "cache": cache, "tokens": tokens}
        sae = _plain(sae, source, device, **facts)
    sae.save(target, overwrite=overwrite)
    print(f"dictionary: {target}")


def _plain(sae: SparseAutoencoder, path: Path, device: str, **facts: Any) -> SparseAutoencoder:
    """The dictionary with plain thresholds; prints what the change costs."""
    from saekit.evals import Judge, evaluate_activations
    from saekit.trainers.calibration import with_plain_thresholds
    from saekit.trainers.trainer import pick_device

    judge = Judge(device=str(pick_device(device)), **facts)
    sae = sae.to(judge.device)
    plain = with_plain_thresholds(sae, lambda: judge.activations(sae, str(path), "calibration"))
    for name, each in (("thresholds by token norm", sae), ("plain thresholds", plain)):
        report = evaluate_activations(each, judge.activations(sae, str(path), "heldout"))
        l0, fvu = report["sparsity"]["l0"], report["reconstruction"]["fvu"]
        print(f"{name + ':':26} FVU {fvu:.4f} at L0 {l0:.1f} on {report['sparsity']['tokens']:,} held-out tokens")
    return plain.cpu()


def info(path: Path = typer.Argument(help="a dictionary, a run or an activation cache")) -> None:
    """Say what a folder holds."""
    import saekit
    from saekit.activations.cache import MANIFEST, ActivationCache

    if (path / MANIFEST).is_file():
        found = ActivationCache.open(path)
        facts: dict[str, Any] = {"cache": str(path), "tokens": len(found), "d_in": found.d_in, "dtype": found.dtype}
        facts |= {"shards": len(found.shards), "passport": found.passport}
    else:
        sae = saekit.load(path)
        facts = {"dictionary": str(path), **{k: v for k, v in vars(sae.cfg).items() if v is not None}}
    print(json.dumps(facts, indent=2))


def _judge(paths: list[Path], quiet: bool, **settings: Any) -> dict[str, Report]:
    """Evaluate and print one table; returns the reports by the dictionary's path."""
    with _opened_judge(quiet, settings) as judge:
        reports = {str(path): judge(path) for path in paths}
    _print(reports)
    return reports


def _take_apart(
    paths: list[Path], quiet: bool, out: Path | None, folder: Path | None, settings: dict[str, Any], **asked: Any
) -> None:
    """The suite dark_matter: prints one table and writes what was found."""
    from saekit.evals.dark_matter.figures import draw
    from saekit.evals.dark_matter.saved import DarkMatterJudge
    from saekit.evals.report import groups_in, to_json

    runs = [path for path in paths if (path / "config.yaml").is_file()]
    for path in runs:
        groups_in(path / "eval.json")  # better refused now than when all is done
    if folder is not None:
        writable_folder(folder, overwrite=True)
    with _opened_judge(quiet, settings) as judge:
        reports, compared = DarkMatterJudge(judge, **asked)(paths)
    _print(reports)
    if out is not None and len(reports) == 1:
        next(iter(reports.values())).save(out)
    elif out is not None:
        everything: dict[str, Any] = {name: report.to_dict() for name, report in reports.items()}
        text = to_json({**everything, "compared": compared})
        replace_file(out, lambda part: part.write_text(text + "\n"))
    for path in runs:
        reports[str(path)].join(path / "eval.json")
        print(f"added to {path / 'eval.json'}")
    if folder is not None:
        for file in draw({path: report["dark_matter"] for path, report in reports.items()}, compared, folder):
            print(f"figure: {file}")


@contextmanager
def _opened_judge(quiet: bool, settings: dict[str, Any]) -> Iterator[Judge]:
    """A judge with progress bars."""
    from rich.progress import Progress

    from saekit.evals import Judge
    from saekit.trainers.trainer import pick_device

    with Progress(disable=quiet) as progress:

        def bar(name: str, contexts: int) -> Callable[[int], object]:
            task = progress.add_task(f"evaluating {name}", total=contexts)
            return lambda done: progress.advance(task, done)

        device = str(pick_device(settings["device"]))
        yield Judge(on_contexts=bar, **{**settings, "device": device})


def _print(reports: dict[str, Report]) -> None:
    from rich.console import Console

    from saekit.evals import table

    console = Console()
    console.width = console.width if len(reports) == 1 else max(console.width, 140)  # rather wrapped than cut off
    console.print(table(reports))


app.command()(_flags_of_config(train))
app.command()(cache)
app.command("eval")(evaluate)
app.command()(convert)
app.command()(info)

if __name__ == "__main__":
    main()
