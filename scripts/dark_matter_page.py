"""The tables, verdicts and figures of ``dark_matter``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from studies import MarkedPage

from saekit.evals.dark_matter.figures import at, draw

BEGIN = "<!-- written by scripts/dark_matter: begin -->"
Found = dict[str, Any]
PICTURES = {
    "r2": "R² of the error with its controls; R² of squared norms",
    "width": "FVU against width, with fits",
    "tokens": "error of the largest dictionary against that of the smallest, token by token",
    "shares": "shares of R², norm and cross-entropy of either part of the error",
}


def write_page(found: Found, folder: Path) -> None:
    """Put verdicts and tables into ``dark_matter.md`` between its marks (what stands around them stays), and draw."""
    page = page_in(folder)
    draw(found["study"]["dictionaries"], found["study"]["compared"], folder)
    parts = (
        claims, pictures, vectors, norms, widths, tokens, costs, pursuit, earlier, error_parts, synthetic
    )  # fmt: skip
    body = "\n\n".join("\n".join(part(found)) for part in parts)
    page.write(f"{settings(found)}\n\n{body}")


def page_in(folder: Path) -> MarkedPage:
    """The page in a folder.

    Raises:
        SaekitError: there is one without the marks.
    """
    return MarkedPage(folder / "dark_matter.md", BEGIN, "The dark matter of dictionaries")


def table(head: Iterable[str], rows: Iterable[Iterable[object]], words: int = 1) -> list[str]:
    """A table; all columns but the first ``words`` are numbers."""
    head = list(head)
    marks = ["---"] * words + ["--:"] * (len(head) - words)
    lines = [head, marks, *([str(cell) for cell in row] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def number(value: float | None, digits: int = 3) -> str:
    """A figure, or a dash where there is none."""
    return "–" if value is None or value != value else f"{value:.{digits}f}"


def settings(found: Found) -> str:
    """What everything is of."""
    study = found["study"]
    one = next(iter(study["dictionaries"].values()))
    training = found["settings"]["tokens"]
    return (
        f"TopK dictionaries of the embedded model's `{study['about']['hook']}` (d = {one['d_in']}), {training:,} "
        f"training tokens each; {one['tokens']:,} held-out tokens, without the first fifth and the last position of "
        f"each context of {study['about']['context_length']}. Halves to fit on and to test on: by token "
        f"{one['random']['tokens_fit']:,} and {one['random']['tokens_test']:,}, by document "
        f"{one['document']['tokens_fit']:,} and {one['document']['tokens_test']:,} (seed {one['seed']}). Every figure "
        f"is of the half to test on, by document where nothing else is said."
    )


def claims(found: Found) -> list[str]:
    """The paper's headline claims with our figures and a verdict by a rule that stands beside it."""
    each, pursued = list(found["study"]["dictionaries"].values()), list(found["pursuit"].values())
    random, document = (column(each, f"{split}.plain.r2") for split in ("random", "document"))
    squares_random, squares = (column(each, f"{s}.norms.error.from_x_with_intercept") for s in ("random", "document"))
    width = found["study"]["compared"]["width"]
    falls = [tuple(g[part]["fvu"][-1] / g[part]["fvu"][0] for part in ("total", "nonlinear")) for g in width]
    trained = found["error_parts"].values()
    parts = [tuple(f[part]["reconstruction"]["fvu"] for part in ("linear", "nonlinear")) for f in trained]
    total, left = ("fvu", "plain.fvu_nonlinear")
    moved = [tuple(at(f, f"pursuit.{key}") / at(f, f"document.{key}") for key in (total, left)) for f in pursued]
    early = column(each, "earlier_parts.together.nonlinear.r2_pooled")
    recovered, nonlinear_recovered = (column(each, f"cost.recovered_{part}") for part in ("linear", "nonlinear"))
    r2, nonlinear_norm = column(each, "document.plain.r2_pooled"), column(each, "norm_shares.nonlinear")
    rows = [
        (
            "About half of the error vector is linearly predictable",
            f"R² {span(document)} by document; {span(random)} by token, as the paper splits",
            holds(0.4 < r < 0.6 for r in document),
            "R² by document between 0.4 and 0.6",
        ),
        (
            "Over 90% of its squared norm is",
            f"R² {span(squares)} by document; {span(squares_random)} by token",
            holds(r > 0.9 for r in squares),
            "R² above 0.9",
        ),
        (
            "FVU_nonlinear is about constant in width",
            "; ".join(
                f"L0 {mean(g['l0']):.0f}: × {nonlinear:.2f}, FVU × {total:.2f} over {g['total']['widths'][0]:,} to "
                f"{g['total']['widths'][-1]:,} features"
                for g, (total, nonlinear) in zip(width, falls, strict=True)
            ),
            holds(abs(nonlinear - 1) < 0.1 for _, nonlinear in falls),
            "changes by less than a tenth",
        ),
        (
            "Nonlinear error is harder for a dictionary (0.59 against 0.54)",
            "; ".join(f"FVU {nonlinear:.3f} against {linear:.3f}" for linear, nonlinear in parts),
            holds(nonlinear > linear for linear, nonlinear in parts),
            "larger FVU on it",
        ),
        (
            "Gradient pursuit hardly moves the nonlinear error",
            "; ".join(f"FVU × {total:.3f}, FVU_nonlinear × {nonlinear:.3f}" for total, nonlinear in moved),
            holds(abs(nonlinear - 1) < 0.05 for _, nonlinear in moved),
            "FVU_nonlinear changes by less than a twentieth",
        ),
        (
            "Earlier parts explain up to half of its variance",
            f"pooled R² {span(early)} from all together",
            holds([0.4 < max(early) < 0.6]),
            "the largest R² is between 0.4 and 0.6",
        ),
        (
            "Nonlinear error costs its proportional share",
            f"x̂ + nonlinear recovers {span(nonlinear_recovered)} of x̂'s cost (1 − R²: {span([1 - r for r in r2])}; of "
            f"the norm: {span(nonlinear_norm)}), x̂ + linear {span(recovered)} (R²: {span(r2)})",
            holds(abs(share - (1 - r)) < 0.15 for share, r in zip(nonlinear_recovered, r2, strict=True)),
            "x̂ + nonlinear recovers 1 − R² of the cost, within 0.15",
        ),
    ]
    return table(("claim (arXiv 2410.14670)", "here", "verdict", "holds if"), rows, words=4)


