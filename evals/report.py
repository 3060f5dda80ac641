"""What an evaluation found: figures in groups, as JSON and as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from saekit import display
from saekit.errors import SaekitError
from saekit.evals.evaluation import Figure
from saekit.evals.registry import EVALUATIONS, shown_figures
from saekit.files import replace_file
from saekit.reading import read_json

WIDTH = 140  # characters of a table of several dictionaries
_NAME = 16  # of them for a dictionary's name, which is folded where there are no more


@dataclass(frozen=True)
class Report:
    """Figures of one dictionary.

    Attributes:
        groups: ``sparsity``, ``reconstruction`` and, with a causal model, ``downstream``; each names its number of
            tokens. For gradient TopK also ``gradient_selection``. The suite ``dark_matter`` has one group of that name.
        about: what was evaluated on what; ``no_downstream``: why a model has no such group.
    """

    groups: dict[str, dict[str, Any]]
    about: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, group: str) -> dict[str, Any]:
        return self.groups[group]

    def __repr__(self) -> str:
        rows = self._rows()
        names, values = (max((len(row[column]) for row in rows), default=0) for column in (0, 1))
        lines = [f"  {name:<{names}}  {value:>{values}}  {text}" for name, value, text in rows]
        return "\n".join([self._title(), *lines, *(f"  {note}" for note in self._notes())])

    def _repr_html_(self) -> str:
        figures = display.table(self._title(), self._rows(), ("figure", "value", "meaning"))
        return figures + "".join(f"<p>{escape(note)}</p>" for note in self._notes())

    def _notes(self) -> list[str]:
        return [*over_documents(self.groups), *notes(self.about)]

    def _title(self) -> str:
        return str(self.about.get("dictionary") or self.about.get("hook") or "Report")

    def _rows(self) -> list[tuple[str, str, str]]:
        shown = [
            (group, figure) for group, figure in shown_figures() if value_of(self.groups, group, figure) is not None
        ]
        return [(figure.title, _cell(self, group, figure, " ± "), figure.meaning) for group, figure in shown]

    def to_dict(self) -> dict[str, Any]:
        """The groups, and ``about``."""
        return {"about": self.about, **self.groups}

    def to_json(self) -> str:
        """The same as JSON text; figures that are not finite become null."""
        return to_json(self.to_dict())

    def save(self, path: str | Path) -> None:
        """Write ``to_json()`` to a file."""
        replace_file(Path(path), lambda part: part.write_text(self.to_json() + "\n"))

    def join(self, path: str | Path) -> None:
        """Write the groups into a report's file, beside other groups that it has.

        Raises:
            SaekitError: the file holds something else.
        """
        before = groups_in(path)
        here = self.to_dict()
        if before and "about" in before:  # what else is there is about something else
            here = {name: {"about": self.about, **group} for name, group in self.groups.items()}
        replace_file(Path(path), lambda part: part.write_text(to_json({**before, **here}) + "\n"))


def groups_in(path: str | Path) -> dict[str, Any]:
    """What a report's file holds; nothing where there is no file.

    Raises:
        SaekitError: the file holds something else.
    """
    if not Path(path).exists():
        return {}
    try:
        found = read_json(Path(path), 1 << 24)
    except SaekitError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("about"), dict):
        raise SaekitError(f"'{path}' is no report of an evaluation; move it away")
    return found


def report_in(path: str | Path) -> Report:
    """The report in a file.

    Raises:
        SaekitError: the file is missing or holds something else.
    """
    groups = groups_in(path)
    if not groups:
        raise SaekitError(f"there is no report in '{path}'")
    return Report(groups, groups.pop("about"))


def to_json(value: Any) -> str:
    """JSON text; figures that are not finite become null."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


class Shown(NamedTuple):
    """One figure as people read it, its standard error ("" where there is none), and what it means."""

    title: str
    group: str
    key: str
    value: str
    error: str
    meaning: str


def figures(groups: Mapping[str, Any], *, details: bool = False) -> list[Shown]:
    """The figures that these groups have, in the order of the table; what is no number is left out."""
    found = []
    for group, figure in shown_figures(details=details):
        value = value_of(groups, group, figure)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
            continue  # a file of others may hold anything
        if isinstance(value, int) or "d" not in figure.shape:
            error = error_of(groups, group, figure)
            text = figure.shape.format(value)
            found.append(Shown(figure.title, group, figure.key, text, error, figure.meaning))
    return found


