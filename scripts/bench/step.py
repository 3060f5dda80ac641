"""Time one training step, whole and stage by stage, against one float32 encoder product in the same process.

    python scripts/bench/step.py --shape B

A step is all that a real run does with a batch in memory: selection, reconstruction, gradients, projection, clipping,
Adam, renormalisation, statistics. Steps and products alternate, so that a slow moment of the machine meets both.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from common import SHAPES, Shape, activations, machine, save, spread, table

from saekit.kernels import scores
from saekit.trainers import TrainConfig, auxiliary, backward, optimizer, terms, trainer
from saekit.trainers.data import TrainingData
from saekit.trainers.lanes import SAMPLE
from saekit.trainers.trainer import Trainer

DEAD_SHARE = 0.1
STAGES: dict[str, list[tuple[Any, str]]] = {
    "rounding to bfloat16": [(scores._Rounded, "__init__")],
    "encoder product": [(scores.Scores, "rows"), (scores.ApproximateScores, "rows")],
    "exact scores of candidates": [(scores.Scores, "at")],
    "scan and choice": [
        (trainer.Selection, name) for name in ("token_choice", "mutual_choice", "feature_choice", "gradient_choice")
    ],
    "decode": [(terms, "sum_by_token")],
    "products at matches": [(backward, "pair_products")],
    "sums by feature": [(backward, "sum_by_feature")],
    "auxiliary loss": [(auxiliary, "auxiliary_step")],
    "projection, clip, Adam": [(optimizer.DictionaryAdam, "step")],
    "statistics": [(trainer.Statistics, "update")],
}


class Bench:
    """A trainer on batches in memory."""

    def __init__(self, shape: Shape, batches: list[Tensor], variant: str, precision: str, aux: str = "none") -> None:
        n, gradients = shape.n, variant == "gradient_topk"
        self.rows = [torch.cat([x, torch.randn_like(x)], dim=1) if gradients else x for x in batches]
        config = TrainConfig(
            variant=variant,
            width=shape.F,
            k=shape.k,
            batch_size=n,
            tokens=n * 1000,
            precision=precision,  # type: ignore[arg-type]
            aux=aux,
            dead_after=10**9,
            device=batches[0].device.type,
            **({"feature_choice_fraction": 1.0} if variant == "feature_choice" else {}),
        )
        data = TrainingData({}, lambda first: iter(()), 1, gradients, lambda: iter(()))
        enough = itertools.islice(itertools.cycle(self.rows), -(-SAMPLE // n))
        self.trainer = Trainer(config, data, torch.cat(list(enough))[:SAMPLE], batches[0].device)
        self.d = shape.d

    def step(self) -> dict[str, float]:
        """One step; where there is an auxiliary loss, a tenth of the features count as dead in each."""
        trained = self.trainer
        if trained.config.aux != "none":
            trained.statistics.since_fired[:: round(1 / DEAD_SHARE)] = 2 * 10**9
        rows = self.rows[trained.step % len(self.rows)]
        gradients = rows[:, self.d :] if trained.data.gradients else None
        metrics = trained.train_step(trained.units(rows[:, : self.d]), gradients)
        trained.step += 1
        return metrics


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """How long it takes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@contextmanager
def timed_stages(device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds of each stage while it is entered; what a stage calls of another counts for that one alone."""
    spent_by: dict[str, float] = defaultdict(float)
    running: list[float] = []

    def timed(label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            running.append(0.0)
            result: list[Any] = []
            spent = seconds(lambda: result.append(function(*arguments, **options)), device)
            spent_by[label] += spent - running.pop()
            if running:
                running[-1] += spent
            return result[0]

        return call

    with ExitStack() as stack:
        for label, places in STAGES.items():
            for owner, name in places:
                stack.enter_context(mock.patch.object(owner, name, timed(label, getattr(owner, name))))
        yield spent_by


def measure(shape: Shape, arms: list[tuple[str, str, str]], repeats: int, device: str) -> dict[str, Any]:
    """Figures of each arm (variant, precision, auxiliary loss), one after another."""
    batches = activations(shape, device=device)
    where = batches[0].device
    W = torch.randn(shape.F, shape.d, device=device)
    product = torch.empty(shape.n, shape.F, device=device).fill_(0)
    results = {}
    for variant, precision, aux in arms:
        bench = Bench(shape, batches, variant, precision, aux)
        steps, products, rescored = [], [], []
        for _ in range(2 + repeats):
            products.append(seconds(partial(torch.mm, batches[0], W.T, out=product), where))
            steps.append(seconds(lambda step=bench.step, shares=rescored: shares.append(step()["rescored"]), where))
        steps, products, rescored = steps[2:], products[2:], rescored[2:]  # buffers are made in the first
        with timed_stages(where) as stages:
            whole = seconds(lambda step=bench.step: [step() for _ in range(3)], where)
        figures = {"step": spread(steps), "product": spread(products)}
        figures["ratio"] = figures["step"]["median_ms"] / figures["product"]["median_ms"]
        figures["rescored"] = sum(rescored) / len(rescored)
        figures["stages_ms"] = {label: 1e3 * spent / 3 for label, spent in stages.items()}
        figures["stages_ms"]["all else"] = 1e3 * (whole - sum(stages.values())) / 3
        name = " ".join([variant, precision] + ([aux] if aux != "none" else []))
        results[name] = figures
        print(f"{name:34} {figures['step']['median_ms']:8.1f} ms  ratio {figures['ratio']:.3f}", flush=True)
        del bench
    return results


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="A, B or C; may be given again")
    parser.add_argument("--variant", action="append", help="default: all four and the auxiliary loss")
    parser.add_argument("--precision", action="append", choices=["fp32", "bf16_select"])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    variants = asked.variant or ["topk", "mutual_choice", "feature_choice", "gradient_topk"]
    arms = [(v, p, "none") for p in asked.precision or ("bf16_select", "fp32") for v in variants]
    if asked.variant is None:
        arms += [("topk", p, "aux_k") for p in asked.precision or ("bf16_select", "fp32")]
    result: dict[str, Any] = {"machine": machine(), "device": asked.device, "shapes": {}}
    for name in asked.shape or ["A", "B"]:
        print(f"shape {name}: {SHAPES[name]}")
        figures = measure(SHAPES[name], arms, asked.repeats, asked.device)
        result["shapes"][name] = {"shape": SHAPES[name]._asdict(), "arms": figures}
        rows = [
            [arm, f["step"]["median_ms"], f"{f['step']['min_ms']:.0f}–{f['step']['max_ms']:.0f}", f"{f['ratio']:.2f}"]
            for arm, f in figures.items()
        ]
        print(table(rows, ["arm", "ms", "min–max", "ratio"]))
    result["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    save("step", result, asked.out)


if __name__ == "__main__":
    main()
