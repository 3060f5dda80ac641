"""Train variants at equal budget on one cache of the embedded model and compare them on held-out text.

    scripts/compare_variants --out runs/compare --page docs/variants.md
    scripts/compare_variants --out runs/baselines --page docs/baselines.md --arms all --lrs 0.5 1 2 --width 1024 \\
        --seeds 1 --aux none

Every run is a folder of its own below ``--out``; what is there already is not done again, so the comparison can be
stopped and started. ``--page`` receives the table, and the figure beside it.

All runs have the same tokens, batches and initial weights (for a seed), and the same learning rates: the default times
each of ``--lrs``. Where there are several, the page shows the best. Judged by the inference rule of
the saved dictionary: cross-entropy on ``--ce-tokens`` held-out tokens; FVU, L0 and who is dead or underutilised on
``--heldout-tokens``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from compare_page import LOSSES, write_page
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, track
from studies import told

import saekit
from saekit.activations import ActivationCache, ActivationSource
from saekit.activations.python_source import Split
from saekit.errors import SaekitError
from saekit.evals import Evaluator, evaluate_activations
from saekit.files import replace_file
from saekit.trainers import TrainConfig, train

# name in the table → settings
ARMS: dict[str, dict[str, Any]] = {
    "topk": {"variant": "topk"},
    "mutual_choice": {"variant": "mutual_choice"},
    "mutual_choice raw": {"variant": "mutual_choice", "affinity_scale": "none"},
    "feature_choice": {"variant": "feature_choice"},
    "gradient_topk": {"variant": "gradient_topk"},
    "relu": {"variant": "relu"},
    "jumprelu": {"variant": "jumprelu"},
    "gated": {"variant": "gated"},
    "matryoshka": {"variant": "matryoshka"},
    "hierarchical_topk": {"variant": "hierarchical_topk"},
    "frequency_control": {"variant": "frequency_control"},
}
PAPERS = tuple(ARMS)[:5]  # what is compared where no arms are named
SETTINGS = ("tokens", "width", "batch_size", "heldout_tokens", "ce_tokens")


@dataclass(frozen=True)
class Job:
    """One run."""

    arm: str
    aux: str
    k: int
    seed: int
    lr: float = 1.0  # times the default

    @property
    def name(self) -> str:
        """Its folder."""
        rate = "" if self.lr == 1 else f"-lr{self.lr:g}"
        return f"{self.arm.replace(' ', '_')}-{self.aux}-k{self.k}-seed{self.seed}{rate}"


def plan(asked: argparse.Namespace) -> list[Job]:
    """The headline sparsity first, then the others, the auxiliary losses, and further seeds of the headline."""
    ks = sorted(asked.k, key=lambda k: (k != asked.headline, k))
    lrs = sorted(asked.lrs, key=lambda lr: (lr != 1, lr))
    main = [arm for arm in asked.arms if not arm.endswith("raw")]
    jobs = [Job(arm, "none", k, 0, lr) for k in ks for lr in lrs for arm in asked.arms]
    jobs += [Job(arm, aux, k, 0) for k in ks for arm in main for aux in asked.aux if aux != "none"]
    return jobs + [Job(arm, "none", asked.headline, seed) for seed in range(1, asked.seeds) for arm in main]


def main() -> None:
    """Read the command line and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder of the runs")
    parser.add_argument("--page", type=Path, help="the page, a .md file; the figure is put beside it")
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, "all"], default=list(PAPERS), metavar="ARM")
    parser.add_argument("--aux", nargs="+", choices=LOSSES, default=list(LOSSES), metavar="LOSS")
    parser.add_argument("--lrs", type=float, nargs="+", default=[1.0], help="learning rates, times the default")
    parser.add_argument("--cache", type=Path, help="cache with gradients; harvested below --out if not given")
    parser.add_argument("--tokens", type=int, default=5_000_000, help="training tokens a run")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--k", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--headline", type=int, default=32, help="the k that is run with every seed")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the headline")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--heldout-tokens", type=int, default=1_000_000)
    parser.add_argument("--ce-tokens", type=int, default=65_536)
    parser.add_argument("--parallel", type=int, default=2, help="runs side by side; the cores are shared out")
    parser.add_argument("--only-page", action="store_true", help="train nothing, write the page from what is there")
    arguments = parser.parse_args()
    if "all" in arguments.arms:
        arguments.arms = list(ARMS)
    if arguments.headline not in arguments.k:
        parser.error(f"--headline {arguments.headline} is none of --k {' '.join(map(str, arguments.k))}")
    with told("compare_variants", BrokenProcessPool):
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Do the runs that are missing and write the page from all of them."""
    jobs = plan(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    finished(jobs, arguments)  # refuses what does not belong together before anything is done
    if not arguments.only_page:
        if arguments.cache is None:
            arguments.cache = arguments.out / "cache"
            apart = min(arguments.tokens // 7, 400_000) + 2048  # what a cache keeps for other purposes, nearly
            harvest(arguments.cache, "train", arguments.tokens + apart, gradients=True)
        check_cache(arguments.cache, arguments.tokens)
        harvest(arguments.out / "heldout", "heldout", arguments.heldout_tokens, gradients=False)
        run_all(jobs, arguments)
    results = finished(jobs, arguments)
    if arguments.page is not None and results:
        write_page(results, arguments.page, len(jobs))


def finished(jobs: list[Job], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The results that are there.

    Raises:
        SaekitError: one was made with other settings.
    """
    found = []
    for path in (result(arguments.out, job) for job in jobs):
        if path.exists():
            found.append(json.loads(path.read_text()))
            for name in SETTINGS:
                asked, made = getattr(arguments, name), found[-1]["settings"].get(name)
                if asked != made:
                    raise SaekitError(f"{path.parent} was made with {name} = {made}, not {asked}; choose another --out")
    return found


