"""The HTML report of what a command has trained or judged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit.commands.evaluating import bars
from saekit.errors import SaekitError
from saekit.files import in_bytes

if TYPE_CHECKING:
    from saekit.evals import Evaluator, Report
    from saekit.evals.features import FeatureStudy
    from saekit.sae import SparseAutoencoder

SHOWN = 4096  # features with a page of their own, if not said otherwise
_FIRST = 64  # contexts by which features of a wide dictionary are ranked


def report_on_run(path: Path, evaluator: Evaluator | None, shown: int, quiet: bool) -> None:
    """Write ``report.html`` of a run as it is saved; without an evaluator, with the curves of its training alone."""
    from saekit.evals.html import Subject, write_report
    from saekit.evals.report import groups_in
    from saekit.loading import load
    from saekit.trainers.run_folder import EVALUATION, METRICS, REPORT

    sae = load(path, device=evaluator.device if evaluator is not None else "cpu")
    study: FeatureStudy | None
    why_not: str | None
    if evaluator is None:
        study, why_not = None, "the dictionary was not judged on text (--eval-tokens 0)"
    else:
        study, why_not = _study(sae, str(path), evaluator, shown, quiet)
    groups = groups_in(path / EVALUATION)
    about = groups.pop("about", {})
    subject = Subject(_name(str(path)), sae, groups, about, path / METRICS)
    _told(path / REPORT, write_report(path / REPORT, [subject], study, why_not))


def report_on_several(out: Path, reports: Mapping[str, Report], evaluator: Evaluator, shown: int, quiet: bool) -> None:
    """Write the report of dictionaries that were judged: a table of all, and the first in detail."""
    from saekit.evals.html import Subject, write_report
    from saekit.loading import load

    subjects = []
    for path, report in reports.items():
        sae = load(path, device=evaluator.device)
        metrics = Path(path) / "metrics.jsonl"
        groups = {**report.groups, **_dark_matter(Path(path) / "eval.json")}
        subjects.append(Subject(path, sae, groups, report.about, metrics if metrics.is_file() else None))
    study, why_not = _study(subjects[0].sae, subjects[0].name, evaluator, shown, quiet)
    _told(out, write_report(out, subjects, study, why_not))


def _study(
    sae: SparseAutoencoder, path: str, evaluator: Evaluator, shown: int, quiet: bool
) -> tuple[FeatureStudy | None, str | None]:
    """What the features fire on, or why that is not known."""
    from saekit.evals.features import spread_over_densities, study_features

    if cache := evaluator.cache_of(sae):
        return None, f"it was judged by the cache '{cache}', which holds activations and no text"
    if not shown:
        return None, "--features-shown 0 asked for none"
    reference = evaluator.reference_of(sae, path)
    model, hook, contexts = reference.model, reference.hook, reference.contexts
    features = spread_over_densities(sae, model, contexts.rows(0, _FIRST), shown, hook=hook)
    with bars(evaluator, quiet):
        assert evaluator.on_contexts is not None
        tell = evaluator.on_contexts(f"the features of {path}", len(contexts.tokens))
        return study_features(sae, model, reference, features=features, on_batch=tell), None


def _dark_matter(path: Path) -> dict[str, Any]:
    """That group of a run's figures, if it has it: the standard suite does not find them anew."""
    from saekit.evals.report import groups_in

    try:
        found = groups_in(path)
    except SaekitError:  # no report of ours; nothing is written there
        return {}
    return {"dark_matter": found["dark_matter"]} if isinstance(found.get("dark_matter"), dict) else {}


def _name(path: str) -> str:
    return Path(path).name or path


def _told(path: Path, size: int) -> None:
    print(f"report: {path} ({in_bytes(size)})")