def column(each: list[Found], key: str) -> list[float]:
    """One figure of every dictionary."""
    return [at(f, key) for f in each]


def span(values: list[float]) -> str:
    """From the least to the largest."""
    low, high = min(values), max(values)
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"


def holds(conditions: Iterable[bool]) -> str:
    """The verdict over all dictionaries."""
    met = list(conditions)
    if all(met):
        return "**holds**"
    return f"**holds for {sum(met)} of {len(met)}**" if any(met) else "**does not hold**"


def pictures(found: Found) -> list[str]:
    """Links to the figures."""
    return [f"![{words}](dark_matter_{name}.png)\n" for name, words in PICTURES.items()]


def vectors(found: Found) -> list[str]:
    """R² of the error vector, every kind."""
    keys = (
        "document.fvu", "document.plain.fvu_nonlinear", "random.plain.r2", "document.plain.r2",
        "document.plain.r2_pooled", "document.with_intercept.r2", "document.shrinkage.r2",
        "document.shrinkage.scalar_r2_pooled", "document.shrinkage.r2_beyond_scalar",
    )  # fmt: skip
    head = ["dictionary", "FVU", "FVU_nonlinear", "R² by token", "by document", "pooled", "with intercept"]
    head += ["x̂ rescaled", "of e ≈ s·x + c", "beyond it"]
    rows = [
        (name, *(number(at(f, key), 4 if "fvu" in key else 3) for key in keys))
        for name, f in found["study"]["dictionaries"].items()
    ]
    note = (
        "R²: unweighted mean over dimensions, without an intercept, unless named otherwise; the columns after `by "
        "document` are by document too. *x̂ rescaled*: of the error that x̂ leaves at its best length; *of e ≈ s·x + c*: "
        "by one number s for all dimensions, pooled; *beyond it*: what the whole map explains of the rest."
    )
    return ["## The error vector", "", *table(head, rows), "", note]


