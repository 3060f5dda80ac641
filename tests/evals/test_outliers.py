"""FVU without tokens of extreme norm, against plain sums over all tokens; and the warning where those hold much."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from saekit import SAEConfig, SparseAutoencoder
from saekit.activations import ContextBatch
from saekit.errors import SaekitWarning
from saekit.evals import Report, evaluate, evaluate_activations
from saekit.evals.reconstruction import Reconstruction


def found_in(x, x_hat, cuts=()):
    figures = Reconstruction(x.shape[1])
    bounds = [0, *sorted(cuts), len(x)]
    for start, stop in itertools.pairwise(bounds):
        if stop > start:
            figures.update(x[start:stop], x_hat[start:stop])
    return figures.result()


def fvu(x, x_hat):
    return float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())


def plain(x, x_hat):
    """All tokens at once: the FVU of those within the limit, how many are beyond, the variance that these hold."""
    norms = x.norm(dim=1)
    median = float(norms.sort().values[(len(x) - 1) // 2])
    limit = 2 ** ((math.floor(64 * math.log2(median)) + 213) / 64)
    assert 9.9 * median < limit < 10.1 * median
    assume(bool(((norms / limit).log().abs() > 1e-9).all()))
    out = norms > limit
    squares = (x - x.mean(0)).square().sum(1)
    return fvu(x[~out], x_hat[~out]), int(out.sum()), float(squares[out].sum() / squares.sum())


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(8, 200),
    spread=st.floats(0, 4),
    cuts=st.lists(st.integers(0, 200), max_size=6),
)
def test_the_figures_are_those_of_plain_sums_however_the_stream_is_cut(seed, n, spread, cuts):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, dtype=torch.float64, generator=generator)
    x = x * (spread * torch.randn(n, 1, dtype=torch.float64, generator=generator)).exp() + 0.1
    x_hat = x + 0.3 * torch.randn(n, 3, dtype=torch.float64, generator=generator)
    without, outliers, share = plain(x, x_hat)
    found = found_in(x, x_hat, [min(cut, n) for cut in cuts])
    assert found["outliers"] == outliers
    assert found["outlier_variance_share"] == pytest.approx(share, rel=1e-6, abs=1e-12)
    # sums about an origin that outliers have moved lose digits: as many as its square is larger than the variance
    assert found["fvu_without_outliers"] == pytest.approx(without, rel=1e-5)
    if not outliers:
        assert (found["fvu_without_outliers"], found["outlier_variance_share"]) == (found["fvu"], 0)


def with_sinks(n=8192, d=16, size=100.0):
    """Tokens of mean norm √d, and one of 256 with so many times that in one direction; x̂ misses half of the variance
    of the others, and of sinks nothing to speak of."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, d, dtype=torch.float64, generator=generator)
    sinks = torch.arange(n) % 256 == 7
    x[sinks] *= 0.01
    x[sinks, 0] += size * d**0.5
    x_hat = x.clone()
    x_hat[:, d // 2 :] = 0
    return x, x_hat, sinks


def test_sinks_hide_what_is_missed_of_all_other_tokens():
    x, x_hat, sinks = with_sinks()
    found = found_in(x, x_hat, range(0, len(x), 500))
    assert found["fvu"] == pytest.approx(fvu(x, x_hat), rel=1e-9)
    assert found["fvu"] < 0.02
    assert found["fvu_without_outliers"] == pytest.approx(fvu(x[~sinks], x_hat[~sinks]), rel=1e-9)
    assert 0.45 < found["fvu_without_outliers"] < 0.55
    assert found["outliers"] == int(sinks.sum()) == 32
    assert found["outlier_variance_share"] > 0.97


def half(d):
    """A dictionary that reconstructs the first half of the dimensions, and nothing of the others."""
    sae = SparseAutoencoder(SAEConfig(d, d, "standard"))
    with torch.no_grad():
        for tensor in sae.parameters():
            tensor.zero_()
        for j in range(d // 2):
            sae.W_dec[2 * j, j], sae.W_dec[2 * j + 1, j] = 1, -1
        sae.W_enc.copy_(sae.W_dec.T)
    return sae


def test_it_is_said_where_few_tokens_hold_much():
    x, _, sinks = with_sinks()
    with pytest.warns(SaekitWarning, match=r"32 of 8,192 tokens have more than 10 times .* hold 9\d% .* FVU is 0\.01"):
        report = evaluate_activations(half(16), x.float().split(1000))
    assert report["reconstruction"]["outliers"] == 32
    assert report["reconstruction"]["fvu_without_outliers"] == pytest.approx(0.5, abs=0.02)
    for told in (repr(report), report._repr_html_()):
        assert all(words in told for words in ("FVU rest", "outliers", "tokens beyond 10 times the median norm"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = evaluate_activations(half(16), x[~sinks].float().split(1000))
        assert report["reconstruction"]["outliers"] == 0
        assert report["reconstruction"]["fvu_without_outliers"] == report["reconstruction"]["fvu"]
        assert "outlier" not in repr(report)
        x[5] = 11 * x[5] / x[5].norm() * 4  # one outlier that holds little
        assert evaluate_activations(half(16), x[~sinks].float().split(1000))["reconstruction"]["outliers"] == 1


def test_norms_of_zero():
    x = torch.zeros(10, 2)
    x[:4] = torch.randn(4, 2)
    assert found_in(x, 0.5 * x)["outliers"] == 0, "where the median is 0, nothing is known to be large"
    x[4:8] = 1
    x[9] = 200
    found = found_in(x, 0.5 * x, [1, 2])
    assert found["outliers"] == 1


def test_memory_does_not_grow_with_the_tokens():
    figures = Reconstruction(4)
    for _ in range(20):
        figures.update(torch.randn(1000, 4).clamp(-2, 2) + 3, torch.zeros(1000, 4))
    size = figures.outliers.sums.numel()
    assert size <= (4 + 3) * 64 * math.log2(10 / 2)  # norms are 2 to 10
    figures.update(torch.full((100_000, 4), 3.0), torch.zeros(100_000, 4))
    assert figures.outliers.sums.numel() <= size + 7


def test_first_positions_are_not_scored(source, contexts):
    batch = ContextBatch(*(column[:2, :32] for column in contexts))
    sae = half(256)
    first = evaluate(sae, source.model, batch, hook=source.hook)
    assert first["sparsity"]["tokens"] == int(batch.kept.sum())
    later = evaluate(sae, source.model, batch, hook=source.hook, skip_first=9)
    assert later["sparsity"]["tokens"] == later["reconstruction"]["tokens"] == int(batch.kept[:, 9:].sum())
    assert later["downstream"]["tokens"] == int(batch.kept[:, 9:-1].sum())
    plain = evaluate(sae, source.model, batch.tokens, hook=source.hook, kept=torch.ones_like(batch.kept))
    assert plain["sparsity"]["tokens"] == 2 * 31, "not even where a mask keeps it"
    sae.with_metadata(saekit={"provenance": {"skip_first": 9}})
    assert evaluate(sae, source.model, batch, hook=source.hook).groups == later.groups, "as it was trained"
    assert evaluate(sae, source.model, batch, hook=source.hook, skip_first=1).groups == first.groups
    assert isinstance(later, Report)
