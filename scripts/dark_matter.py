"""Train dictionaries of several widths and sparsities on the embedded model and take their errors apart.

    scripts/dark_matter --out runs/dark_matter --page docs

Every step leaves a folder or a file below ``--out``; what is there already is not done again, so the study can be
stopped and started. ``--page`` receives ``dark_matter.md`` (tables and verdicts) and its figures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from dark_matter_page import page_in, write_page
from rich.console import Console
from rich.progress import Progress, track
from studies import told

import saekit
from saekit.activations import ActivationBatch, ActivationCache, ActivationSource, harvest
from saekit.errors import SaekitError
from saekit.evals import Evaluator, heldout_contexts
from saekit.evals.dark_matter import without_start
from saekit.evals.dark_matter.error_parts import fit_error, write_error_part
from saekit.evals.dark_matter.saved import DarkMatterEvaluator
from saekit.evals.dark_matter.synthetic import synthetic_control
from saekit.evals.report import to_json
from saekit.files import replace_file
from saekit.trainers import TrainConfig, train, train_hooks

HOOK = "blocks.1.hook_resid_post"
EARLIER = ("blocks.0.hook_resid_post", "blocks.1.hook_attn_out", "blocks.1.hook_mlp_out")
D_IN, BATCH = 256, 1024
MIDDLE = 16  # the expansion that is looked at more closely
NOISES = ((0.0, 1.0), (1.0, 0.0), (1.0, 1.0))  # of activations and of reconstructions, in the synthetic control
REMOVED = (0.0, 0.1, 0.25, 0.5)
SETTINGS = ("tokens", "expansion", "k", "eval_tokens", "ce_tokens", "pursuit_tokens")


def main() -> None:
    """Read the command line and do the study."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("runs/dark_matter"), help="folder of the runs and results")
    parser.add_argument("--page", type=Path, help="folder that receives dark_matter.md and its figures")
    parser.add_argument("--tokens", type=int, default=3_000_000, help="training tokens a dictionary")
    parser.add_argument("--expansion", type=int, nargs="+", default=[4, 8, 16, 32], help="widths, in multiples of 256")
    parser.add_argument("--k", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--eval-tokens", type=int, default=600_000, help="held-out tokens of the study")
    parser.add_argument("--ce-tokens", type=int, default=60_000, help="of them spliced, for each dictionary")
    parser.add_argument("--pursuit-tokens", type=int, default=120_000, help="held-out tokens for gradient pursuit")
    arguments = parser.parse_args()
    if MIDDLE not in arguments.expansion or len(set(arguments.expansion)) < 3:
        parser.error(f"--expansion needs three widths at least, {MIDDLE} among them")
    if any(b <= 1.25 * a for a, b in pairwise(sorted(arguments.k))):
        parser.error("--k needs values further apart than a quarter, or they count as the same sparsity")
    with told("dark_matter"):
        Study(arguments).run()


class Study:
    """The steps, each with what it leaves behind."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.out = asked, asked.out
        self.cache = self.out / "cache"
        self.grid = {f"k{k}-w{e * D_IN}": (k, e * D_IN) for k in sorted(asked.k) for e in sorted(asked.expansion)}
        self.closer = [f"k{k}-w{MIDDLE * D_IN}" for k in sorted(asked.k)]

    def run(self) -> None:
        """Do what is not done yet, and write the page."""
        self.out.mkdir(parents=True, exist_ok=True)
        self._remember()
        if self.asked.page is not None:
            page_in(self.asked.page)  # better refused now than when all is done
        steps: list[tuple[str, Path, Callable[[], Any]]] = [
            ("activations", self.cache / "manifest.json", self.harvest),
            *((name, self.out / name / "sae/cfg.json", lambda name=name: self.train(name)) for name in self.grid),
            ("earlier parts", self.out / "earlier" / EARLIER[-1] / "sae/cfg.json", self.train_earlier),
            ("errors taken apart", self.out / "study.json", self.take_apart),
            ("gradient pursuit", self.out / "pursuit.json", self.pursue),
            ("dictionaries of the error's parts", self.out / "error_parts.json", self.train_on_errors),
            ("planted errors", self.out / "synthetic.json", self.plant),
        ]
        for number, (name, product, step) in enumerate(steps, 1):
            done = product.exists()
            Console().print(f"[{number}/{len(steps)}] {name}{' (done)' if done else ''}", markup=False, highlight=False)
            if not done:
                step()
        if self.asked.page is not None:
            names = ("settings", "study", "pursuit", "error_parts", "synthetic")
            write_page({name: json.loads((self.out / f"{name}.json").read_text()) for name in names}, self.asked.page)

    def _remember(self) -> None:
        """Write down the settings; what is in the folder must have been made with the same."""
        path = self.out / "settings.json"
        settings = {name: getattr(self.asked, name) for name in SETTINGS}
        if path.exists() and (before := json.loads(path.read_text())) != settings:
            other = next((name for name in SETTINGS if before.get(name) != settings[name]), "other settings")
            then, now = before.get(other), settings.get(other)
            raise SaekitError(f"'{self.out}' was made with {other} = {then}, not {now}; choose another --out")
        self._save("settings", settings)

    def _save(self, name: str, value: Any) -> None:
        replace_file(self.out / f"{name}.json", lambda part: part.write_text(to_json(value) + "\n"))

    def harvest(self) -> None:
        """A cache that holds the training tokens, beside what a cache keeps for other purposes."""
        source = ActivationSource.open(hook=HOOK)
        wanted = self.asked.tokens + min(self.asked.tokens // 7, 400_000) + BATCH
        batches = track(source.batches("train", wanted), description="harvesting", total=wanted // 8000)
        ActivationCache.write(self.cache, batches, source.provenance("train"), dtype="bfloat16", overwrite=True)

    def train(self, name: str) -> None:
        """One dictionary of the grid."""
        k, width = self.grid[name]
        self._trained(k, width, self.cache, self.out / name)

    def _trained(self, k: int, width: int, cache: Path, out: Path) -> None:
        config = TrainConfig(
            variant="topk", k=k, width=width, tokens=self.asked.tokens, batch_size=BATCH, cache=cache, out=out
        )
        train(config, resume=(out / "config.yaml").exists())

    def train_earlier(self) -> None:
        """Dictionaries of earlier parts, from one pass over the text."""
        out = self.out / "earlier"
        config = TrainConfig(
            variant="topk", k=32, expansion=8, tokens=self.asked.tokens, batch_size=BATCH, out=out, buffer=65_536
        )
        begun = all((out / hook / "config.yaml").exists() for hook in EARLIER)
        train_hooks(config, EARLIER, resume=begun, overwrite=not begun)

    @contextmanager
    def _evaluator(self, tokens: int) -> Iterator[Evaluator]:
        with Progress() as progress:

            def bar(name: str, contexts: int) -> Callable[[int], object]:
                task = progress.add_task(name, total=contexts)
                return lambda done: progress.advance(task, done)

            yield Evaluator(tokens=tokens, on_contexts=bar)

    def take_apart(self) -> None:
        """The suite on the whole grid."""
        with self._evaluator(self.asked.eval_tokens) as evaluator:
            earlier = [self.out / "earlier" / hook for hook in EARLIER]
            suite = DarkMatterEvaluator(evaluator, earlier, ce_tokens=self.asked.ce_tokens)
            reports, compared = suite([self.out / name for name in self.grid])
        found = {Path(path).name: report["dark_matter"] for path, report in reports.items()}
        about = next(iter(reports.values())).about
        self._save("study", {"about": about, "dictionaries": found, "compared": _short(compared)})

    def pursue(self) -> None:
        """The same with features found by gradient pursuit, beside the encoder's on the same tokens."""
        with self._evaluator(self.asked.pursuit_tokens) as evaluator:
            reports, _ = DarkMatterEvaluator(evaluator, pursuit=True, ce_tokens=0)(
                [self.out / name for name in self.closer]
            )
        self._save("pursuit", {Path(path).name: report["dark_matter"] for path, report in reports.items()})

    def train_on_errors(self) -> None:
        """Dictionaries of the linear and of the nonlinear error, by the ordinary trainer, judged on held-out rows."""
        figures: dict[str, Any] = {}
        for name in self.closer:
            sae, cache = saekit.load(self.out / name), ActivationCache.open(self.cache)
            b = None
            for part in ("linear", "nonlinear"):
                place = self.out / "error_parts" / f"{name}-{part}"
                if not (place / "cache/manifest.json").exists():
                    b = b or fit_error(sae, cache)
                    write_error_part(place / "cache", sae, cache, b, part, dtype="bfloat16")  # type: ignore[arg-type]
                self._trained(32, 8 * D_IN, place / "cache", place / "run")
                figures.setdefault(name, {})[part] = Evaluator(tokens=65_536)(place / "run").groups
        self._save("error_parts", figures)

    def plant(self) -> None:
        """The control with planted errors."""
        path = self.out / self.closer[0]
        sae = saekit.load(path)
        source = Evaluator().source_of(sae, str(path))
        contexts = heldout_contexts(source, self.asked.pursuit_tokens, without_start)
        batch = ActivationBatch.concatenate(list(harvest(source.model, source.hook, contexts.split(32))))
        figures = [
            {
                "activation_noise": noise[0],
                "reconstruction_noise": noise[1],
                "removed": removed,
                **synthetic_control(
                    sae,
                    batch.x,
                    activation_noise=noise[0],
                    reconstruction_noise=noise[1],
                    removed=removed,
                    documents=batch.documents,
                ),
            }
            for noise in NOISES
            for removed in track(REMOVED, description=f"noise {noise}")
        ]
        self._save("synthetic", figures)


def _short(value: Any) -> Any:
    """Paths of dictionaries by their last part."""
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_short(item) for item in value]
    return Path(value).name if isinstance(value, str) else value


if __name__ == "__main__":
    main()
