"""Write ``docs/speed.md``: of each benchmark and machine the latest result, and how all of them came about.

python scripts/bench/page.py
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import history, machine_name, table

PAGE = Path(__file__).parents[2] / "docs" / "speed.md"
GIB = 2**30
Result = dict[str, Any]


def prose(text: str) -> str:
    """A paragraph."""
    return textwrap.fill(" ".join(text.split()), 118, break_on_hyphens=False, break_long_words=False) + "\n"


def where(machine: dict[str, Any]) -> str:
    """The machine in a line."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    has = ", ".join(machine["bfloat16"]) or "none"
    return (
        f"{machine['processor']}, {machine['cores']} cores, instructions for bfloat16: {has}; "
        f"Python {machine['python']}, {versions}; {machine['date'][:10]}"
    )


def spread(figures: dict[str, float]) -> str:
    """Median and range in milliseconds."""
    return f"{figures['median_ms']:,.0f} ({figures['min_ms']:,.0f}–{figures['max_ms']:,.0f})"


def shape_line(name: str, shape: dict[str, int]) -> str:
    """The numbers of a shape."""
    return f"Shape {name}: d = {shape['d']:,}, F = {shape['F']:,}, k = {shape['k']}, n = {shape['n']:,}\n"


def step_section(result: Result) -> list[str]:
    """Whole steps and their stages."""
    largest, arms = [(name, shape["arms"]) for name, shape in result["shapes"].items()][-1]
    runs = next(iter(arms.values()))["step"]["runs"]
    lines = [
        prose(
            f"""All that a run does with a batch in memory: selection, reconstruction, gradients, projection,
            clipping, Adam, renormalisation, statistics. *Ratio* is to one float32 encoder product (n × d by d × F),
            timed between the steps of the same process. *Rescored* is the share of rows that the bound on bfloat16
            left undecided. Milliseconds are the median (least–most) of {runs} steps; with the auxiliary loss, a
            tenth of the features are dead. (`step.py`)"""
        ),
    ]
    for name, shape in result["shapes"].items():
        rows = [
            [arm, spread(f["step"]), f"{f['ratio']:.2f}", f"{f['rescored']:.2%}"] for arm, f in shape["arms"].items()
        ]
        lines += [shape_line(name, shape["shape"]), table(rows, ["arm", "ms", "ratio", "rescored"]) + "\n"]
    shown = {arm: f["stages_ms"] for arm, f in arms.items() if arm.startswith(("topk", "mutual"))}
    stages = sorted({s for f in shown.values() for s in f}, key=lambda s: -max(f.get(s, 0) for f in shown.values()))
    rows = [[s, *(f"{f.get(s, 0):.1f}" for f in shown.values())] for s in stages]
    product = {arm: f["product"]["median_ms"] for arm, f in arms.items()}["topk bf16_select"]
    approximate = arms["topk bf16_select"]["stages_ms"]["encoder product"]
    lines += [
        prose(
            f"""Where the time goes in shape {largest}, in milliseconds (mean of three further steps). The bfloat16
            product alone takes {approximate / product:.2f} of the float32 one on this processor; processors with
            matrix units are unmeasured."""
        ),
        table(rows, ["stage", *shown]) + "\n",
    ]
    return lines


def peers_section(result: Result) -> list[str]:
    """Other packages' trainers."""
    lines = [
        prose(
            f"""The same batches, TopK, each package's own step in an environment of its own, alternating with ours.
            *Default* is float32 as the package comes; *tuned* has bfloat16 autocast and uses freed memory again.
            sparsify's default optimiser is a sign descent with one moment, which has less to do and to hold than
            Adam. Packages: {", ".join(package.split()[0] for package in result["packages"].values())}. (`peers.py`)"""
        ),
    ]
    head = ["trainer", "ms", "saekit bf16_select", "times as long", "as fp32", "peak GiB", "saekit"]
    for name, shape in result["shapes"].items():
        rows = [
            [
                trainer,
                spread(f["peer"]),
                spread(f["bf16_select"]),
                f"{f['times bf16_select']:.1f}",
                f"{f['times fp32']:.1f}",
                f"{f['peer']['peak_bytes'] / GIB:.2f}",
                f"{f['bf16_select']['peak_bytes'] / GIB:.2f}",
            ]
            for trainer, f in shape["trainers"].items()
        ]
        lines += [shape_line(name, shape["shape"]), table(rows, head) + "\n"]
    return lines


