"""What an evaluation found: figures in groups, as JSON and as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from saekit.files import replace_file

# title, group, key, format, meaning
_FIGURES = (
    ("L0", "sparsity", "l0", "{:.1f}", "active features a token"),
    ("dead", "sparsity", "dead", "{:,d}", "features that never fired on these tokens"),
    (
        "low",
        "sparsity",
        "underutilised",
        "{:,d}",
        "features below a tenth of the fitted Zipf curve, the dead among them",
    ),
    ("features", "sparsity", "features", "{:,d}", "width of the dictionary"),
    ("FVU", "reconstruction", "fvu", "{:.4f}", "fraction of the activations' variance unexplained"),
    ("cosine", "reconstruction", "cosine", "{:.4f}", "mean cosine of x and x̂"),
    ("CE", "downstream", "ce_clean", "{:.3f}", "nats a token of the model as it is"),
    ("CE with x̂", "downstream", "ce_reconstructed", "{:.3f}", "with the reconstruction spliced in"),
    ("CE with 0", "downstream", "ce_zero", "{:.3f}", "with zeros in place of the activations"),
    ("recovered", "downstream", "recovered_share", "{:.4f}", "share of the cross-entropy between those two kept"),
    ("KL", "downstream", "kl", "{:.4f}", "nats a token from the model's own predictions"),
    (
        "CE sampled",
        "gradient_selection",
        "ce_reconstructed_sampled",
        "{:.3f}",
        "x̂ selected by gradients of sampled labels",
    ),
    (
        "CE leaking",
        "gradient_selection",
        "ce_reconstructed_true_labels_leaking",
        "{:.3f}",
        "of true labels: leaks them",
    ),
    ("tokens", "sparsity", "tokens", "{:,d}", "held-out tokens; CE and KL score those with a next one"),
)


@dataclass(frozen=True)
class Report:
    """Figures of one dictionary.

    Attributes:
        groups: ``sparsity``, ``reconstruction`` and, with a model, ``downstream``; each names its number of tokens. For
            gradient TopK also ``gradient_selection``.
        about: what was evaluated on what.
    """

    groups: dict[str, dict[str, Any]]
    about: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, group: str) -> dict[str, Any]:
        return self.groups[group]

    def to_dict(self) -> dict[str, Any]:
        """The groups, and ``about``."""
        return {"about": self.about, **self.groups}

    def to_json(self) -> str:
        """The same as JSON text; figures that are not finite become null."""
        return json.dumps(_finite(self.to_dict()), indent=2, allow_nan=False)

    def save(self, path: str | Path) -> None:
        """Write ``to_json()`` to a file."""
        replace_file(Path(path), lambda part: part.write_text(self.to_json() + "\n"))


def table(reports: Mapping[str, Report] | Sequence[tuple[str, Report]]) -> Table:
    """One dictionary: a row a figure, with its meaning. Several: a row a dictionary."""
    rows = list(reports.items()) if isinstance(reports, Mapping) else list(reports)
    figures = [figure for figure in _FIGURES if any(figure[1] in report.groups for _, report in rows)]
    if len(rows) == 1:
        name, report = rows[0]
        result = Table(title=name, title_justify="left")
        for title in ("figure", "value", "meaning"):
            result.add_column(title, justify="right" if title == "value" else "left")
        for title, group, key, shape, meaning in figures:
            result.add_row(title, shape.format(report[group][key]), meaning)
        return result
    result = Table()
    result.add_column("dictionary", overflow="fold")
    for title, *_ in figures:
        result.add_column(title, justify="right", no_wrap=True)
    for name, report in rows:
        cells = (shape.format(report[g][key]) if g in report.groups else "" for _, g, key, shape, _ in figures)
        result.add_row(name, *cells)
    return result


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not (abs(value) < float("inf")):
        return None
    return value
