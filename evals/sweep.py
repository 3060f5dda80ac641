"""The runs of a folder against each other: quality at each L0, over seeds, and which none is better than."""

from __future__ import annotations

import html
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from saekit.errors import SaekitError
from saekit.evals.report import groups_in, lookup
from saekit.reading import read_yaml

L0 = "sparsity.l0"
QUALITIES = {"reconstruction.fvu": "FVU", "downstream.ce_increase": "CE increase"}  # lower is better
_MORE = {"downstream.kl": "KL", "sparsity.dead_share": "dead"}
_SEEDS = ("seed", "data_seed")


class Value(NamedTuple):
    """A figure with its standard error, over seeds where there are several, else over documents."""

    mean: float
    error: float | None


@dataclass(frozen=True)
class Point:
    """Runs that differ in their seeds alone.

    Attributes:
        settings: what tells them from the others.
        runs: their folders.
        figures: the figures by dotted key; those that a run lacks are missing.
        best: the qualities in which no other point of the same hook has both fewer features active and a lower value.
    """

    settings: dict[str, Any]
    runs: list[Path]
    figures: dict[str, Value]
    best: frozenset[str] = frozenset()


def points(folder: Path) -> list[Point]:
    """The evaluated runs below a folder, runs of different seeds as one point.

    Raises:
        SaekitError: there is none, or an evaluation or a config is damaged.
    """
    configs = {path.parent: read_yaml(path) for path in sorted(folder.glob("*/config.yaml"))}
    reports = {run: groups_in(run / "eval.json") for run in configs}
    reports = {run: report for run, report in reports.items() if lookup(report, L0) is not None}
    if not reports:
        hint = "; a run is evaluated by `saekit eval RUN`" if configs else ""
        raise SaekitError(f"there is no evaluated run below '{folder}'{hint}")
    varied = _varied([configs[run] for run in reports])
    alike: dict[tuple[Any, ...], list[Path]] = {}
    for run in reports:
        alike.setdefault(tuple(str(configs[run].get(key)) for key in varied), []).append(run)
    found = []
    for runs in alike.values():
        figures = {key: _value([reports[run] for run in runs], key) for key in (L0, *QUALITIES, *_MORE)}
        known = {key: value for key, value in figures.items() if value is not None}
        found.append(Point({key: configs[runs[0]].get(key) for key in varied}, runs, known))
    return sorted((_marked(point, found) for point in found), key=_order)


def _order(point: Point) -> tuple[Any, ...]:
    others = [str(value) for key, value in point.settings.items() if key != "k"]
    return (*others, point.figures[L0].mean)


