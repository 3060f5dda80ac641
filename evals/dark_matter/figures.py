"""Pictures of the dark matter suite."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saekit.evals.dark_matter.error_norms import PARTS
from saekit.evals.dark_matter.scaling import WidthLaw
from saekit.evals.report import lookup
from saekit.files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Figures = Mapping[str, Any]
TOTAL, NONLINEAR = "#444444", "#d55e00"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_VECTOR = {
    "split by token": "random.plain.r2",
    "split by document": "document.plain.r2",
    "… pooled": "document.plain.r2_pooled",
    "… x̂ at its best length": "document.shrinkage.r2",
    "… beyond e ≈ s·x + c": "document.shrinkage.r2_beyond_scalar",
}
_PREDICTORS = {
    "x": "from_x_with_intercept",
    "‖x‖": "from_norm",
    "token's mean": "from_token",
    "loss": "from_loss",
    "L0": "from_l0",
}
_SHARES = {
    "of R² (pooled)": ("document.plain.r2_pooled", None),
    "of the norm": ("norm_shares.linear", "norm_shares.nonlinear"),
    "of cross-entropy": ("cost.recovered_linear", "cost.recovered_nonlinear"),
}


def draw(figures: Mapping[str, Figures], compared: Figures, folder: Path) -> list[Path]:
    """Draw what was found of some dictionaries, and return the files.

    Args:
        figures: the group ``dark_matter`` of each dictionary, by its path or a name.
        compared: what several show together (``ErrorStudy.run``).
        folder: receives ``dark_matter_r2.png``, ``dark_matter_shares.png`` and, where there are several widths,
            ``dark_matter_width.png`` and ``dark_matter_tokens.png``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    short = {name: Path(name).name for name in figures}
    if len(set(short.values())) == len(short):
        figures = {short[name]: found for name, found in figures.items()}
        compared = _renamed(compared, short)
    drawn = [_r2(figures, folder), _shares(figures, folder)]
    if compared.get("width"):
        drawn += [_width(compared["width"], folder), _tokens(figures, compared, folder)]
    return drawn


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _renamed(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_renamed(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value


def at(figures: Figures, key: str) -> float:
    """The figure at a dotted key; NaN where there is none."""
    value = lookup(figures, key)
    return float("nan") if value is None else float(value)


def _axes(columns: int, rows: int = 1, wide: float = 6.0) -> tuple[Any, list[Axes]]:
    from matplotlib.figure import Figure  # not pyplot: nothing of the user's session is touched

    figure = Figure(figsize=(wide * columns, 4.2 * rows), layout="constrained")
    axes = list(np.asarray(figure.subplots(rows, columns, squeeze=False)).flat)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _saved(figure: Any, path: Path) -> Path:
    replace_file(path, lambda part: figure.savefig(part, dpi=120, format="png"))
    return path


def _bars(axes: Axes, values: Mapping[str, list[float]], labels: list[str]) -> None:
    """Groups of bars: one group a label, one colour a series."""
    width = 0.8 / len(values)
    for i, (name, heights) in enumerate(values.items()):
        places = np.arange(len(labels)) + (i - (len(values) - 1) / 2) * width
        axes.bar(places, heights, width, label=name, color=_COLOURS[i % len(_COLOURS)])
    axes.set_xticks(range(len(labels)), labels, rotation=30 if len(labels) > 3 else 0, ha="right")
    if len(labels) <= 3:
        axes.set_xticks(range(len(labels)), labels, ha="center")
    axes.axhline(0, color="black", linewidth=0.8)


def _r2(figures: Mapping[str, Figures], folder: Path) -> Path:
    figure, (left, right) = _axes(2, wide=max(6.0, 0.9 * len(figures) + 2))
    names = list(figures)
    _bars(left, {label: [at(figures[n], key) for n in names] for label, key in _VECTOR.items()}, names)
    left.set_title("R² of the error vector on x")
    left.legend(fontsize=8)
    last = names[-1]
    parts = [part.replace("_", " ").replace("x hat", "x̂").replace("plus", "+") for part in PARTS]
    values = {
        label: [max(at(figures[last], f"document.norms.{part}.{key}"), -0.2) for part in PARTS]
        for label, key in _PREDICTORS.items()
    }
    _bars(right, values, parts)
    right.set_title(f"R² of squared norms, by document ({last}; cut at −0.2)")
    right.legend(fontsize=8)
    return _saved(figure, folder / "dark_matter_r2.png")


def _shares(figures: Mapping[str, Figures], folder: Path) -> Path:
    figure, axes = _axes(2, wide=max(6.0, 0.7 * len(figures) + 2))
    for i, (part, ax) in enumerate(zip(("linear", "nonlinear"), axes, strict=True)):
        values = {}
        for label, keys in _SHARES.items():
            key = keys[i]
            values[label] = [1 - at(f, keys[0] or "") if key is None else at(f, key) for f in figures.values()]
        _bars(ax, values, list(figures))
        ax.set_title(f"share of the {part} error")
        ax.set_ylim(min(0.0, *(v for column in values.values() for v in column if v == v)) - 0.02, 1.1)
        ax.legend(fontsize=8)
    return _saved(figure, folder / "dark_matter_shares.png")


def _width(groups: list[Figures], folder: Path) -> Path:
    figure, axes = _axes(len(groups), wide=5.5)
    for ax, group in zip(axes, groups, strict=True):
        for part, colour in (("total", TOTAL), ("nonlinear", NONLINEAR)):
            found = group[part]
            widths, fvu = np.array(found["widths"]), np.array(found["fvu"])
            low, high = np.array(found["fvu_interval"]).T
            bars = np.maximum(0, [fvu - low, high - fvu])
            name = "FVU" if part == "total" else "FVU of x̂ + linear error"
            ax.errorbar(widths, fvu, bars, fmt="o", color=colour, capsize=3, label=name)
            if "law" in found:
                law = WidthLaw(**found["law"])
                curve = np.geomspace(widths.min() * 0.8, widths.max() * 1.6, 100)
                told = f"{law.c:.3f} + {law.a:.2g}·F^(−{law.m:.2f})"
                ax.plot(curve, law(curve), color=colour, linewidth=1, label=told)
        ax.set_xscale("log")
        ax.set_xticks(group["total"]["widths"], [f"{width:,}" for width in group["total"]["widths"]])
        ax.minorticks_off()
        ax.set_ylim(bottom=0)
        ax.set_xlabel("features")
        ax.set_title(f"L0 ≈ {np.mean(group['l0']):.0f}; bars: 5–95% over documents")
        ax.legend(fontsize=8)
    return _saved(figure, folder / "dark_matter_width.png")


def _tokens(figures: Mapping[str, Figures], compared: Figures, folder: Path) -> Path:
    figure, axes = _axes(len(compared["width"]), wide=5.0)
    for ax, group in zip(axes, compared["width"], strict=True):
        small, large = group["dictionaries"][0], group["dictionaries"][-1]
        x, y = (figures[name]["sample"]["error"] for name in (small, large))
        ax.scatter(x, y, s=8, alpha=0.5, color=TOTAL, linewidths=0)
        top = max(*x, *y)
        ax.plot([0, top], [0, top], color="#bbbbbb", linewidth=1)
        pair = next(p for p in compared["token"] if (p["small"], p["large"]) == (small, large))
        ax.set_title(f"R² {pair['r2']:.3f}; with ‖nonlinear‖ {pair['r2_with_nonlinear']:.3f}", fontsize=10)
        ax.set_xlabel(f"‖e‖ of {small}")
        ax.set_ylabel(f"‖e‖ of {large}")
    return _saved(figure, folder / "dark_matter_tokens.png")
