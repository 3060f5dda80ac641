"""The script that compares how often features fire with their budgets."""

import importlib
from pathlib import Path

import pytest
import torch

from saekit import SaekitError

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("realised_rates")


def test_a_row_tells_the_median_feature(script):
    budgets = torch.tensor([0.1, 0.2, 0.4, 0.5, 0.1], dtype=torch.float64)
    rates = budgets * torch.tensor([0.0, 0.95, 1.05, 1.2, 1.5], dtype=torch.float64)
    # L0 0.19 + 0.42 + 0.6 + 0.15; deviations 1, 0.05, 0.05, 0.2, 0.5
    assert script.row("run", rates, budgets) == "| run | 1.4 | 1 | 1.050 (0.950 to 1.200) | 20.0% | 40% |"


def test_a_run_without_budgets_is_named(script, trained_run):
    with pytest.raises(SaekitError, match="has no budgets"):
        script.budgets_of(trained_run)