def _varied(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings in which the runs differ, seeds apart; not those that follow from others."""
    keys = [key for key in configs[0] if all(key in config for config in configs)]
    differ = [key for key in keys if len({str(config[key]) for config in configs}) > 1]
    return [key for key in differ if key not in (*_SEEDS, "out", "device", "log_every")]


def _value(reports: Sequence[Mapping[str, Any]], key: str) -> Value | None:
    values = [lookup(report, key) for report in reports]
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    if len(numbers) < len(reports):
        return None
    if len(numbers) > 1:
        return Value(statistics.mean(numbers), statistics.stdev(numbers) / len(numbers) ** 0.5)
    error = lookup(reports[0], f"{key}_se")
    return Value(numbers[0], float(error) if isinstance(error, int | float) else None)


def _marked(point: Point, every: Iterable[Point]) -> Point:
    """The point, with the qualities in which it is on the front of those at its hook."""
    rivals = [each for each in every if each.settings.get("hook") == point.settings.get("hook")]
    best = {
        key
        for key in QUALITIES
        if key in point.figures
        and not any(_beats(each, point, key) for each in rivals if each is not point and key in each.figures)
    }
    return Point(point.settings, point.runs, point.figures, frozenset(best))


def _beats(one: Point, other: Point, key: str) -> bool:
    mine, its = ((point.figures[L0].mean, point.figures[key].mean) for point in (one, other))
    return mine != its and mine[0] <= its[0] and mine[1] <= its[1]


def rows_of(found: Sequence[Point]) -> tuple[list[str], list[list[str]]]:
    """The heads and cells of a table of them; ``*`` marks what is on the front."""
    shown = {
        key: title for key, title in {L0: "L0", **QUALITIES, **_MORE}.items() if any(key in p.figures for p in found)
    }
    heads = [*found[0].settings, "runs", *shown.values()]
    rows = []
    for point in found:
        cells = [_text(value) for value in point.settings.values()]
        cells += [str(len(point.runs))]
        cells += [_cell(point, key) for key in shown]
        rows.append(cells)
    return heads, rows


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(point: Point, key: str) -> str:
    value = point.figures.get(key)
    if value is None:
        return ""
    shape = ".1f" if key == L0 else ".4f"
    error = "" if value.error is None else f" ± {value.error:{shape}}"
    return f"{value.mean:{shape}}{error}{' *' if key in point.best else ''}"


CAPTION = (
    "± standard error over the runs of different seeds; of a single run, over its held-out documents. "
    "* no other run at this hook has a lower L0 and a lower value."
)


def table(found: Sequence[Point]) -> Table:
    """A row for each point."""
    heads, rows = rows_of(found)
    result = Table(caption=CAPTION, caption_justify="left")
    for number, head in enumerate(heads):
        result.add_column(head, justify="left" if number < len(found[0].settings) else "right", overflow="fold")
    for row in rows:
        result.add_row(*row)
    return result


def page(found: Sequence[Point], title: str) -> str:
    """A page of HTML: the table, and each quality against L0."""
    heads, rows = rows_of(found)
    head = "".join(f"<th>{html.escape(each)}</th>" for each in heads)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title>"
        "<style>body{font:14px sans-serif;margin:2em auto;max-width:70em}td,th{padding:.2em .7em;text-align:right}"
        "td:first-child,th:first-child{text-align:left}tr:nth-child(even){background:#f3f3f3}svg{max-width:100%}</style>"
        f"<h1>{html.escape(title)}</h1>{drawn(found)}<table><tr>{head}</tr>{body}</table><p>{html.escape(CAPTION)}</p>\n"
    )


def drawn(found: Sequence[Point]) -> str:
    """The figure as SVG: a line for the points that differ in k alone, the front dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    shown = {key: name for key, name in QUALITIES.items() if any(key in point.figures for point in found)}
    lines: dict[str, list[Point]] = {}
    for point in found:
        name = ", ".join(f"{key} {_text(value)}" for key, value in point.settings.items() if key not in _FOLLOWING)
        lines.setdefault(name, []).append(point)
    figure, axes = pyplot.subplots(1, len(shown), figsize=(6.5 * len(shown), 5), layout="constrained", squeeze=False)
    for axis, (key, name) in zip(axes[0], shown.items(), strict=True):
        for label, members in lines.items():
            known = sorted((p for p in members if key in p.figures), key=lambda p: p.figures[L0].mean)
            if known:
                x, y = ([p.figures[k].mean for p in known] for k in (L0, key))
                errors = [p.figures[key].error or 0 for p in known]
                axis.errorbar(x, y, yerr=errors, marker="o", markersize=4, capsize=3, label=label or None)
        front = sorted((p.figures[L0].mean, p.figures[key].mean) for p in found if key in p.best)
        if len({str(p.settings.get("hook")) for p in found}) == 1 and len(front) > 1:
            axis.plot(*zip(*front, strict=True), "k--", lw=0.8, zorder=0, label="front")
        axis.set(xscale="log", yscale="log", xlabel="L0, active features a token", ylabel=name)
        for way in (axis.xaxis, axis.yaxis):
            way.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
            way.set_major_formatter(ScalarFormatter())
            way.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=8)
    content = io.StringIO()
    figure.savefig(content, format="svg")
    pyplot.close(figure)
    text = content.getvalue()
    return text[text.index("<svg") :]


_FOLLOWING = ("k", "k_aux", "l0_weight")  # settings that move along a line
