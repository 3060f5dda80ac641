"""The table and the figure of ``compare_variants``."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from studies import MarkedPage

Result = dict[str, Any]
Groups = dict[tuple[str, str, int], list[Result]]  # by arm, auxiliary loss and k
COLOURS = {
    "topk": "#444444",
    "mutual_choice": "#0072b2",
    "mutual_choice raw": "#56b4e9",
    "feature_choice": "#d55e00",
    "gradient_topk": "#009e73",
    "relu": "#999999",
    "jumprelu": "#cc79a7",
    "gated": "#8c6d31",
    "matryoshka": "#7b3294",
    "hierarchical_topk": "#b8a100",
    "frequency_control": "#a50f15",
}
LOSSES = {"none": "", "aux_k": " + aux_k", "aux_zipf": " + aux_zipf"}
BEGIN = "<!-- written by scripts/compare_variants: begin -->"


def write_page(results: list[Result], path: Path, planned: int) -> None:
    """Put the table into the page between its marks (what stands around them stays) and draw the figure beside it."""
    page = MarkedPage(path, BEGIN, "The variants compared")
    best = best_rates(results)
    figure = path.with_suffix(".png")
    draw(best, figure)
    page.write("\n\n".join(filter(None, (table(best, len(results), planned, figure.name), by_rate(results)))))


def best_rates(results: list[Result]) -> list[Result]:
    """Of each arm, loss and k the runs of one learning rate: of the lowest FVU over TopK's at the same L0.

    TopK's own rate is chosen by FVU, its L0 being k. Another k may take another rate.
    """
    by_rate: dict[tuple[str, str, int], dict[float, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for r in results:
        job = r["job"]
        by_rate[job["arm"], job["aux"], job["k"]][job.get("lr", 1.0)].append(r)

    def chosen(keys: list[tuple[str, str, int]], topk: list[Result]) -> list[Result]:
        def figure(runs: list[Result]) -> float:
            at = [topk_at(topk, r["sparsity"]["l0"], "reconstruction", "fvu") if topk else 1.0 for r in runs]
            return mean(r["reconstruction"]["fvu"] / fvu for r, fvu in zip(runs, at, strict=True))

        rates = [by_rate[key].values() for key in keys]
        return [r for runs in rates for r in min(runs, key=figure)]

    topk = chosen([key for key in by_rate if key[:2] == ("topk", "none")], [])
    return topk + chosen([key for key in by_rate if key[:2] != ("topk", "none")], topk)


def grouped(results: list[Result]) -> Groups:
    """The results by arm, auxiliary loss and k: one for each seed."""
    groups: Groups = defaultdict(list)
    for found in results:
        job = found["job"]
        groups[job["arm"], job["aux"], job["k"]].append(found)
    order = list(COLOURS)
    return dict(sorted(groups.items(), key=lambda g: (g[0][2], list(LOSSES).index(g[0][1]), order.index(g[0][0]))))


def topk_at(results: list[Result], l0: float, group: str, key: str) -> float:
    """TopK's figure at this L0, between its runs without auxiliary loss, by a straight line in log-log."""
    points = grouped([r for r in results if r["job"]["arm"] == "topk" and r["job"]["aux"] == "none"]).values()
    x = [mean(r["sparsity"]["l0"] for r in runs) for runs in points]
    y = [mean(r[group][key] for r in runs) for runs in points]
    if not x:
        return float("nan")
    if len(x) > 1 and not min(x) <= l0 <= max(x):  # np.interp would go on flat
        near = slice(0, 2) if l0 < min(x) else slice(-2, None)
        slope, offset = np.polyfit(np.log(x[near]), np.log(y[near]), 1)
        return float(np.exp(offset + slope * np.log(l0)))
    return float(np.exp(np.interp(np.log(l0), np.log(x), np.log(y))))