def end_to_end_section(result: Result) -> list[str]:
    """Text to dictionary."""
    s = result["settings"]
    rows = []
    for width, arms in result["widths"].items():
        base = arms["sae_lens default"]["tokens_per_second"]
        for arm, f in arms.items():
            seconds = f"{f['median_ms'] / 1e3:.1f} ({f['min_ms'] / 1e3:.1f}–{f['max_ms'] / 1e3:.1f})"
            rows.append(
                [f"{int(width):,}", arm, f["tokens_per_second"], seconds, f"{f['tokens_per_second'] / base:.1f}"]
            )
    return [
        prose(
            f"""The embedded model, {s["tokens"]:,} tokens, k = {s["k"]}, batches of {s["batch_size"]:,}: reading,
            tokenising, the forward pass, training; ours also saves. Against {result["packages"]}. At the smaller width
            most of our time is the model's float32 forward pass up to the hook. (`end_to_end.py`)"""
        ),
        table(rows, ["width", "trainer", "tokens/s", "seconds", "times SAELens"]) + "\n",
    ]


def data_section(result: Result) -> list[str]:
    """What feeds the step."""
    harvest, cache = result["harvest"], result["cache"]
    rows = [
        [name, spread(f), f"{f['bytes'] / f['median_ms'] / 1e6:.2f}"]
        for name, f in cache.items()
        if isinstance(f, dict)
    ]
    streams = ", ".join(f"{f['share']:.1%} ({name})" for name, f in result["stream"].items())
    return [
        prose(
            f"""The harvest of the embedded model runs at {harvest["share"]:.0%} of the rate of the bare forward
            pass that ends at the hook ({spread(harvest["harvest"])} ms against {spread(harvest["bare"])} ms for
            {harvest["tokens"]:,} positions). A cache is written at {cache["write share"]:.0%} and read at
            {cache["read share"]:.0%} of the rate of plain files of the same bytes. All are flushed to the disk, and
            all are read while the system still holds them in memory; checksums are part of the writing. (`data.py`)"""
        ),
        table(rows, ["", "ms", "GB/s"]) + "\n",
        prose(
            f"""Share of a run's time in which a step waits for its batch (TopK, width 4,096): {streams}. On two
            cores a live harvest and the step share the processors, so that this waiting is the harvest's own time."""
        ),
    ]


def growth_section(result: Result) -> list[str]:
    """How time and memory grow."""
    rows = []
    for name, f in result["sizes"].items():
        approximate, exact = f["bf16_select"], f["fp32"]
        rows.append(
            [
                name,
                spread(approximate),
                spread(exact),
                *(f"{b / GIB:.2f}" for b in (approximate["peak_bytes"], exact["peak_bytes"], f["state_bytes"])),
                f"{(approximate['peak_bytes'] - f['torch_bytes']) / (f['state_bytes'] + f['batches_bytes']):.2f}",
            ]
        )
    torch_alone = next(iter(result["sizes"].values()))["torch_bytes"] / GIB
    return [
        prose(
            f"""Each of F, k, n and d alone, the others as in shape A; and shape B. The peak is that of the whole
            process. The last column leaves out what torch and Python take by themselves ({torch_alone:.2f} GiB) and
            divides by the least there can be: weights, gradients and two moments, 16 bytes a parameter, and the
            four batches in memory. (`growth.py`)"""
        ),
        table(rows, ["size", "bf16_select ms", "fp32 ms", "peak GiB", "in fp32", "16 B a parameter", "of the least"])
        + "\n",
    ]


def latest(name: str) -> dict[str, Result]:
    """The last result of a benchmark on each machine."""
    return {machine_name(result): result for result in history(name)}


