"""The error taken apart, on data whose parts are known."""

from __future__ import annotations

import pytest
import torch

from saekit import SaekitError
from saekit.evals.dark_matter import DarkMatter, ErrorBatch, dark_matter
from saekit.evals.dark_matter.splits import in_test_half, scrambled

N, D = 200_000, 32


@pytest.fixture(scope="module")
def planted():
    """x, a linear error and a nonlinear one that x says nothing about: per token 30% and 70% of the error's energy."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator) @ torch.randn(D, D, generator=generator)
    linear = x @ torch.randn(D, D, generator=generator)
    linear *= (0.3 / linear.square().sum(1).mean()).sqrt()
    # its length depends on x, so that there is something to find for the norm test, but not its direction
    size = 1 + 0.5 * torch.tanh(x[:, :1] / x[:, 0].std())
    nonlinear = size * torch.randn(N, D, generator=generator)
    nonlinear *= (0.7 / nonlinear.square().sum(1).mean()).sqrt()
    return x, linear, nonlinear


@pytest.fixture(scope="module")
def found(planted):
    x, linear, nonlinear = planted
    documents = torch.arange(N) // 100
    return dark_matter(x, x - linear - nonlinear, documents=documents, l0=nonlinear.norm(dim=1), seed=1)


@pytest.mark.parametrize("split", ["random", "document"])
def test_planted_parts_are_recovered(planted, found, split):
    x, linear, nonlinear = planted
    half = found[split]
    assert half["tokens_fit"] + half["tokens_test"] == found["tokens"] == N
    assert 0.48 < half["tokens_test"] / N < 0.52
    variance = float((x - x.mean(0)).square().sum(1).mean())
    assert half["fvu"] == pytest.approx(1 / variance, rel=0.02)
    for kind in ("plain", "with_intercept"):
        assert half[kind]["r2_pooled"] == pytest.approx(0.3, rel=0.02)
        each = linear.var(0) / (linear.var(0) + nonlinear.var(0))
        assert half[kind]["r2"] == pytest.approx(float(each.mean()), rel=0.02)
        assert half[kind]["fvu_nonlinear"] == pytest.approx(0.7 / variance, rel=0.02)
        assert half[kind]["rank"] == D
    # FVU_nonlinear ≈ FVU · (1 − pooled R²), as the error has no mean here
    assert half["plain"]["fvu_nonlinear"] == pytest.approx(half["fvu"] * (1 - half["plain"]["r2_pooled"]), rel=1e-3)
    assert found["norm_shares"]["nonlinear"] == pytest.approx(
        float(nonlinear.norm(dim=1).sum() / (linear + nonlinear).norm(dim=1).sum()), rel=0.02
    )


@pytest.mark.parametrize("split", ["random", "document"])
def test_squared_norms_against_a_direct_regression(planted, found, split):
    x, linear, nonlinear = planted
    numbers = torch.arange(N) if split == "random" else torch.arange(N) // 100
    test = in_test_half(numbers, 1)
    b = torch.linalg.lstsq(x[~test].double(), (linear + nonlinear)[~test].double()).solution
    estimate = x.double() @ b
    error = (linear + nonlinear).double()
    parts = {"error": error, "nonlinear": error - estimate, "linear": estimate, "x": x.double()}
    parts |= {"x_hat": x.double() - error, "x_hat_plus_nonlinear": x.double() - estimate}
    for name, part in parts.items():
        y = part.square().sum(1, keepdim=True)
        for key, inputs in (
            ("from_x", x.double()),
            ("from_x_with_intercept", torch.cat([x.double(), torch.ones(N, 1).double()], 1)),
            ("from_norm", torch.cat([x.double().norm(dim=1, keepdim=True), torch.ones(N, 1).double()], 1)),
            ("from_l0", torch.cat([nonlinear.double().norm(dim=1, keepdim=True), torch.ones(N, 1).double()], 1)),
        ):
            weight = torch.linalg.lstsq(inputs[~test], y[~test]).solution
            left = (y - inputs @ weight)[test].square().sum()
            expected = float(1 - left / (y[test] - y[test].mean()).square().sum())
            assert found[split]["norms"][name][key] == pytest.approx(expected, rel=1e-4, abs=1e-4), (name, key)
    assert found[split]["norms"]["nonlinear"]["from_x_with_intercept"] > 0.2, "the planted lengths are seen"
    assert found[split]["norms"]["error"]["from_loss"] is None, "no losses were given"


def test_the_mean_of_each_token_id_as_a_baseline():
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 20, (40_000,), generator=generator)
    tokens[:50] = torch.arange(100, 150)  # ids that the other half has not seen
    loud = (1 + tokens % 5).float()[:, None]
    x = torch.randn(40_000, 8, generator=generator)
    error = loud * torch.randn(40_000, 8, generator=generator)
    found = dark_matter(x, x - error, tokens=tokens)["random"]["norms"]
    test = in_test_half(torch.arange(40_000), 0)
    y = error.double().square().sum(1)
    means = torch.full((150,), float(y[~test].mean()), dtype=torch.float64)
    for token in tokens[~test].unique():
        means[token] = y[~test & (tokens == token)].mean()
    expected = 1 - (y - means[tokens])[test].square().sum() / (y[test] - y[test].mean()).square().sum()
    assert found["error"]["from_token"] == pytest.approx(float(expected), rel=1e-6)
    assert found["error"]["from_token"] > 0.5 > abs(found["error"]["from_x_with_intercept"])


@pytest.mark.parametrize("constant", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_a_dead_dictionary_is_exposed(constant, mean):
    x = mean + torch.randn(20_000, 16, generator=torch.Generator().manual_seed(0))
    found = dark_matter(x, torch.full_like(x, constant))["random"]
    assert found["with_intercept"]["r2"] == pytest.approx(1, abs=1e-9), "as good as it gets, and worth nothing"
    assert found["shrinkage"]["scalar"] == pytest.approx(1)
    assert found["shrinkage"]["scalar_r2_pooled"] == pytest.approx(1)
    assert found["shrinkage"]["r2_beyond_scalar"] == 0
    if not constant:
        assert found["plain"]["r2"] == pytest.approx(1, abs=1e-12)
        assert found["shrinkage"]["scale"] is None


def test_shrinkage_is_no_linear_error():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50_000, 16, generator=generator)
    noise = 0.1 * torch.randn(50_000, 16, generator=generator)
    found = dark_matter(x, 0.7 * x + noise)["random"]
    assert found["plain"]["r2"] > 0.85
    assert found["shrinkage"]["scale"] == pytest.approx(0.7 / (0.49 + 0.01), rel=0.01)
    # what is left of the error after rescaling: by hand, (1 − 0.7a)·x − a·noise
    a = found["shrinkage"]["scale"]
    left = (1 - 0.7 * a) ** 2
    assert found["shrinkage"]["r2_pooled"] == pytest.approx(left / (left + a * a * 0.01), rel=0.05)
    assert found["shrinkage"]["r2_pooled"] < 0.03
    assert found["shrinkage"]["scalar"] == pytest.approx(0.3, rel=0.01)
    assert found["shrinkage"]["r2_beyond_scalar"] == pytest.approx(0, abs=0.01)


def test_tokens_split_at_random_leak_documents():
    """Forty documents, each with an error of its own: in 64 dimensions, x tells which document a token is from."""
    generator = torch.Generator().manual_seed(0)
    documents = torch.arange(20_000) % 40
    x = torch.randn(40, 64, generator=generator)[documents] + 0.05 * torch.randn(20_000, 64, generator=generator)
    error = torch.randn(40, 64, generator=generator)[documents]
    found = dark_matter(x, x - error, documents=documents)
    assert found["random"]["plain"]["r2"] > 0.9
    assert found["document"]["plain"]["r2"] < 0.1
    assert dark_matter(x, x - error)["document"]["plain"]["r2"] > 0.9, "without documents, tokens are all there is"


def test_halves_depend_on_number_and_seed_alone():
    numbers = torch.arange(100_000)
    assert torch.equal(in_test_half(numbers, 5)[500:900], in_test_half(numbers[500:900], 5))
    assert abs(float(in_test_half(numbers, 5).float().mean()) - 0.5) < 0.01
    agree = (in_test_half(numbers, 5) == in_test_half(numbers, 6)).float().mean()
    assert abs(float(agree) - 0.5) < 0.01
    counts = torch.bincount(scrambled(numbers, 0) % 64, minlength=64)
    assert counts.min() > 1400
    assert counts.max() < 1730


def test_batches_of_any_size_give_the_same():
    generator = torch.Generator().manual_seed(0)
    x, error = (torch.randn(3000, 8, generator=generator) for _ in range(2))
    whole = ErrorBatch(x, x - error, torch.arange(3000) // 10, l0=torch.arange(3000) % 7)

    def cut(size):
        starts = range(0, 3000, size)
        return [ErrorBatch(*(c if c is None else c[i : i + size] for c in whole)) for i in starts]

    one, many = dark_matter(lambda: cut(3000)), dark_matter(lambda: cut(7))
    for split in ("random", "document"):
        assert one[split]["tokens_fit"] == many[split]["tokens_fit"]
        assert one[split]["plain"]["r2"] == pytest.approx(many[split]["plain"]["r2"], rel=1e-9)
        for part, row in one[split]["norms"].items():
            assert row["from_x"] == pytest.approx(many[split]["norms"][part]["from_x"], rel=1e-9)
    assert one["blocks"]["error"] == pytest.approx(many["blocks"]["error"])
    assert one["sample"] == many["sample"]


def test_blocks_add_up_to_the_half_to_test_on(found):
    blocks = {name: sum(values) for name, values in found["blocks"].items()}
    assert blocks["error"] / blocks["variance"] == pytest.approx(found["document"]["fvu"], rel=1e-6)
    nonlinear = found["document"]["plain"]["fvu_nonlinear"]
    assert blocks["nonlinear"] / blocks["variance"] == pytest.approx(nonlinear, rel=1e-6)


def test_missing_rank_is_warned_of():
    x = torch.randn(1000, 6, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, x[:, :2]], 1)
    with pytest.warns(UserWarning, match="x has rank 6 of 8"):
        found = dark_matter(x, 0.5 * x)
    assert found["random"]["plain"]["rank"] == 6
    assert found["random"]["plain"]["r2"] == pytest.approx(1)


X = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": X, "x_hat": X[:50]}, r"x̂ of shape \[50, 8\] does not fit x of shape \[100, 8\]"),
        ({"batches": X, "x_hat": X[:, :4]}, r"x̂ of shape \[100, 4\] does not fit"),
        ({"batches": X[:, 0], "x_hat": X[:, 0]}, "a matrix"),
        ({"batches": X}, "x_hat"),
        ({"batches": X[:31], "x_hat": X[:31]}, "31 tokens are too few .* width 8; give at least 32"),
        ({"batches": X, "x_hat": X, "documents": torch.zeros(100).long()}, "split by document .* of one document"),
        ({"batches": X, "x_hat": X, "documents": torch.arange(50)}, "documents has 50 entries for 100 tokens"),
        ({"batches": X, "x_hat": 0 * X, "losses": torch.full((100,), torch.nan)}, "a loss is NaN"),
        ({"batches": lambda: iter(())}, "no activations"),
        ({"batches": X, "x_hat": torch.where(X > 2, torch.nan, X)}, "x̂ is NaN or infinite at row"),
        ({"batches": torch.where(X > 2, torch.inf, X), "x_hat": X}, "x is NaN or infinite at row"),
        ({"batches": iter([[ErrorBatch(X, 0.5 * X)], []]).__next__}, "the second pass had 0 tokens, the first 100"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(SaekitError, match=message):
        dark_matter(**arguments)


def test_gradients_are_not_kept():
    weight = torch.eye(8).requires_grad_(True)
    analysis = DarkMatter(8)
    analysis.update(ErrorBatch(X, X @ weight))
    assert not any(t.requires_grad for m in analysis.moments("random") for t in (m.xx, m.xy, m.yy))


def test_unknown_token_ids_are_no_baseline():
    found = dark_matter(X, 0.5 * X, tokens=torch.full((100,), -1))
    assert found["random"]["norms"]["error"]["from_token"] is None


def test_another_width_in_a_later_batch():
    analysis = DarkMatter(8)
    with pytest.raises(SaekitError, match="width 4 follow others of width 8"):
        analysis.update(ErrorBatch(X[:, :4], X[:, :4]))


def test_standard_errors_leave_out_each_document(generator):
    """FVU of x̂, and of x̂ with the linear error added, by a plain loop over the documents of the test half."""
    documents = torch.randint(0, 40, (3000,), generator=generator)
    level = torch.randn(40, 5, generator=generator)[documents]
    x = level + torch.randn(3000, 5, generator=generator) + 30
    x_hat = x - 0.1 * (x - 30) - torch.randn(3000, 5, generator=generator) * (0.2 + documents[:, None] / 40)
    analysis = DarkMatter(5, seed=3)
    batches = [ErrorBatch(x[rows], x_hat[rows], documents[rows]) for rows in torch.arange(3000).split(700)]
    for batch in batches:
        analysis.update(batch)
    analysis.fit()
    for batch in batches:
        analysis.examine(batch)
    found = analysis.result()
    test = in_test_half(documents, 3)
    x, error, numbers = x[test].double(), (x - x_hat)[test].double(), documents[test]
    left = numbers.unique()
    assert found["documents"] == len(left)
    for unexplained, value, se in (
        (error, found["document"]["fvu"], found["document"]["fvu_se"]),
        (
            error - analysis.b["document"](x),
            found["document"]["plain"]["fvu_nonlinear"],
            found["document"]["plain"]["fvu_nonlinear_se"],
        ),
    ):

        def fvu(rows, unexplained=unexplained):
            return unexplained[rows].square().sum() / (x[rows] - x[rows].mean(0)).square().sum()

        without = torch.stack([fvu(numbers != each) for each in left])
        expected = ((without - without.mean()).square().sum() * (len(left) - 1) / len(left)).sqrt()
        assert value == pytest.approx(float(fvu(numbers >= 0)), rel=1e-5)
        assert se == pytest.approx(float(expected), rel=1e-4)