def norms(found: Found) -> list[str]:
    """R² of squared norms."""
    keys = ("from_x", "from_x_with_intercept", "from_norm", "from_token", "from_loss", "from_l0")
    last = list(found["study"]["dictionaries"])[-1]
    rows = []
    for name in dict.fromkeys([*found["pursuit"], last]):
        f = found["study"]["dictionaries"][name]
        for part, values in f["document"]["norms"].items():
            at_random = number(f["random"]["norms"][part]["from_x_with_intercept"])
            rows.append((name, part.replace("_", " "), *(number(values[key]) for key in keys), at_random))
    head = ["dictionary", "squared norm of", "x", "x, intercept", "‖x‖", "token's mean", "loss", "L0"]
    note = "R² of squared norms, by what they are predicted from; all baselines have an intercept."
    return ["## The norm test", "", *table([*head, "x, intercept, by token"], rows, words=2), "", note]


def widths(found: Found) -> list[str]:
    """Laws of FVU against width."""
    rows = []
    for group in found["study"]["compared"]["width"]:
        for part, name in (("total", "FVU"), ("nonlinear", "FVU_nonlinear")):
            f = group[part]
            slope = f"{f['slope']:.3f} ({f['slope_interval'][0]:.3f} to {f['slope_interval'][1]:.3f})"
            law = [
                f"{f['law'][key]:.3g} ({f['law_interval'][key][0]:.3g} to {f['law_interval'][key][1]:.3g})"
                for key in "cam"
            ]
            rows.append((f"{mean(group['l0']):.0f}", name, ", ".join(number(v, 4) for v in f["fvu"]), slope, *law))
    features = ", ".join(f"{w:,}" for w in found["study"]["compared"]["width"][0]["total"]["widths"])
    head = ["L0", "", f"at {features} features", "slope in log-log", "c", "a", "m"]
    note = (
        "Fits c + a·F^(−m). In brackets 5 to 95% over draws of groups of documents: what other text would change, not "
        "another training run. Where c or a is at its bound, the points hardly bend, and c, a and m are not told apart."
    )
    return ["## Width", "", *table(head, rows, words=2), "", note]


def tokens(found: Found) -> list[str]:
    """Errors of larger dictionaries predicted by smaller ones'."""
    rows = [
        (p["small"], p["large"], number(p["r2"]), number(p["r2_with_nonlinear"]), number(p["gain"]))
        for p in found["study"]["compared"]["token"]
    ]
    head = ["smaller", "larger", "R² from ‖e‖", "and ‖nonlinear‖", "gain"]
    note = "‖e‖ of the larger dictionary, token by token, from the smaller one's; gain: share of the rest explained."
    return ["## Token by token", "", *table(head, rows, words=2), "", note]


def costs(found: Found) -> list[str]:
    """Cross-entropies."""
    rows = []
    for name, f in found["study"]["dictionaries"].items():
        c, r2 = f["cost"], f["document"]["plain"]["r2_pooled"]
        nats = (number(c[f"ce_{key}"], 4) for key in ("clean", "reconstructed", "linear", "nonlinear"))
        shares = (c["recovered_linear"], r2, f["norm_shares"]["linear"], c["recovered_nonlinear"], 1 - r2)
        rows.append((name, *nats, *map(number, shares), number(f["norm_shares"]["nonlinear"])))
    head = ["dictionary", "CE clean", "x̂", "x̂ + linear", "x̂ + nonlinear", "linear recovers", "R²", "‖linear‖ / ‖e‖"]
    head += ["nonlinear recovers", "1 − R²", "‖nonlinear‖ / ‖e‖"]
    one = next(iter(found["study"]["dictionaries"].values()))["cost"]
    note = f"Nats a token on {one['tokens']:,} predictions; {one['mask']}. R² pooled."
    return ["## What the parts cost the model", "", *table(head, rows), "", note]