SECTIONS: dict[str, tuple[str, Callable[[Result], list[str]]]] = {
    "step": ("One step", step_section),
    "peers": ("Other trainers", peers_section),
    "end_to_end": ("From text to a dictionary", end_to_end_section),
    "data": ("Activations", data_section),
    "growth": ("Growth", growth_section),
}


def _step(result: Result) -> str:
    name, shape = list(result["shapes"].items())[-1]
    arm, figures = next(iter(shape["arms"].items()))
    return f"shape {name}, {arm}: {spread(figures['step'])} ms, ratio {figures['ratio']:.2f}"


def _peers(result: Result) -> str:
    name, shape = list(result["shapes"].items())[-1]
    times = {trainer: figures["times bf16_select"] for trainer, figures in shape["trainers"].items()}
    quickest = min(times, key=lambda trainer: times[trainer])
    return f"shape {name}: the quickest other, {quickest}, takes {times[quickest]:.1f} times as long"


def _end_to_end(result: Result) -> str:
    width, arms = list(result["widths"].items())[-1]
    arm, figures = next(iter(arms.items()))
    return f"width {int(width):,}, {arm}: {figures['tokens_per_second']:,.0f} tokens/s"


def _data(result: Result) -> str:
    harvest, cache = result["harvest"]["share"], result["cache"]
    return f"harvest {harvest:.0%}, cache written {cache['write share']:.0%}, read {cache['read share']:.0%}"


def _growth(result: Result) -> str:
    name, figures = list(result["sizes"].items())[-1]
    figures = figures["bf16_select"]
    return f"shape {name}, bf16_select: {spread(figures)} ms, peak {figures['peak_bytes'] / GIB:.2f} GiB"


def _load(result: Result) -> str:
    return ", ".join(f"{name} {result[name]['gib_per_second']:.2f} GiB/s" for name in ("write", "read", "verify"))


HEADLINES: dict[str, Callable[[Result], str]] = {
    "step": _step, "peers": _peers, "end_to_end": _end_to_end, "data": _data, "growth": _growth, "load": _load,
}  # fmt: skip


def history_section() -> list[str]:
    """One line for every result there is."""
    rows = []
    for name, headline in HEADLINES.items():
        for result in reversed(history(name)):
            machine = result["machine"]
            told = [machine["date"][:10], machine["commit"], machine_name(result), machine["versions"]["torch"]]
            rows.append([name, *told, headline(result)])
    return [
        "## History\n",
        prose(
            """All results in `scripts/bench/results/`, the latest first. The commit is the one that was measured; of
            those of 22 November 2026, the one that they came with."""
        ),
        table(rows, ["benchmark", "date", "commit", "machine", "torch", "in short"]) + "\n",
    ]


def page() -> str:
    """The page as it should be."""
    results = {name: latest(name) for name in SECTIONS}
    shown = [result for name in SECTIONS for result in results[name].values()]
    shown.sort(key=lambda result: str(result["machine"]["date"][:10]), reverse=True)
    machines = list(dict.fromkeys(map(machine_name, shown)))
    first = where(shown[0]["machine"])
    lines = [
        "# Speed\n",
        prose(
            """Written by `python scripts/bench/page.py` from the results in `scripts/bench/results/`, where each run of
            a benchmark in `scripts/bench/` leaves a file of its own. The machine is shared and noisy: compare ratios,
            which were taken in one run."""
        ),
        prose(f"Measured on {first}."),
    ]
    if not any(result.get("device", "cpu") != "cpu" for result in results["step"].values()):
        lines.append(
            prose(
                """CUDA and every other accelerator is unmeasured; there, everything runs through plain PyTorch
                operations."""
            )
        )
    for machine in machines:
        for name, (title, section) in SECTIONS.items():
            if result := results[name].get(machine):
                lines.append(f"## {title}\n" if machine == machines[0] else f"## {title}: {machine}\n")
                if where(result["machine"]) != first:
                    lines.append(prose(f"Measured on {where(result['machine'])}."))
                lines += section(result)
    return "\n".join([*lines, *history_section()]).rstrip() + "\n"


def main() -> None:
    """Write the page."""
    PAGE.write_text(page())
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
