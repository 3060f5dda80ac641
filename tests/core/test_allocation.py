"""Each rule against brute force: it selects exactly the set that its definition names."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from saekit import SaekitError
from saekit.allocation import (
    feature_choice,
    gradient_choice,
    influence_of,
    mutual_choice,
    threshold_choice,
    token_choice,
    zipf_budgets,
)
from saekit.kernels.select import largest_in_all, largest_in_rows

# few distinct values, so that ties abound; all-negative rows occur
matrices = hnp.arrays(
    np.float64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.integers(-4, 4).map(float)
)


def pairs(code):
    return list(zip(code.tokens.tolist(), code.features.tolist(), strict=True))


def by_definition(entries, count):
    """The ``count`` largest (value, index) entries, smaller index first among equals, positive ones only."""
    chosen = sorted(entries, key=lambda e: (-e[0], e[1]))[:count]
    return sorted(index for value, index in chosen if value > 0)


@given(matrices, st.data())
def test_token_choice_takes_the_k_largest_of_each_row(pre, data):
    n, width = pre.shape
    k = data.draw(st.sampled_from([1, width]) | st.integers(1, width))
    code = token_choice(torch.from_numpy(pre), k)
    expected = [(i, j) for i in range(n) for j in by_definition([(pre[i, j], j) for j in range(width)], k)]
    assert sorted(pairs(code)) == expected
    assert code.values.tolist() == [pre[i, j] for i, j in pairs(code)]


@given(matrices, st.data())
def test_mutual_choice_takes_the_largest_of_the_whole_batch(pre, data):
    n, width = pre.shape
    total = data.draw(st.sampled_from([1, n * width]) | st.integers(1, n * width))
    code = mutual_choice(torch.from_numpy(pre), total)
    flat = [(pre.flat[i], i) for i in range(n * width)]
    assert pairs(code) == [divmod(i, width) for i in by_definition(flat, total)]


@given(matrices, st.data())
def test_feature_choice_takes_the_largest_of_each_column(pre, data):
    n, width = pre.shape
    budgets = data.draw(st.lists(st.sampled_from([0, 1, n]) | st.integers(0, n), min_size=width, max_size=width))
    code = feature_choice(torch.from_numpy(pre), torch.tensor(budgets))
    expected = [(i, j) for j in range(width) for i in by_definition([(pre[i, j], i) for i in range(n)], budgets[j])]
    assert sorted(pairs(code)) == sorted(expected)
    assert code.tokens.tolist() == sorted(code.tokens.tolist())


@given(matrices, st.data())
def test_gradient_choice_takes_the_largest_scores(pre, data):
    n, width = pre.shape
    k = data.draw(st.integers(1, width))
    beta = data.draw(st.sampled_from([0.5, 1.0, 4.0]))
    influence = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n * width, max_size=n * width))).reshape(
        pre.shape
    )
    code = gradient_choice(torch.from_numpy(pre), torch.from_numpy(influence).double(), k, beta)
    score = np.maximum(pre, 0) * (1 + beta * influence)
    expected = [(i, j) for i in range(n) for j in by_definition([(score[i, j], j) for j in range(width)], k)]
    assert sorted(pairs(code)) == expected
    assert code.values.tolist() == [pre[i, j] for i, j in pairs(code)], "the emitted values are plain activations"


@given(matrices, st.data())
def test_token_norms_make_tokens_comparable(pre, data):
    """Powers of two, so that the quotients are exact and ties stay ties."""
    n, width = pre.shape
    norms = np.array(data.draw(st.lists(st.sampled_from([0.25, 1.0, 2.0, 8.0]), min_size=n, max_size=n)))
    total = data.draw(st.integers(1, n * width))
    budgets = data.draw(st.lists(st.integers(0, n), min_size=width, max_size=width))
    theta = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    tensor, scale = torch.from_numpy(pre), torch.from_numpy(norms)
    score = pre / norms[:, None]
    flat = [(score.flat[i], i) for i in range(n * width)]
    mutual = mutual_choice(tensor, total, scale)
    assert pairs(mutual) == [divmod(i, width) for i in by_definition(flat, total)]
    feature = feature_choice(tensor, torch.tensor(budgets), scale)
    columns = [(i, j) for j in range(width) for i in by_definition([(score[i, j], i) for i in range(n)], budgets[j])]
    assert sorted(pairs(feature)) == sorted(columns)
    threshold = threshold_choice(tensor, torch.tensor([theta], dtype=torch.float64), scale)
    assert pairs(threshold) == [tuple(p) for p in np.argwhere(pre > theta * norms[:, None]).tolist()]
    for code in (mutual, feature, threshold):
        assert code.values.tolist() == [pre[i, j] for i, j in pairs(code)], "the values stay plain"


def test_influence_has_unit_root_mean_square(generator):
    gradients, W_dec = torch.randn(7, 5, generator=generator) * 1e-6, torch.randn(9, 5, generator=generator)
    influence = influence_of(gradients, W_dec)
    expected = (gradients.double() @ W_dec.double().T).abs()
    torch.testing.assert_close(influence.double(), expected / expected.square().mean().sqrt(), rtol=1e-5, atol=1e-6)
    assert not influence_of(torch.zeros(7, 5), W_dec).any(), "no gradient, no influence"


@given(st.integers(0, 10), st.integers(1, 64))
def test_gradient_choice_without_gradients_is_topk_bit_for_bit(seed, k):
    generator = torch.Generator().manual_seed(seed)
    pre = torch.randn(16, 512, generator=generator)
    influence = torch.rand(16, 512, generator=generator)
    plain, zero = token_choice(pre, k), gradient_choice(pre, influence, k, 0.0)
    for name in ("tokens", "features", "values"):
        assert torch.equal(getattr(plain, name), getattr(zero, name))


@given(st.data())
def test_zipf_budgets(data):
    F, n = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 200))
    total = data.draw(st.sampled_from([F, F * n]) | st.integers(F, F * n))
    s, q = data.draw(st.floats(0, 4)), data.draw(st.floats(-0.9, 50))
    budgets = zipf_budgets(total, F, n, s, q)
    assert int(budgets.sum()) == total
    assert int(budgets.min()) >= 1
    assert int(budgets.max()) <= n
    assert (budgets.diff() <= 0).all(), "densest first"
    # away from the bounds the law holds: m_j / m_i is (r_j + q)^-s / (r_i + q)^-s, to rounding
    law = (np.arange(1, F + 1) + q) ** -s
    free = [j for j in range(F) if 1 < budgets[j] < n]
    if free:
        c = total_free = sum(int(budgets[j]) for j in free) / sum(law[j] for j in free)
        assert all(abs(int(budgets[j]) - c * law[j]) <= 2 for j in free), total_free


def test_zipf_budgets_of_the_speed_shape():
    budgets = zipf_budgets(4096 * 32, 12288, 4096)
    expected = 4096 * 32 * (np.arange(1, 12289) + 3.0) ** -1 / ((np.arange(1, 12289) + 3.0) ** -1).sum()
    assert np.abs(budgets.numpy() - np.maximum(expected, 1))[:1000].max() < 0.02 * expected[0]
    assert int(zipf_budgets(4096 * 32, 12288, 4096, 1.0, 0.0).max()) == 4096, "without a shift the bound is reached"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((9, 10, 5), "cannot be shared"), ((51, 10, 5), "cannot be shared"), ((20, 10, 5, -1.0), "exponent"),
     ((20, 10, 5, 1.0, -1.0), "shift"), ((20, 0, 5), "no budgets")],
)  # fmt: skip
def test_impossible_zipf_budgets_are_refused(arguments, message):
    with pytest.raises(SaekitError, match=message):
        zipf_budgets(*arguments)


def test_impossible_choices_are_refused():
    pre = torch.zeros(4, 3)
    with pytest.raises(SaekitError, match="impossible for a batch of 4"):
        feature_choice(pre, torch.tensor([1, 5, 1]))
    with pytest.raises(SaekitError, match="whole numbers"):
        feature_choice(pre, torch.tensor([1.0, 2.0, 1.0]))
    with pytest.raises(SaekitError, match="beta = -1"):
        gradient_choice(pre, pre, 1, -1)
    with pytest.raises(SaekitError, match="does not fit"):
        gradient_choice(pre, pre[:2], 1, 1.0)


@given(matrices, st.floats(-3, 3))
def test_threshold_choice_takes_positive_pairs_above_the_threshold(pre, threshold):
    code = threshold_choice(torch.from_numpy(pre), torch.tensor([threshold], dtype=torch.float64))
    assert pairs(code) == [tuple(p) for p in np.argwhere((pre > threshold) & (pre > 0)).tolist()]


@pytest.mark.parametrize("k", [1, 7, 32])
def test_two_stage_selection_is_exact(k, generator):
    rows = torch.randn(64, 1024, generator=generator, dtype=torch.float64)
    expected = rows.topk(k, dim=1).indices.sort(1).values
    assert torch.equal(largest_in_rows(rows, k).sort(1).values, expected)


@pytest.mark.parametrize("share", [1e-5, 0.01, 0.3])
def test_selection_from_a_sample_is_exact(share, generator):
    matrix = torch.randn(512, 2048, generator=generator)
    total = max(1, int(share * matrix.numel()))
    expected = matrix.flatten().topk(total).indices.sort().values
    assert torch.equal(largest_in_all(matrix, total), expected)


def test_selection_survives_a_misleading_sample():
    # large entries only where the sample looks: the bound would leave too few survivors
    matrix = torch.full((1024, 1024), 0.5)
    stride = matrix.numel() // 65536 | 1
    matrix.view(-1)[::stride] = 2.0
    chosen = largest_in_all(matrix, 300_000)
    assert len(chosen) == 300_000
    assert (matrix.view(-1)[chosen] == 2.0).sum() == (matrix == 2.0).sum()


def test_values_carry_gradients(generator):
    pre = torch.randn(5, 9, generator=generator, requires_grad=True)
    code = token_choice(pre, 3)
    code.values.sum().backward()
    assert torch.equal(pre.grad, (code.to_dense() > 0).float())


@pytest.mark.parametrize("k", [0, -1, 10])
def test_impossible_budgets_are_refused(k):
    pre = torch.zeros(2, 9)
    with pytest.raises(SaekitError, match="between 1 and"):
        token_choice(pre, k)
    with pytest.raises(SaekitError, match="pairs of the batch"):
        mutual_choice(pre, k if k < 1 else 19)
