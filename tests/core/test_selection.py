"""The rules without dense pre-activations find what the same rules find in the dense matrix, in either precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saekit import SaekitError
from saekit.allocation import influence_of
from saekit.kernels import scores as scores_module
from saekit.kernels.scan import above_largest
from saekit.kernels.scores import ApproximateScores, Scores
from saekit.kernels.workspace import Workspace
from saekit.selection import DenseSelection, Selection

RULES = ["token_choice", "mutual_choice", "feature_choice", "gradient_choice", "threshold_choice"]


def problem(seed, n, d, width, large=500):
    """Tokens of different norms, encoder, bias, gradients, decoder.

    All are multiples of powers of two which float32 adds exactly in any order, while bfloat16 holds only up to 256.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randint(-large, large + 1, shape, generator=generator).float()

    columns = torch.randint(0, 9, (width,), generator=generator).float().exp2()
    rows = torch.randint(0, 3, (n, 1), generator=generator).float().exp2()
    return draw(n, d) * rows, draw(d, width) * columns, draw(width) * columns, draw(n, d), draw(width, d)


def arguments(rule, n, width, k, seed):
    if rule == "token_choice":
        return (k,)
    if rule == "gradient_choice":
        return (k, 1.5)
    if rule == "mutual_choice":
        return (k * n,)
    generator = torch.Generator().manual_seed(seed)
    if rule == "threshold_choice":
        return (torch.randn(width, generator=generator).mul(6).exp2(),)  # some below all, some above all
    return ((torch.rand(width, generator=generator).pow(3) * (n + 1)).long().clamp(max=n),)  # some 0, some n


def both(rule, parts, k, approximate, norms, seed=0):
    x, W, b, gradients, W_dec = parts
    n, width = len(x), W.shape[1]
    token_norms = (x.norm(dim=1) + 1).log2().round().exp2() if norms else None  # dividing by them is exact
    fast = Selection(x, W, b, token_norms=token_norms, gradients=gradients, W_dec=W_dec, approximate=approximate)
    dense = DenseSelection(torch.addmm(b, x, W), token_norms, influence_of(gradients, W_dec))
    given_to_both = arguments(rule, n, width, k, seed)
    return fast, getattr(fast, rule)(*given_to_both), getattr(dense, rule)(*given_to_both)


@pytest.mark.parametrize("approximate", [False, True], ids=["fp32", "bf16_select"])
@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=40)
@given(data=st.data())
def test_the_same_matches_as_in_the_dense_matrix(rule, approximate, data):
    seed = data.draw(st.integers(0, 10_000))
    n, width = data.draw(st.integers(1, 150)), data.draw(st.sampled_from([5, 64, 100, 256, 640]))
    k = data.draw(st.sampled_from([1, 2, 5]))
    code, expected = both(rule, problem(seed, n, 8, width), k, approximate, data.draw(st.booleans()), seed)[1:]
    assert code.shape == expected.shape
    assert bool((code.tokens.diff() >= 0).all())
    assert torch.equal(code.to_dense(), expected.to_dense())


@pytest.mark.parametrize("approximate", [False, True], ids=["fp32", "bf16_select"])
@pytest.mark.parametrize("rule", ["token_choice", "mutual_choice", "feature_choice"])
@settings(max_examples=30)
@given(data=st.data())
def test_ties_fall_as_in_the_dense_matrix(rule, approximate, data):
    seed = data.draw(st.integers(0, 10_000))
    n, width = data.draw(st.integers(1, 150)), data.draw(st.sampled_from([5, 100, 512]))
    parts = problem(seed, n, 6, width, large=2)
    code, expected = both(rule, parts, data.draw(st.sampled_from([1, 4])), approximate, norms=False, seed=seed)[1:]
    assert torch.equal(code.to_dense(), expected.to_dense())


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(-12, 12), st.booleans(), st.booleans())
def test_no_score_is_off_by_more_than_its_margin(seed, exponent, left_bias, right_bias):
    generator = torch.Generator().manual_seed(seed)
    x, W, b = (torch.randn(shape, generator=generator) for shape in ((70, 33), (33, 130), (130,)))
    x = x * torch.rand(70, 1, generator=generator).mul_(9).exp2_() * 2.0**exponent + 3  # far from centred, too
    W = W * torch.rand(130, generator=generator).mul_(3).exp2_()
    u = torch.linspace(-3, 1e-3, 70) if left_bias else None
    v = b * 1e3 if right_bias else None
    found = ApproximateScores(x, W.T, u, v, Workspace())
    approximate = found.rows(0, 70)[:, :130].double()
    bias = (torch.ones(70) if u is None else u).double()[:, None] * (torch.ones(130) if v is None else v).double()
    exact = x.double() @ W.double() + (0 if u is None and v is None else bias)
    off = (approximate - exact).abs()
    assert bool((off <= found.margin.double()[:, None] + 2**-8 * (exact.abs() + found.margin[:, None])).all())
    assert float(found.margin.mean()) < 0.02 * float(
        (x.norm(dim=1).mean() + 3) * W.norm(dim=0).max() + bias.abs().max()
    )