def table(results: list[Result], done: int, planned: int, figure: str) -> str:
    """One row for each arm, loss and k; several seeds as mean and range."""
    first = results[0]
    settings = first["settings"]
    rate = f"{settings['lr'] / first['job'].get('lr', 1.0):.2e}"  # the first run's, before its factor
    if any(r["job"].get("lr", 1.0) != 1 for r in results):
        rate += " times the best factor of those tried"
    lines = [
        f"Embedded model, width {settings['width']:,}, {settings['tokens']:,} training tokens in batches of "
        f"{settings['batch_size']:,}, learning rate {rate}; {done} of the {planned} runs planned. "
        f"FVU, L0, dead and low on {first['sparsity']['tokens']:,} held-out tokens; cross-entropy (CE, nats "
        f"a token; {first['downstream']['ce_clean']:.4f} without a dictionary) on {first['downstream']['tokens']:,}.",
        "",
        "| k | variant | seeds | L0 | FVU | ÷ TopK's | CE increase | ÷ TopK's | KL | dead | low |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for (arm, aux, k), runs in grouped(results).items():
        ratios = [
            [r[group][key] / topk_at(results, r["sparsity"]["l0"], group, key) for r in runs]
            for group, key in (("reconstruction", "fvu"), ("downstream", "ce_increase"))
        ]
        cells = [
            shown([r["sparsity"]["l0"] for r in runs], ".1f"),
            shown([r["reconstruction"]["fvu"] for r in runs], ".4f"),
            shown(ratios[0], ".3f"),
            shown([r["downstream"]["ce_increase"] for r in runs], ".4f", runs[0]["downstream"]["ce_increase_se"]),
            shown(ratios[1], ".3f"),
            shown([r["downstream"]["kl"] for r in runs], ".4f"),
            shown([r["sparsity"]["dead"] for r in runs], ".0f"),
            shown([r["sparsity"]["underutilised"] for r in runs], ".0f"),
        ]
        lines.append(f"| {k} | {arm}{LOSSES[aux]} | {len(runs)} | {' | '.join(cells)} |")
    lines += [
        "",
        "÷ TopK's: over TopK's figure at the same realised L0 (a straight line in log-log between TopK's runs, mean of "
        "its seeds). KL: nats a token from the model's own predictions. dead: never fired. low: density below a tenth "
        "of the Zipf curve fitted to that dictionary's densities, the dead among them. Several seeds: mean (range); "
        f"one: ± the standard error over {first['downstream']['documents']} documents, the same for all.",
        "",
        f"![FVU and cross-entropy increase against L0; dead and underutilised features; density by rank]({figure})",
    ]
    extra = [r for r in results if "gradient_selection" in r and r["job"]["aux"] == "none" and r["job"]["seed"] == 0]
    if extra:
        lines += [
            "",
            "| gradient_topk, CE increase by selection | k | plain | sampled labels | true labels (leaking) |",
        ]
        lines += ["|---|--:|--:|--:|--:|"]
        for r in sorted(extra, key=lambda r: r["job"]["k"]):
            found = r["gradient_selection"]
            figures = (found["ce_increase_sampled"], found["ce_increase_true_labels_leaking"])
            plain = r["downstream"]["ce_increase"]
            lines.append(
                f"| β = {found['beta']:g} | {r['job']['k']} | "
                + " | ".join(f"{v:.4f}" for v in (plain, *figures))
                + " |"
            )
    return "\n".join(lines)


def by_rate(results: list[Result]) -> str:
    """FVU at each learning rate, where there are several."""
    groups = grouped(results)
    factors = sorted({r["job"].get("lr", 1.0) for r in results})
    if len(factors) == 1:
        return ""
    lines = [
        "FVU at L0, for each factor of the learning rate:",
        "",
        "| k | variant | " + " | ".join(f"× {factor:g}" for factor in factors) + " |",
        "|--:|---|" + "--:|" * len(factors),
    ]
    for (arm, aux, k), runs in groups.items():
        cells = []
        for factor in factors:
            at = [r for r in runs if r["job"].get("lr", 1.0) == factor]
            pairs = (("reconstruction", "fvu", ".4f"), ("sparsity", "l0", ".1f"))
            cells.append(
                " at ".join(f"{mean(r[group][key] for r in at):{spec}}" for group, key, spec in pairs) if at else ""
            )
        lines.append(f"| {k} | {arm}{LOSSES[aux]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(values: list[float], spec: str, error: float | None = None) -> str:
    """One value, with its error if there is one, or the mean and the range of several."""
    if len(values) == 1:
        return format(values[0], spec) + ("" if error is None else f" ± {error:{spec}}")
    return f"{mean(values):{spec}} ({min(values):{spec}} to {max(values):{spec}})"


def draw(results: list[Result], path: Path) -> None:
    """Quality against L0 and densities by rank above, wasted features for each k below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = grouped(results)
    ks = sorted({k for *_, k in groups})
    figure = pyplot.figure(figsize=(15, 9), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    fvu, ce, density = top.subplots(1, 3)
    _quality(fvu, groups, ks, "reconstruction", "fvu", "fraction of variance unexplained (FVU)")
    _quality(ce, groups, ks, "downstream", "ce_increase", "cross-entropy increase, nats a token")
    runs_at = {k: sum(len(runs) for key, runs in groups.items() if key[2] == k) for k in ks}
    _densities(density, groups, max(ks, key=lambda k: (runs_at[k], -abs(ks.index(k) - len(ks) // 2))))
    top.legend(*density.get_legend_handles_labels(), loc="outside right upper")
    for axis, k in zip(np.atleast_1d(bottom.subplots(1, len(ks))), ks, strict=True):
        _waste(axis, {key: runs for key, runs in groups.items() if key[2] == k}, k)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _quality(axis: Any, groups: Groups, ks: list[int], group: str, key: str, title: str) -> None:
    from matplotlib.ticker import ScalarFormatter

    for arm, colour in COLOURS.items():
        runs = [rs for (a, aux, _), rs in groups.items() if a == arm and aux == "none"]
        if runs:
            points = [[(r["sparsity"]["l0"], r[group][key]) for r in rs] for rs in runs]  # by k, by seed
            axis.plot(*np.array([np.mean(p, axis=0) for p in points]).T, "-", color=colour, label=arm)
            axis.plot(*np.concatenate(points).T, "o", color=colour, markersize=4)
    axis.set(xscale="log", yscale="log", xlabel="realised L0, held-out", title=title)
    axis.set_xticks(ks, [str(k) for k in ks])
    axis.xaxis.minorticks_off()
    axis.yaxis.set_minor_formatter(ScalarFormatter())
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.grid(alpha=0.3)


def _densities(axis: Any, groups: Groups, k: int) -> None:
    for arm, colour in COLOURS.items():
        for r in groups.get((arm, "none", k), [])[:1]:
            ranks, values = (np.array(r["sparsity"]["density_by_rank"][name]) for name in ("rank", "density"))
            axis.plot(ranks, np.where(values > 0, values, np.nan), color=colour, label=arm)
            if law := r["sparsity"]["zipf"]:
                axis.plot(ranks, law["scale"] * (ranks + law["shift"]) ** -law["exponent"], ":", color=colour, lw=1)
    axis.set(xscale="log", yscale="log", xlabel="rank of the feature", title=f"density by rank, k = {k}")
    axis.plot([], [], "k:", lw=1, label="fitted Zipf–Mandelbrot law")
    axis.grid(alpha=0.3)


def _waste(axis: Any, groups: Groups, k: int) -> None:
    for row, ((arm, _, _), runs) in enumerate(groups.items()):
        for name, alpha in (("underutilised", 0.4), ("dead", 1.0)):
            share = 100 * mean(r["sparsity"][name] / r["sparsity"]["features"] for r in runs)
            axis.barh(row, share, color=COLOURS[arm], alpha=alpha)
            if name == "underutilised":
                axis.text(share, row, f" {share:.2f}%", va="center", fontsize=8)
    axis.set_yticks(range(len(groups)), [f"{arm}{LOSSES[aux]}" for arm, aux, _ in groups])
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set(xlabel="% of the features", title=f"underutilised (pale) and dead (full), k = {k}")
