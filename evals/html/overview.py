"""What the report says of a dictionary as a whole: figures with their meaning, curves, densities."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saekit.errors import SaekitError
from saekit.evals.features import FeatureStudy
from saekit.evals.registry import evaluations, shown_figures
from saekit.evals.report import figures, lookup, notes, over_documents
from saekit.evals.sparsity import histogram
from saekit.reading import parse_json, read_bounded
from saekit.sae import SparseAutoencoder
from saekit.zipf import ZipfLaw

_CURVES = ("loss", "fvu", "l0", "dead_share")  # of every run, in this order; then come the terms of its loss
_BOOKKEEPING = {"step", "tokens", "grad_norm", "lr", "rescored", "redone", "aux_pool", "skipped_tokens"}
_TIMES = {"seconds", "tokens_per_second", "waited_seconds", "waited_share"}  # another in a run that was interrupted
_POINTS = 400  # of a curve
_LONGEST = 200  # characters of a text that somebody else may have written


@dataclass(frozen=True)
class Subject:
    """A dictionary to report on.

    Attributes:
        name: what to call it.
        sae: it.
        groups: groups of figures (``Report.groups``), as far as there are any.
        about: what was judged on what (``Report.about``).
        metrics: the run's ``metrics.jsonl``, for the curves of training.
    """

    name: str
    sae: SparseAutoencoder
    groups: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    metrics: Path | None = None


def overview(subject: Subject, study: FeatureStudy | None) -> dict[str, Any]:
    """All but the pages of features, as JSON takes it."""
    found = figures(subject.groups)
    order = {(group, figure.key): figure.headline for group, figure in shown_figures() if figure.headline}
    headline = sorted((each for each in found if each[1:3] in order), key=lambda each: order[each[1:3]])
    more = figures(subject.groups, details=True)
    sections = [(each.title, [row for row in [*found, *more] if row.group == name]) for name, each in evaluations()]
    return {
        "name": _text(subject.name),
        "made": _made(subject.sae),
        "judged": _judged(subject),
        "notes": [_text(note) for note in notes(subject.about)],
        "headline": [[each.title, each.value, each.error, each.meaning] for each in headline],
        "errors": over_documents(subject.groups),
        "tables": [
            [title, [[each.title, each.value, each.error, each.meaning] for each in rows]]
            for title, rows in sections
            if rows
        ],
        "curves": curves(subject.metrics) if subject.metrics is not None else None,
        "density": _density(subject.groups.get("sparsity"), subject.sae.cfg.d_sae),
        "l0": _l0(subject.groups.get("sparsity"), study),
        "facts": _facts({**subject.sae.cfg.metadata, "judged on": dict(subject.about)}),
    }


def comparison(subjects: Sequence[Subject]) -> dict[str, Any]:
    """One row a dictionary, one column a figure that any of them has; those of dark matter are of other tokens."""
    standard = {name for name, _ in evaluations("standard")}
    found = [
        {(each.group, each.key): each for each in figures(subject.groups) if each.group in standard}
        for subject in subjects
    ]
    columns = list(dict.fromkeys(key for each in found for key in each))
    titles = {key: figure for each in found for key, figure in each.items()}
    return {
        "columns": [[titles[key].title, titles[key].meaning] for key in columns],
        "rows": [
            [_text(subject.name), *([each[key].value, each[key].error] if key in each else ["", ""] for key in columns)]
            for subject, each in zip(subjects, found, strict=True)
        ],
    }


def curves(path: Path) -> dict[str, list[float]]:
    """The figures of training by tokens, thinned out to about 400 lines; lines that are damaged are left out.

    Times are not among them, so that a run that was interrupted gives the same report.
    """
    lines = []
    try:
        text = read_bounded(path, 1 << 28).decode("utf-8", "replace")
    except SaekitError:
        return {}
    for line in text.splitlines():
        try:
            found = parse_json(line, path)
        except SaekitError:
            continue
        if isinstance(found, dict) and all(_is_number(found.get(key)) for key in ("tokens", *_CURVES)):
            lines.append(found)
    if not lines:
        return {}
    step = max(1, math.ceil(len(lines) / _POINTS))
    lines = lines[::-1][::step][::-1]  # the last is always there
    terms = [key for key in lines[-1] if key not in {*_CURVES, *_BOOKKEEPING, *_TIMES}]
    terms = [key for key in terms if all(_is_number(line.get(key)) for line in lines)]
    return {key: [float(line[key]) for line in lines] for key in ("tokens", *_CURVES, *terms)}


def _made(sae: SparseAutoencoder) -> dict[str, Any]:
    """How the dictionary came about, as far as it tells."""
    own = sae.cfg.metadata.get("saekit")
    own = own if isinstance(own, dict) else {}
    tokens, k = own.get("training_tokens"), own.get("k", sae.cfg.k)
    told = {name: sae.cfg.metadata.get(name) for name in ("model_name", "hook_name", "dataset_path")}
    return {
        "rule": _text(own.get("variant") or sae.cfg.architecture),
        "k": k if isinstance(k, int) and 0 < k < 1 << 53 else None,
        "width": sae.cfg.d_sae,
        "d_in": sae.cfg.d_in,
        "tokens": tokens if isinstance(tokens, int) and 0 < tokens < 1 << 53 else None,
        **{name: _text(value) if isinstance(value, str) else None for name, value in told.items()},
    }


def _judged(subject: Subject) -> dict[str, Any] | None:
    """On how many tokens of what."""
    tokens = lookup(subject.groups, "sparsity.tokens")
    if not isinstance(tokens, int):
        return None
    on = subject.about.get("dataset") or subject.about.get("cache")
    return {"tokens": tokens, "text": _text(on) if isinstance(on, str) else None}


def _density(sparsity: Any, width: int) -> dict[str, Any] | None:
    """Densities by rank and the law fitted to them."""
    ranks, law = lookup(sparsity, "density_by_rank"), lookup(sparsity, "zipf")
    rank, density = lookup(ranks, "rank"), lookup(ranks, "density")
    if not (_are_numbers(rank) and _are_numbers(density) and len(rank) == len(density)):
        return None
    if not all(1 <= each <= width for each in rank) or not any(each > 0 for each in density):
        return None
    fitted = None
    if isinstance(law, Mapping) and set(law) == set(ZipfLaw._fields) and _are_numbers([*law.values()]):
        curve = ZipfLaw(**law).curve(width)
        fitted = [float(curve[int(each) - 1]) for each in rank]
        fitted = fitted if _are_numbers(fitted) else None
    return {"rank": rank, "density": density, "fitted": fitted, "law": law if fitted else None}


def _l0(sparsity: Any, study: FeatureStudy | None) -> dict[str, Any] | None:
    """On how many tokens how many features are active; reports of older versions do not tell."""
    found = lookup(sparsity, "l0_histogram")
    if _are_numbers(lookup(found, "counts")) and _are_numbers([lookup(found, "width"), lookup(found, "beyond")]):
        return dict(found)
    return histogram(study.l0_counts) if study is not None else None


def _facts(facts: Mapping[str, Any], prefix: str = "") -> list[list[str]]:
    """Plain values of a mapping, those of mappings in it under dotted names."""
    found = []
    for name, value in facts.items():
        if isinstance(value, Mapping) and prefix.count(".") < 2:
            found += _facts(value, f"{prefix}{name}.")
        elif isinstance(value, str | int | float) and value != "":
            found.append([_text(f"{prefix}{name}"), _text(value if isinstance(value, str) else json.dumps(value))])
    return found[:100]


def _text(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(map(_is_number, values))