def test_candidates_hold_the_largest_though_the_pieces_are_small(monkeypatch):
    monkeypatch.setattr(scores_module, "_ENTRIES", 1000)  # a few rows at a time
    for rule in RULES:
        for approximate in (False, True):
            code, expected = both(rule, problem(3, 90, 16, 320), 3, approximate, norms=True)[1:]
            assert torch.equal(code.to_dense(), expected.to_dense())


@pytest.mark.parametrize("approximate", [False, True], ids=["fp32", "bf16_select"])
def test_rows_that_cannot_be_told_apart_are_scored_again(approximate):
    x, W, b, gradients, W_dec = problem(0, 40, 8, 4096)
    x, W = x.abs() + 1, W.abs() + 1
    W = W[:, :1] + 1e-5 * torch.randn(W.shape)  # all features alike: bfloat16 cannot tell them apart
    code, expected = both("token_choice", (x, W, b * 1e-5, gradients, W_dec), 3, approximate, norms=False)[1:]
    pre = torch.addmm(b * 1e-5, x, W)
    # the same up to the rounding of float32, in which these scores nearly tie
    assert code.tokens.tolist() == expected.tokens.tolist()
    torch.testing.assert_close(
        pre[code.tokens, code.features], pre[expected.tokens, expected.features], rtol=1e-5, atol=1e-5
    )
    fast = Selection(x, W, b * 1e-5, approximate=True)
    fast.token_choice(3)
    assert fast.rescored == 1.0
    found = above_largest(ApproximateScores(x, W.T, None, b * 1e-5, Workspace()), torch.full((40,), 3))
    assert found.overflow_rows.tolist() == list(range(40))
    assert not found.pairs.tokens.numel()


@pytest.mark.parametrize("approximate", [False, True], ids=["fp32", "bf16_select"])
def test_mutual_choice_when_its_sample_misleads(approximate):
    x, W, b, *rest = problem(1, 6400, 4, 64)
    x[torch.arange(len(x)) % 100 != 0] = 0  # every hundredth token, the sampled ones, is all that there is
    fast, code, expected = both("mutual_choice", (x, W, b, *rest), 2, approximate, norms=False)
    assert torch.equal(code.to_dense(), expected.to_dense())
    assert fast.rescored == 1.0


def test_nothing_positive_matches_nothing():
    for rule in RULES:
        for approximate in (False, True):
            x, W, b, *rest = problem(0, 30, 4, 100)
            code, expected = both(rule, (x * 0, W, -b.abs(), *rest), 2, approximate, norms=True)[1:]
            assert code.tokens.numel() == expected.tokens.numel() == 0
            assert code.shape == (30, 100)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "threshold_choice"])  # takes every threshold
def test_impossible_requests_are_refused_alike(rule):
    x, W, b, gradients, W_dec = problem(0, 10, 4, 20)
    bad = {
        "token_choice": (21,),
        "mutual_choice": (0,),
        "feature_choice": (torch.full((20,), 11),),
        "gradient_choice": (2, -1.0),
    }[rule]
    messages = []
    for select in (
        Selection(x, W, b, gradients=gradients, W_dec=W_dec),
        DenseSelection(torch.addmm(b, x, W), None, influence_of(gradients, W_dec)),
    ):
        with pytest.raises(SaekitError) as error:
            getattr(select, rule)(*bad)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    for select in (Selection(x, W, b), DenseSelection(torch.addmm(b, x, W))):
        with pytest.raises(SaekitError, match="needs gradients"):
            select.gradient_choice(2, 1.0)


