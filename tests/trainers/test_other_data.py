"""Activations that do not come from a language model: with a large mean, or sorted by class."""

from __future__ import annotations

import pytest
import torch

from saekit import SaekitError
from saekit.activations import ActivationCache
from saekit.evals import Evaluator
from saekit.trainers import TrainConfig, train
from saekit.trainers.dictionary import initialise
from saekit.trainers.geometric_median import geometric_median

ARMS = [
    {"variant": "topk"},
    {"variant": "topk", "aux": "aux_k", "dead_after": 5_000},
    {"variant": "mutual_choice"},
    {"variant": "mutual_choice", "affinity_scale": "none", "precision": "bf16_select"},
    {"variant": "mutual_choice", "precision": "bf16_select", "aux": "aux_zipf"},
    {"variant": "feature_choice"},
    {"variant": "gradient_topk"},
]
STEPS, BATCH = 150, 512


@pytest.fixture(scope="module")
def data():
    """Sparse sums [10000, 64] of 512 directions, a mean, and something in place of gradients."""
    draw = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(512, 64, generator=draw), dim=1)
    on = torch.rand(10_000, 512, generator=draw) < 0.012
    x = (torch.rand(10_000, 512, generator=draw) * on) @ directions
    return x, torch.randn(64, generator=draw), torch.randn(x.shape, generator=draw)


def trained(cache, out, **arm):
    settings = {"precision": "fp32", "width": 512, "k": 6, "batch_size": BATCH, "tokens": STEPS * BATCH, **arm}
    return train(TrainConfig(cache=cache, out=out, device="cpu", log_every=STEPS, **settings), quiet=True)


def figures(sae, x):
    """FVU and number of silent features, in float64 and without saekit's own evaluation."""
    code = sae.encode_sparse(x)
    x_hat = sae.decode(code).double()
    error, variance = (x.double() - x_hat).square().sum(), (x.double() - x.double().mean(0)).square().sum()
    return float((error / variance).detach()), int((code.matches_per_feature() == 0).sum()), code.l0


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: "-".join(map(str, arm.values())))
def test_a_large_mean_changes_no_figure(data, tmp_path, arm):
    x, mean, gradients = data
    found = {}
    large = (30, 100) if arm is ARMS[0] else (100,)
    for times in (0, *large):  # 130 and 440 times what each coordinate varies by
        moved = x + times * mean
        ActivationCache.from_tensor(tmp_path / f"c{times}", moved, gradients=gradients)
        run = trained(tmp_path / f"c{times}", tmp_path / f"r{times}", **arm)
        found[times] = figures(run.sae, moved)
    fvu, silent, l0 = found[0]
    for times in large:
        # x + 100·mean is rounded to 2⁻¹⁷ where x itself varies by 0.23, and such rounding changes a few matches
        assert found[times][0] == pytest.approx(fvu, rel=0.01)
        assert found[times][1] <= silent + 2
        assert found[times][2] == pytest.approx(l0, rel=0.01)


def test_the_smallest_kept_is_in_raw_units_whatever_the_mean(data, tmp_path):
    from safetensors.torch import load_file

    x, mean, _ = data
    kept = []
    for name, moved in (("a", x), ("b", x + 30 * mean), ("c", 5 * x)):
        ActivationCache.from_tensor(tmp_path / name, moved)
        trained(tmp_path / name, tmp_path / f"{name}-run", variant="topk")
        kept.append(load_file(tmp_path / f"{name}-run/statistics.safetensors")["smallest_kept"].nanmedian())
    assert float(kept[1] / kept[0]) == pytest.approx(1, rel=0.01)
    assert float(kept[2] / kept[0]) == pytest.approx(5, rel=0.01)


def test_units_are_those_of_the_distance_from_the_centre(data):
    from saekit import SAEConfig, SparseAutoencoder

    x, mean, _ = data
    plain, moved = (initialise(SparseAutoencoder(SAEConfig(64, 512, "topk", k=3)), y, 0) for y in (x, x + 100 * mean))
    assert float(plain(x).norm(dim=1).mean()) == pytest.approx(8, rel=1e-5)
    assert moved.scale == pytest.approx(plain.scale, rel=1e-4)
    torch.testing.assert_close(moved(x + 100 * mean), plain(x), rtol=0, atol=2e-4 * plain.scale)
    exact = geometric_median((x + 100 * mean).double())
    # the last digit of a number up to 512 is 2⁻¹⁵
    torch.testing.assert_close(geometric_median(x + 100 * mean).double(), exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("value", "message"), [(0.0, "all zero"), (7.3, "all the same"), (-1e-20, "all the same")])
def test_rows_that_are_all_the_same_are_refused(tmp_path, value, message):
    ActivationCache.from_tensor(tmp_path / "c", torch.linspace(1, 2, 64).mul(value).repeat(6000, 1))
    with pytest.raises(SaekitError, match=f"the activations are {message}"):
        trained(tmp_path / "c", tmp_path / "run")


def test_rows_sorted_by_class_are_judged_as_shuffled_ones(tmp_path):
    """Ten classes, each with 40 directions of its own and a centre."""
    draw = torch.Generator().manual_seed(1)
    directions = torch.nn.functional.normalize(torch.randn(10, 40, 32, generator=draw), dim=2)
    parts = torch.rand(10, 2000, 40, generator=draw) * (torch.rand(10, 2000, 40, generator=draw) < 0.1)
    x = (parts @ directions + 0.5 * torch.randn(10, 1, 32, generator=draw)).flatten(0, 1)
    shuffled = x[torch.randperm(len(x), generator=draw)]
    found = []
    for name, rows in (("sorted", x), ("shuffled", shuffled)):
        cache = ActivationCache.from_tensor(tmp_path / name, rows)
        run = trained(cache.path, tmp_path / f"{name}-run", variant="topk", width=256, k=4)
        groups = Evaluator(cache=cache.path)(run.path).groups
        found.append((groups["reconstruction"]["fvu"], groups["sparsity"]["dead"]))
        truth = figures(run.sae, x)[0]
        assert found[-1][0] == pytest.approx(truth, rel=0.1), "the rows that are held out are like all rows"
    # each judged on 1,000 rows of 20,000, of another model
    assert found[0][0] == pytest.approx(found[1][0], rel=0.15)
    assert abs(found[0][1] - found[1][1]) <= 15
