"""Training statistics against sums written out token by token, for any way of cutting the tokens into batches."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saekit.allocation import threshold_choice
from saekit.trainers.statistics import Statistics
from saekit.zipf import fit_zipf, ranks_of, zipf_budgets

F, WINDOW = 5, 7
activations = st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=F, max_size=F), min_size=1, max_size=40)


def fed(pre, sizes):
    statistics = Statistics(F, WINDOW, torch.device("cpu"))
    for part in torch.split(pre, sizes):
        statistics.update(threshold_choice(part, torch.zeros(1)))
    return statistics


def cuts(data, n):
    sizes = []
    while sum(sizes) < n:
        sizes.append(data.draw(st.integers(1, n - sum(sizes))))
    return sizes


@given(activations, st.data())
def test_statistics_do_not_depend_on_the_batches(rows, data):
    pre, n = torch.tensor(rows), len(rows)
    sizes = cuts(data, n)
    statistics = fed(pre, sizes)
    assert statistics.tokens == n
    ages = [n - 1 - t for t in range(n)]
    weights = [math.exp(-age / WINDOW) for age in ages]
    for j in range(F):
        fired = [t for t in range(n) if rows[t][j] > 0]
        assert int(statistics.since_fired[j]) == (n - 1 - fired[-1] if fired else n)
        expected = sum(weights[t] for t in fired) / sum(weights)
        assert float(statistics.density[j]) == pytest.approx(expected, rel=1e-9, abs=1e-12)
        kept = weight = 0.0
        for part in torch.split(pre[:, j], sizes):
            if (part > 0).any():
                kept = 0.99 * kept + 0.01 * float(part[part > 0].min())
                weight = 0.99 * weight + 0.01
        if fired:
            assert float(statistics.smallest_kept[j]) == pytest.approx(kept / weight, rel=1e-5)
        else:
            assert statistics.smallest_kept[j].isnan()
    least = math.nan
    for part in torch.split(pre, sizes):
        if (part > 0).any():
            now = float(part[part > 0].min())
            least = now if math.isnan(least) else 0.9 * least + 0.1 * now
    assert float(statistics.threshold) == pytest.approx(least, rel=1e-5, nan_ok=True)
    assert statistics.dead(3).tolist() == [int(s) > 3 for s in statistics.since_fired]


def test_who_is_underutilised():
    statistics = Statistics(300, 10_000, torch.device("cpu"))
    law = torch.arange(1, 301).double().add(3).pow(-1)
    statistics._fired, statistics._seen = law.clone(), 1.0
    assert not statistics.underutilised(0.1).any()
    statistics._fired[[5, 290]] *= 1e-3  # far down: both take the last ranks
    assert statistics.underutilised(0.1).nonzero().flatten().tolist() == [5, 290]
    assert not statistics.underutilised(0.0).any()


@given(st.floats(0.3, 2.5), st.floats(0, 50), st.integers(0, 2**16))
def test_a_planted_law_is_found(exponent, shift, seed):
    ranks = torch.arange(1, 2001, dtype=torch.float64)
    density = 0.3 * ((ranks + shift) / (1 + shift)) ** -exponent
    shuffled = density[torch.randperm(2000, generator=torch.Generator().manual_seed(seed))]
    law = fit_zipf(shuffled)
    assert law.r2 > 0.999
    torch.testing.assert_close(law.curve(2000), density, rtol=0.1, atol=0)
    assert torch.equal(shuffled[ranks_of(shuffled).argsort()], density)


def test_a_low_end_that_droops_does_not_bend_the_fit():
    ranks = torch.arange(1, 4097, dtype=torch.float64)
    density = (ranks + 10) ** -1.1
    density[3600:] *= torch.logspace(0, -3, 496, dtype=torch.float64)
    density[4000:] = 0
    law = fit_zipf(density)
    assert law.exponent == pytest.approx(1.1, rel=0.03)
    assert law.shift == pytest.approx(10, rel=0.15)


def test_a_given_exponent_or_shift_is_kept():
    ranks = torch.arange(1, 2001, dtype=torch.float64)
    density = 2 * (ranks + 10) ** -1.2
    assert fit_zipf(density, exponent=1.2).shift == pytest.approx(10, rel=0.1)
    assert fit_zipf(density, shift=10.0).exponent == pytest.approx(1.2, rel=1e-6)
    both = fit_zipf(density, exponent=1.2, shift=10.0)
    assert (both.exponent, both.shift, both.r2) == (1.2, 10.0, pytest.approx(1))
    assert both.scale == pytest.approx(2)
    wrong = fit_zipf(density, exponent=0.5, shift=0.0)
    assert wrong.r2 < 0.8, "the fit reported is that of the law reported"


def test_features_long_dead_do_not_bend_the_fit():
    statistics = Statistics(4096, 10_000, torch.device("cpu"))
    density = 2 * (torch.arange(1, 4097, dtype=torch.float64) + 12) ** -1.2
    dead = torch.arange(4096) >= 2000
    fading = torch.exp(-torch.linspace(1, 9, 2096, dtype=torch.float64))
    statistics._fired, statistics._seen = density.clone(), 1.0
    statistics._fired[dead] *= fading
    statistics.since_fired[dead] = 20_000
    law = statistics.law()
    assert law.exponent == pytest.approx(1.2, rel=0.02)
    assert law.shift == pytest.approx(12, rel=0.15)


def test_too_few_features_give_no_law():
    assert fit_zipf(torch.zeros(100)) is None
    assert fit_zipf(torch.tensor([0.5] * 9 + [0.0] * 90)) is None
    assert fit_zipf(torch.full((100,), 0.25)).exponent == pytest.approx(0, abs=1e-9)


def test_budgets_by_a_fitted_law_sum_to_the_total():
    density = torch.rand(777, generator=torch.Generator().manual_seed(0)) ** 4
    law = fit_zipf(density)
    assert int(zipf_budgets(12_345, 777, 512, law.exponent, law.shift).sum()) == 12_345
