"""Thresholds set on calibration text do on held-out text what they were set for. Minutes: run with the slow tests."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from saekit.activations import ActivationSource
from saekit.evals.sparsity import Sparsity
from saekit.trainers import TrainConfig, train


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["mutual_choice", "feature_choice"])
def test_heldout_rates(variant, tmp_path, source: ActivationSource):
    k, batch = 32, 1024
    config = TrainConfig(variant=variant, width=2048, k=k, tokens=500_000, batch_size=batch, out=tmp_path / "run")
    sae = train(config, quiet=True).sae
    figures = Sparsity(2048)
    with torch.no_grad():
        for found in source.batches("heldout", 300_000):
            figures.update(sae.encode_sparse(found.x))
    assert figures.result()["l0"] == pytest.approx(k, rel=0.05)
    if variant == "feature_choice":
        budgets = load_file(tmp_path / "run/statistics.safetensors")["budgets"]
        ratio = figures.matches / figures.tokens / (budgets / batch)
        assert float(ratio.median()) == pytest.approx(1, abs=0.1)