def check_cache(path: Path, tokens: int) -> None:
    """Raise SaekitError where a cache has no gradients or is too short."""
    cache = ActivationCache.open(path)
    cache.check_gradients()
    if cache.count("train") < tokens:
        raise SaekitError(f"the cache '{path}' has {cache.count('train'):,} training tokens, not {tokens:,}")


def result(out: Path, job: Job) -> Path:
    """Where a finished run's figures are."""
    return out / job.name / "compare.json"


def harvest(path: Path, part: Split, tokens: int, *, gradients: bool) -> None:
    """A cache of this many tokens of the text, where it is missing."""
    if (path / "manifest.json").exists():
        return
    source = ActivationSource.open()
    batches = track(
        source.batches(part, tokens, gradients=gradients),
        description=f"harvesting {part} activations",
        total=tokens // (2000 if gradients else 8000),  # text tokens in a batch of contexts, nearly
    )
    ActivationCache.write(path, batches, source.provenance(part, gradients=gradients), dtype="bfloat16")


def run_all(jobs: list[Job], arguments: argparse.Namespace) -> None:
    """Train and judge what is missing, several side by side, under one bar over all training tokens."""
    waiting = [job for job in jobs if not result(arguments.out, job).exists()]
    bar = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // arguments.parallel)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    with ProcessPoolExecutor(arguments.parallel, context) as pool, Progress(*bar) as progress:
        steps = arguments.tokens // arguments.batch_size
        task = progress.add_task("", total=steps * len(waiting))
        running: set[Future[None]] = {pool.submit(run_one, job, arguments) for job in waiting}
        try:
            while running:
                done, running = wait(running, timeout=2, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                finished = f"{len(jobs) - len(running)} of {len(jobs)} runs"
                progress.update(
                    task, completed=sum(steps_done(arguments.out, j) for j in waiting), description=finished
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def steps_done(out: Path, job: Job) -> int:
    """How far a run has come, by its metrics."""
    path = out / job.name / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines and lines[-1].endswith("}") else 0


def run_one(job: Job, arguments: argparse.Namespace) -> None:
    """Train one dictionary, or go on with it, and judge it."""
    config = TrainConfig(
        **ARMS[job.arm],
        aux=job.aux,
        k=job.k,
        seed=job.seed,
        width=arguments.width,
        tokens=arguments.tokens,
        batch_size=arguments.batch_size,
        cache=arguments.cache,
        out=arguments.out / job.name,
    )
    if job.lr != 1:
        config = config.replace(lr=job.lr * config.peak_lr)
    train(config, resume=(config.out / "config.yaml").exists(), quiet=True)
    evaluator = Evaluator(model="embedded", tokens=arguments.ce_tokens)
    groups = evaluator(config.out).groups
    heldout = ActivationCache.open(arguments.out / "heldout")
    rows = (heldout.read(start, min(start + 1024, len(heldout))).x.float() for start in range(0, len(heldout), 1024))
    groups |= evaluate_activations(saekit.load(config.out), rows).groups
    last = json.loads((config.out / "metrics.jsonl").read_text().splitlines()[-1])
    facts = {name: getattr(arguments, name) for name in SETTINGS}
    facts |= {"lr": config.peak_lr, "torch": torch.__version__, "seconds": last["seconds"]}
    record = {"job": asdict(job), "settings": facts, **groups}
    replace_file(result(arguments.out, job), lambda part: part.write_text(json.dumps(record, indent=2) + "\n"))


if __name__ == "__main__":
    main()
