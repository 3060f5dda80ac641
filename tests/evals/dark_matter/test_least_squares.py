"""Regression from sums, against torch's direct least squares and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saekit.evals.dark_matter import LinearMap, Moments, fit_linear


def moments_of(x, y, pieces=7):
    found = Moments.zeros(x.shape[1], y.shape[1])
    for a, b in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        found.update(a, b)
    return found


def directly(x, y, intercept):
    """torch.linalg.lstsq's map."""
    inputs = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1) if intercept else x
    solution = torch.linalg.lstsq(inputs, y).solution
    return LinearMap(solution[: x.shape[1]], solution[x.shape[1]] if intercept else torch.zeros_like(y[0]), x.shape[1])


def random_problem(seed, n, d, p):
    generator = torch.Generator().manual_seed(seed)
    like = {"generator": generator, "dtype": torch.float64}
    x = torch.randn(n, d, **like) * torch.logspace(-1, 1, d, dtype=torch.float64) + torch.randn(d, **like)
    return x, x @ torch.randn(d, p, **like) + 3 * torch.randn(n, p, **like) + torch.randn(p, **like)


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 5), st.booleans())
def test_equal_to_direct_least_squares(seed, d, p, intercept):
    x, y = random_problem(seed, 40 + 10 * d, d, p)
    found, expected = fit_linear(moments_of(x, y), intercept=intercept), directly(x, y, intercept)
    assert found.rank == d
    scale = float(expected.weight.abs().max())
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-8, atol=1e-8 * scale)
    torch.testing.assert_close(found.bias, expected.bias, rtol=1e-8, atol=1e-8 * (1 + float(y.abs().max())))


@given(st.integers(0, 10**6), st.booleans())
def test_residuals_and_r2_on_other_tokens(seed, intercept):
    x, y = random_problem(seed, 300, 6, 4)
    fit = fit_linear(moments_of(x[:150], y[:150]), intercept=intercept)
    test = moments_of(x[150:], y[150:])
    left = (y[150:] - fit(x[150:])).square().sum(0)
    total = (y[150:] - y[150:].mean(0)).square().sum(0)
    torch.testing.assert_close(test.residuals(fit), left, rtol=1e-9, atol=0)
    assert test.r2(fit).mean == pytest.approx(float((1 - left / total).mean()), rel=1e-9)
    assert test.r2(fit).pooled == pytest.approx(float(1 - left.sum() / total.sum()), rel=1e-9)
    assert test.x_variance == pytest.approx(float((x[150:] - x[150:].mean(0)).square().sum()), rel=1e-9)


def test_both_kinds_of_r2_by_hand():
    # first target: variance 2, half explained; second: variance 200, nothing explained
    x, y = torch.tensor([[1.0], [-1.0]]), torch.tensor([[1.0, 10.0], [-1.0, -10.0]])
    fit = LinearMap(torch.tensor([[1 - math.sqrt(0.5), 0.0]], dtype=torch.float64), torch.zeros(2).double(), 1)
    r2 = moments_of(x, y, 2).r2(fit)
    assert r2.mean == pytest.approx(0.25)
    assert r2.pooled == pytest.approx(1 - 201 / 202)


def test_targets_that_do_not_vary_are_left_out():
    x, y = random_problem(0, 100, 3, 2)
    y[:, 1] = 5.0
    moments = moments_of(x, y)
    fit = fit_linear(moments, intercept=True)
    assert moments.r2(fit).mean == pytest.approx(moments.r2(fit).pooled)
    y[:, 0] = 5.0
    assert math.isnan(moments_of(x, y).r2(fit).mean)


@pytest.mark.parametrize("intercept", [False, True])
def test_missing_rank_is_named_and_predictions_stand(intercept):
    x, y = random_problem(1, 500, 8, 3)
    doubled = torch.cat([x, x[:, :2] + x[:, 2:4], torch.zeros(500, 1, dtype=torch.float64)], 1)
    with pytest.warns(UserWarning, match=r"x has rank 8 of 11 on 500 tokens"):
        fit = fit_linear(moments_of(doubled, y), intercept=intercept)
    torch.testing.assert_close(fit(doubled), directly(x, y, intercept)(x), rtol=1e-6, atol=1e-6)


def test_fewer_tokens_than_dimensions_fit_exactly():
    x, y = random_problem(2, 5, 9, 2)
    with pytest.warns(UserWarning, match="rank 5 of 9"):
        fit = fit_linear(moments_of(x, y, 1), intercept=False)
    torch.testing.assert_close(fit(x), y, rtol=1e-6, atol=1e-6)


def test_sums_of_parts_and_of_mixed_targets():
    x, y = random_problem(3, 200, 4, 4)
    whole, parts = moments_of(x, y), moments_of(x[:80], y[:80]) + moments_of(x[80:], y[80:])
    mixed, expected = whole.mixed(-0.3, 1.7), moments_of(x, -0.3 * x + 1.7 * y)
    some, alone = whole.inputs(slice(1, 3)), moments_of(x[:, 1:3], y)
    for found, wanted in ((parts, whole), (mixed, expected), (some, alone)):
        assert found.n == wanted.n
        for name in ("x_sum", "y_sum", "xx", "xy", "yy"):
            torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-9, atol=1e-9)


def test_memory_does_not_grow_with_the_tokens():
    moments = Moments.zeros(4, 3)
    sizes = set()
    for _ in range(5):
        moments.update(torch.randn(1000, 4), torch.randn(1000, 3))
        sizes.add(sum(t.numel() for t in vars(moments).values() if isinstance(t, torch.Tensor)))
    assert sizes == {4 + 3 + 16 + 12 + 3}
    assert moments.n == 5000