def pursuit(found: Found) -> list[str]:
    """Gradient pursuit beside the encoder."""
    rows = []
    for name, f in found["pursuit"].items():
        for who, g, l0 in (("encoder", f["document"], f["l0"]), ("pursuit", f["pursuit"], f["pursuit"]["l0"])):
            values = (number(g["fvu"], 4), number(g["plain"]["fvu_nonlinear"], 4), number(g["plain"]["r2_pooled"]))
            rows.append((name, who, number(l0, 1), *values))
    count = next(iter(found["pursuit"].values()))["tokens"]
    note = f"{count:,} held-out tokens, each with as many steps as the encoder has features there; every step "
    note += "adds a feature that is not chosen yet (our reading)."
    head = ["dictionary", "features by", "L0", "FVU", "FVU_nonlinear", "R² pooled"]
    return ["## Gradient pursuit", "", *table(head, rows, words=2), "", note]


def earlier(found: Found) -> list[str]:
    """Regressions on reconstructions of earlier parts."""
    rows = []
    for name, f in found["study"]["dictionaries"].items():
        for part, targets in f["earlier_parts"].items():
            cells = (number(targets[t]["r2_pooled"]) for t in ("error", "linear", "nonlinear"))
            rows.append((name, Path(part).name, *cells))
    head = ["dictionary", "from the reconstruction of", "error", "linear", "nonlinear"]
    note = "Pooled R², with an intercept; dictionaries of earlier parts have 2,048 features and k = 32."
    return ["## Earlier parts", "", *table(head, rows, words=2), "", note]


def error_parts(found: Found) -> list[str]:
    """Dictionaries trained on the parts of the error."""
    rows = [
        (
            name,
            part,
            number(g["reconstruction"]["fvu"], 4),
            number(g["sparsity"]["l0"], 1),
            f"{g['sparsity']['dead']:,}",
        )
        for name, parts in found["error_parts"].items()
        for part, g in parts.items()
    ]
    one = next(iter(next(iter(found["error_parts"].values())).values()))
    note = (
        f"TopK, {one['sparsity']['features']:,} features, k = 32, the same number of training tokens, by the ordinary "
        f"trainer on caches of the error; FVU on {one['sparsity']['tokens']:,} rows held out from it and from b*."
    )
    head = ["error of", "part", "FVU", "L0", "dead"]
    return ["## Dictionaries of the error's parts", "", *table(head, rows, words=2), "", note]


def synthetic(found: Found) -> list[str]:
    """The control with planted errors."""
    keys = ("planted_absent", "planted_activation", "planted_introduced", "linear", "nonlinear")
    rows = []
    for f in found["synthetic"]:
        total = sum(f[key] for key in keys[:3])
        noise = (number(f["activation_noise"], 0), number(f["reconstruction_noise"], 0), f"{f['removed']:.0%}")
        rows.append((*noise, *(number(f[key] / total) for key in keys), number(f["nonlinear_over_introduced"], 2)))
    head = ["noise of x", "noise of x̂", "matches removed", "absent", "in x", "introduced", "linear"]
    note = (
        "A dictionary's own output takes the place of x, so the error is what was planted: columns 4 to 6, as shares "
        "of the mean squared norm of the whole; then what the estimates find. The last column is 1 where the nonlinear "
        "error is just what was introduced into x̂."
    )
    return ["## Planted errors", "", *table([*head, "nonlinear", "÷ introduced"], rows, words=0), "", note]