def notes(about: Mapping[str, Any]) -> list[str]:
    """What a reader of the figures should know besides: why some of them are not there."""
    return [str(about[key]) for key in ("no_downstream",) if isinstance(about.get(key), str)]


def error_of(groups: Mapping[str, Any], group: str, figure: Figure) -> str:
    """The standard error of a figure, in the figure's own format unless that shows nothing of it; "" without one."""
    error = lookup(groups, f"{group}.{figure.key}_se")
    if not isinstance(error, int | float) or not 0 <= error < 1e300:  # a file of others may hold anything
        return ""
    text = figure.shape.format(error)
    return text if error == 0 or float(text) > 0 else f"{error:.0e}"


def over_documents(groups: Mapping[str, Any]) -> list[str]:
    """Over how many documents the standard errors are; nothing in reports without them."""
    found = [lookup(groups, f"{group}.documents") for group in EVALUATIONS]
    counts = [count for count in found if isinstance(count, int) and 0 <= count < 1 << 53]
    if not counts:
        return []
    if counts[0] < 2:
        return ["no standard errors: all of the text is one document"]
    return [f"± standard error over {counts[0]:,} documents (jackknife)"]


def table(reports: Mapping[str, Report] | Sequence[tuple[str, Report]]) -> Table:
    """One dictionary: a row a figure, with its meaning. Several: a row a dictionary, or a column if too wide."""
    rows = list(reports.items()) if isinstance(reports, Mapping) else list(reports)
    shown = [each for each in shown_figures() if any(value_of(report.groups, *each) is not None for _, report in rows)]
    if len(rows) == 1:
        name, report = rows[0]
        result = Table(title=name, title_justify="left", caption_justify="left")
        errors = [error_of(report.groups, group, figure) for group, figure in shown]
        for title in ("figure", "value", *(["±"] if any(errors) else []), "meaning"):
            result.add_column(title, justify="right" if title in ("value", "±") else "left")
        for (group, figure), error in zip(shown, errors, strict=True):
            value = figure.shape.format(value_of(report.groups, group, figure))
            result.add_row(figure.title, value, *([error] if any(errors) else []), figure.meaning)
        result.caption = Text("\n".join(report._notes())) if report._notes() else None
        return result
    told = list(dict.fromkeys(note for _, report in rows for note in over_documents(report.groups)))
    told += [f"{name}: {note}" for name, report in rows for note in notes(report.about)]
    result = Table(caption=Text("\n".join(told)) if told else None, caption_justify="left")
    cells = [[figure.title, *(_cell(r, group, figure, "\n±") for _, r in rows)] for group, figure in shown]
    widths = [
        min(_NAME, max(map(cell_len, ["dictionary", *(name for name, _ in rows)]))),
        *(max(cell_len(line) for cell in column for line in cell.split("\n")) for column in cells),
    ]
    if sum(widths) + 3 * len(widths) + 1 > WIDTH:  # a column a dictionary
        for name in ["figure", *(name for name, _ in rows)]:
            result.add_column(name, justify="left" if name == "figure" else "right", overflow="fold")
        for column in cells:
            result.add_row(*column)
        return result
    result.add_column("dictionary", overflow="fold")
    for title, *_ in cells:
        result.add_column(title, justify="right", no_wrap=True)
    for i, (name, _) in enumerate(rows, start=1):
        result.add_row(name, *(column[i] for column in cells))
    return result


def _cell(report: Report, group: str, figure: Figure, between: str) -> str:
    """A figure and its standard error."""
    value, error = value_of(report.groups, group, figure), error_of(report.groups, group, figure)
    return "" if value is None else figure.shape.format(value) + (f"{between}{error}" if error else "")


def value_of(groups: Mapping[str, Any], group: str, figure: Figure) -> Any:
    """The figure; None where it is not there, or means nothing."""
    if figure.where and not lookup(groups, f"{group}.{figure.where}"):
        return None
    return lookup(groups, f"{group}.{figure.key}")


def lookup(figures: Any, key: str) -> Any:
    """The figure at a dotted key, which leads through groups; None where it is not there."""
    value = figures
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not (abs(value) < float("inf")):
        return None
    return value
