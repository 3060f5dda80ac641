"""The comparison's table and figure, from results that are made up."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest

from saekit import SaekitError
from saekit.activations import ActivationCache

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("compare_variants"), importlib.import_module("compare_page")
    sys.path.remove(str(SCRIPTS))


def made_up(job, fvu, l0):
    """FVU and cross-entropy that are powers of L0, so that lines in log-log are exact."""
    sparsity = {"tokens": 10, "features": 100, "l0": l0, "dead": 1, "underutilised": 3}
    sparsity |= {"density_by_rank": {"rank": [1, 10, 100], "density": [0.5, 0.1, 0.0]}}
    sparsity |= {"zipf": {"exponent": 1.0, "shift": 1.0, "scale": 1.0, "r2": 1.0}}
    return {
        "job": dataclasses.asdict(job),
        "settings": {"tokens": 1000, "width": 100, "batch_size": 10, "lr": 1e-3, "heldout_tokens": 10, "ce_tokens": 5},
        "sparsity": sparsity,
        "reconstruction": {"fvu": fvu},
        "downstream": {
            "tokens": 5,
            "ce_clean": 2.0,
            "ce_increase": fvu / 2,
            "ce_increase_se": 0.01,
            "documents": 3,
            "kl": fvu / 3,
        },
    }


def asked(scripts, **changes):
    """What the command line gives, with these changes."""
    names = {"arms": list(scripts[0].PAPERS), "aux": list(scripts[1].LOSSES), "lrs": [1.0], "headline": 32}
    return argparse.Namespace(**{**names, **changes})


def test_the_plan(scripts):
    jobs = scripts[0].plan(asked(scripts, k=[16, 32], seeds=3))
    assert len(set(jobs)) == len(jobs) == 10 + 16 + 8
    assert {job.seed for job in jobs if job.k == 16} == {0}
    assert {job.aux for job in jobs if job.arm == "mutual_choice raw"} == {"none"}


def test_table_and_figure(scripts, tmp_path):
    compare, page = scripts
    results = []
    for job in compare.plan(asked(scripts, k=[16, 32, 64], seeds=2)):
        l0 = job.k if job.arm == "topk" else 0.9 * job.k
        better = 1.0 if job.arm == "topk" else 0.8
        results.append(made_up(job, better * 2 / l0, l0))
    # between TopK's runs, and before the first one, the ratio is what was put in
    assert page.topk_at(results, 45.0, "reconstruction", "fvu") == pytest.approx(2 / 45)
    assert page.topk_at(results, 10.0, "reconstruction", "fvu") == pytest.approx(2 / 10)
    (tmp_path / "variants.md").write_text(f"words before\n{page.BEGIN}\nold\n<!-- end -->\nwords after\n")
    page.write_page(results, tmp_path / "variants.md", planned=len(results))
    text = (tmp_path / "variants.md").read_text()
    assert text.startswith("words before")
    assert text.endswith("words after\n")
    assert "old" not in text
    rows = [line for line in text.splitlines() if line.startswith("| 16 | mutual_choice |")]
    assert [cell.strip() for cell in rows[0].split("|")[3:7]] == ["1", "14.4", "0.1111", "0.800"]
    assert text.count("| 32 | topk |") == 1, "seeds share a row"
    assert (tmp_path / "variants.png").stat().st_size > 10_000
    page.write_page(results, tmp_path / "new/variants.md", planned=len(results))
    assert page.BEGIN in (tmp_path / "new/variants.md").read_text()


def test_the_best_learning_rate_is_shown(scripts):
    """By FVU over TopK's at the same L0: a rate that only leaves more features active is not better."""
    compare, page = scripts
    jobs = compare.plan(asked(scripts, arms=["topk", "relu"], aux=["none"], lrs=[0.5, 1.0], k=[16, 32], seeds=1))
    assert len({job.name for job in jobs}) == len(jobs) == 8
    results = []
    for job in jobs:
        slow = job.lr == 0.5
        l0 = job.k if job.arm == "topk" else job.k * (1.9 if slow else 1.0)
        results.append(made_up(job, (1.0 if job.arm == "topk" else 1.5) * (1.2 if slow else 1.0) * 2 / l0, l0))
    best = page.best_rates(results)
    assert {(r["job"]["arm"], r["job"]["k"], r["job"]["lr"]) for r in best} == {
        *(("topk", 16, 1.0), ("topk", 32, 1.0), ("relu", 16, 1.0), ("relu", 32, 1.0)),
    }
    assert "4 of the 9 runs" not in page.table(best, len(results), 9, "x.png")
    assert "8 of the 9 runs planned" in page.table(best, len(results), 9, "x.png")


def test_results_that_do_not_belong_together_are_refused(scripts, tmp_path):
    compare, _ = scripts
    job = compare.Job("topk", "none", 32, 0)
    (tmp_path / job.name).mkdir()
    compare.result(tmp_path, job).write_text(json.dumps(made_up(job, 0.1, 32.0)))
    arguments = argparse.Namespace(out=tmp_path, tokens=1000, width=100, batch_size=10, heldout_tokens=10, ce_tokens=5)
    assert len(compare.finished([job], arguments)) == 1
    arguments.tokens = 5000
    with pytest.raises(SaekitError, match="made with tokens = 1000, not 5000"):
        compare.finished([job], arguments)
    import torch

    plain = ActivationCache.from_tensor(tmp_path / "plain", torch.randn(500, 4))
    with pytest.raises(SaekitError, match="holds no gradients"):
        compare.check_cache(plain.path, 100)
    short = ActivationCache.from_tensor(tmp_path / "short", torch.randn(500, 4), gradients=torch.randn(500, 4))
    compare.check_cache(short.path, 450)
    with pytest.raises(SaekitError, match="has 450 training tokens, not 451"):
        compare.check_cache(short.path, 451)
