"""How often features fire on held-out text, against the budgets that their run gave them.

    python scripts/realised_rates.py runs/baselines/feature_choice-none-k32-seed0 ...

Prints a table with a row for each run of ``feature_choice`` or ``frequency_control`` on the embedded model; the text is
drawn from all held-out documents. A feature's deviation is |rate / budget − 1|, both a token.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from studies import told

import saekit
from saekit.activations import ActivationSource
from saekit.activations.harvesting import harvest
from saekit.errors import SaekitError
from saekit.evals.heldout import draw
from saekit.trainers import TrainConfig
from saekit.trainers.checkpoint import load_checkpoints

BATCH = 16  # contexts


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="realised_rates", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--tokens", type=int, default=400_000)
    arguments = parser.parse_args()
    with told("realised_rates"):
        source = ActivationSource.open()
        contexts = draw(source, arguments.tokens).contexts
        dictionaries = [saekit.load(run) for run in arguments.runs]
        budgets = [budgets_of(run) for run in arguments.runs]
        counts = [torch.zeros_like(each) for each in budgets]
        batches = (contexts.rows(i, i + BATCH) for i in range(0, len(contexts.tokens), BATCH))
        for batch in harvest(source.model, source.hook, batches):
            for sae, count in zip(dictionaries, counts, strict=True):
                count += sae.encode_sparse(batch.x).matches_per_feature()
        tokens, documents = int(contexts.kept.sum()), len(contexts.documents.unique())
        print(f"On {tokens:,} held-out tokens of {documents:,} documents:\n")
        print("| run | L0 | dead | median rate ÷ budget (quartiles) | median deviation | features within 10% |")
        print("|---|--:|--:|--:|--:|--:|")
        for run, count, budget in zip(arguments.runs, counts, budgets, strict=True):
            print(row(run.name, count / tokens, budget))


def row(name: str, rates: torch.Tensor, budgets: torch.Tensor) -> str:
    """One run's; rates and budgets [F] a token."""
    ratio = rates / budgets
    off = (ratio - 1).abs()
    low, middle, high = ratio.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=ratio.dtype)).tolist()
    return (
        f"| {name} | {rates.sum():.1f} | {int((rates == 0).sum())} | {middle:.3f} ({low:.3f} to {high:.3f}) "
        f"| {off.median():.1%} | {(off <= 0.1).double().mean():.0%} |"
    )


def budgets_of(run: Path) -> torch.Tensor:
    """Each feature's budget, in matches a token, from the run's last checkpoint.

    Raises:
        SaekitError: the run has no budgets.
    """
    found = load_checkpoints([run / "checkpoints"], torch.device("cpu"))
    budgets = found[1][0]["variant"].get("budgets") if found else None
    if budgets is None:
        raise SaekitError(f"'{run}' has no budgets: no run of feature_choice or frequency_control past its switch")
    return budgets.double() / TrainConfig.from_yaml(run / "config.yaml", of_a_run=True).batch_size


if __name__ == "__main__":
    main()
