"""Standard errors against plain loops that leave out each document, and against the bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saekit.evals.intervals import GROUPS, DocumentSums

EPS = 2.0**-52


def mean_and_ratio(sums):
    return {"mean": sums[..., 1] / sums[..., 0], "ratio": sums[..., 2] / sums[..., 1]}


def made(seed: int, documents: int, most: int = 40):
    """Rows (1, a, b) of documents that differ, and the documents' numbers."""
    random = np.random.default_rng(seed)
    numbers = np.repeat(np.arange(documents), random.integers(1, most, documents))
    level = random.gamma(2.0, size=documents)[numbers] + 0.5
    a = level + random.random(len(numbers))
    b = level**2 + random.random(len(numbers))
    return np.stack([np.ones_like(a), a, b], axis=1), numbers


def sums_of(rows, numbers):
    sums = DocumentSums(3)
    sums.add(torch.from_numpy(rows), torch.from_numpy(numbers))
    return sums


def by_hand(rows, groups, figure):
    """The jackknife, each group left out and all worked out anew from the rows."""
    left = np.unique(groups)
    without = np.array([figure(rows[groups != each]) for each in left])
    return np.sqrt((len(left) - 1) / len(left) * ((without - without.mean()) ** 2).sum())


@pytest.mark.parametrize(("documents", "most"), [(2, 5), (37, 60), (3000, 6)])
def test_each_document_left_out_by_hand(documents, most):
    rows, numbers = made(1, documents, most)
    found = sums_of(rows, numbers).figures(mean_and_ratio)
    groups = numbers % GROUPS
    assert found["mean"] == pytest.approx(rows[:, 1].mean(), rel=1e-12)
    assert found["mean_se"] == pytest.approx(by_hand(rows, groups, lambda r: r[:, 1].mean()), rel=1e-6)
    assert found["ratio_se"] == pytest.approx(by_hand(rows, groups, lambda r: r[:, 2].sum() / r[:, 1].sum()), rel=1e-6)


def test_rows_of_equal_documents_have_the_textbook_error():
    """One row a document: s/√n of the mean, exactly."""
    values = np.random.default_rng(0).normal(size=500)
    rows = np.stack([np.ones(500), values, values], axis=1)
    textbook = values.std(ddof=1) / np.sqrt(500)
    for documents in (None, torch.arange(500) + 7):
        sums = DocumentSums(3)
        sums.add(torch.from_numpy(rows), documents)
        assert sums.documents == 500
        assert sums.figures(mean_and_ratio)["mean_se"] == pytest.approx(textbook, rel=1e-9)


def test_the_bootstrap_over_documents_agrees():
    rows, numbers = made(2, 400)
    found = sums_of(rows, numbers).figures(mean_and_ratio)["ratio_se"]
    by_document = np.stack([np.bincount(numbers, column) for column in rows.T], axis=1)
    random = np.random.default_rng(3)
    drawn = np.array([by_document[random.integers(0, 400, 400)].sum(0) for _ in range(4000)])
    assert found == pytest.approx((drawn[:, 2] / drawn[:, 1]).std(), rel=0.1)  # its own error is 1.1%


def test_tokens_alone_would_make_the_error_too_small():
    rows, numbers = made(4, 50, 200)
    whole = DocumentSums(3)
    whole.add(torch.from_numpy(rows))
    assert sums_of(rows, numbers).figures(mean_and_ratio)["mean_se"] > 3 * whole.figures(mean_and_ratio)["mean_se"]


@given(st.integers(0, 2**32 - 1), st.integers(2, 1500), st.lists(st.floats(0, 1), max_size=6), st.booleans())
def test_neither_order_nor_batches_matter(seed, documents, cuts, merged):
    rows, numbers = made(seed, documents, 4)
    once = sums_of(rows, numbers)
    order = np.random.default_rng(seed).permutation(len(rows))
    parts = np.split(order, sorted(int(cut * len(order)) for cut in cuts))
    if merged:
        again = sum((sums_of(rows[part], numbers[part]) for part in parts), DocumentSums(3))
    else:
        again = DocumentSums(3)
        for part in parts:
            again.add(torch.from_numpy(rows[part]), torch.from_numpy(numbers[part]))
    assert again.documents == once.documents == documents
    torch.testing.assert_close(again.sums, once.sums, rtol=len(rows) * EPS, atol=0)  # all terms are positive
    one, other = once.figures(mean_and_ratio), again.figures(mean_and_ratio)
    for name in ("mean", "ratio"):
        assert other[name] == pytest.approx(one[name], rel=4 * len(rows) * EPS)
        # each value with a group left out carries the error of its sums, and the root adds those of all groups
        bound = 8 * len(rows) * EPS * abs(one[name]) * min(documents, GROUPS)
        assert other[f"{name}_se"] == pytest.approx(one[f"{name}_se"], abs=bound)


def test_one_document_or_none_has_no_error():
    rows, numbers = made(5, 1)
    found = sums_of(rows, numbers).figures(mean_and_ratio)
    assert found["mean_se"] is None
    assert found["mean"] == pytest.approx(rows[:, 1].mean())


def test_a_figure_that_hangs_on_one_document_has_no_error():
    rows, numbers = np.array([[1.0, 0, 1], [1, 1, 1], [1, 0, 2]]), np.array([0, 1, 2])
    found = sums_of(rows, numbers).figures(mean_and_ratio)
    assert found["ratio"] == 4
    assert found["ratio_se"] is None, "without document 1 it is infinite"


def test_memory_does_not_grow_with_documents():
    sums = DocumentSums(2)
    for start in range(0, 200_000, 5000):
        numbers = torch.arange(start, start + 5000)
        sums.add(torch.ones(5000, 2), numbers)
        sums.add(torch.ones(5000, 2), numbers)
    assert sums.sums.shape == (GROUPS, 2)
    assert sums.documents == 200_000