@pytest.mark.parametrize("approximate", [False, True], ids=["fp32", "bf16_select"])
def test_gradient_choice_without_weight_is_token_choice_bit_for_bit(approximate, generator):
    """Whatever the processor adds in whichever order: it is the same computation, and no gradients are looked at."""
    x, W, b = (torch.randn(shape, generator=generator) for shape in ((90, 300), (300, 512), (512,)))
    gradients, W_dec = torch.full_like(x, torch.nan), torch.full((512, 300), torch.nan)
    chosen = [
        Selection(x, W, b, approximate=approximate).token_choice(5),
        Selection(x, W, b, gradients=gradients, W_dec=W_dec, approximate=approximate).gradient_choice(5, 0.0),
        Selection(x, W, b, approximate=approximate).gradient_choice(5, 0.0),
    ]
    pre = torch.addmm(b, x, W)
    dense = [DenseSelection(pre).token_choice(5), DenseSelection(pre).gradient_choice(5, 0.0)]
    for expected, *others in (chosen, dense):
        for found in others:
            for name in ("tokens", "features", "values"):
                assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_buffers_are_made_once():
    workspace = Workspace()
    parts = problem(0, 200, 8, 512)
    sizes = []
    for _ in range(3):
        for approximate in (False, True):
            x, W, b, gradients, W_dec = parts
            select = Selection(
                x,
                W,
                b,
                token_norms=x.norm(dim=1),
                gradients=gradients,
                W_dec=W_dec,
                approximate=approximate,
                workspace=workspace,
            )
            for rule in RULES:
                getattr(select, rule)(*arguments(rule, 200, 512, 4, 0))
        sizes.append(workspace.nbytes)
    assert sizes[0] == sizes[1] == sizes[2]
    buffer = workspace("scores", (4, 4), torch.float32, x.device)
    assert workspace("scores", (2, 8), torch.float32, x.device).data_ptr() == buffer.data_ptr()


def test_exact_scores_are_the_dense_product():
    x, W, b, *_ = problem(0, 20, 6, 70)
    u = torch.linspace(0, 1, 20)
    for left, right in ((None, None), (u, None), (None, b), (u, b)):
        found = Scores(x, W.T, left, right, Workspace())
        bias = (
            0
            if left is None and right is None
            else torch.outer(torch.ones(20) if left is None else left, torch.ones(70) if right is None else right)
        )
        expected = x @ W + bias
        torch.testing.assert_close(found.rows(3, 9)[:, :70], expected[3:9], rtol=1e-5, atol=1e-4)
        assert bool(found.rows(3, 9)[:, 70:].isneginf().all())
        torch.testing.assert_close(found.exact_rows(torch.tensor([4, 1])), expected[[4, 1]], rtol=1e-5, atol=1e-4)
        every = DenseSelection(expected.abs() + 1).token_choice(70)
        torch.testing.assert_close(found.at(every), expected[every.tokens, every.features], rtol=1e-5, atol=1e-4)


def test_batches_and_budgets_of_nothing_and_gradients_of_zero():
    x, W, b, gradients, W_dec = problem(0, 90, 8, 128)
    for approximate in (False, True):
        empty = Selection(x[:0], W, b, approximate=approximate).token_choice(2)
        assert empty.shape == (0, 128)
        assert not empty.tokens.numel()
        alike = Selection(x, W[:, :1].expand(-1, 128) + 0.0, b * 0, approximate=approximate)
        assert not alike.feature_choice(torch.zeros(128, dtype=torch.long)).tokens.numel()
        assert alike.rescored == 0, "features without a budget are not looked at twice"
        zero = Selection(x, W, b, gradients=gradients * 0, W_dec=W_dec, approximate=approximate)
        expected = DenseSelection(torch.addmm(b, x, W)).token_choice(4)
        assert torch.equal(zero.gradient_choice(4, 5.0).to_dense(), expected.to_dense())


def test_a_misleading_sample_does_not_bring_up_every_positive_pair(monkeypatch):
    from saekit import selection

    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(4096, 16, generator=generator), torch.randn(16, 512, generator=generator)
    x[::64][:3] *= 100  # loud tokens, more of them in the sample than elsewhere
    sizes = []
    above = selection.above

    def counted(*arguments):
        found = above(*arguments)
        sizes.append(len(found.pairs.tokens))
        return found

    monkeypatch.setattr(selection, "above", counted)
    fast = Selection(x, W, torch.zeros(512))
    code = fast.mutual_choice(4 * 4096)
    expected = DenseSelection(x @ W).mutual_choice(4 * 4096)
    torch.testing.assert_close(code.to_dense(), expected.to_dense(), rtol=1e-5, atol=1e-4)
    assert max(sizes) < 20 * 4 * 4096
