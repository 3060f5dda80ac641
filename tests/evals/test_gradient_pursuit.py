"""Gradient pursuit against a plain loop over tokens, and on a trained dictionary."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saekit import SAEConfig, SaekitError, SparseAutoencoder, load
from saekit.activations import harvest
from saekit.evals import encode_by_pursuit
from saekit.evals.reconstruction import Reconstruction

ARCHITECTURES = ["topk", "jumprelu", "standard"]


def dictionary(architecture="standard", d_in=6, d_sae=24, seed=0):
    """Random, in float64: the order of near-equal products then differs from the reference's nowhere that matters."""
    g = torch.Generator().manual_seed(seed)
    config = SAEConfig(d_in, d_sae, architecture, k=min(3, d_sae) if architecture == "topk" else None)
    sae = SparseAutoencoder(config, torch.float64)
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64))
        if sae.threshold is not None:
            sae.threshold.copy_(torch.rand(d_sae, generator=g))
    return sae


def tokens_of(n, d_in=6, seed=1):
    return 3 * torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def by_hand(sae, x, l0):
    """The dense code, in float64, one token at a time."""
    W, b = sae.W_dec.double(), sae.b_dec.double()
    codes = torch.zeros(len(x), len(W), dtype=torch.float64)
    for f, signal, steps in zip(codes, x.double() - b, l0, strict=True):
        support, residual = [], signal
        for _ in range(steps):
            products = W @ residual
            free = [j for j in range(len(W)) if j not in support]
            support.append(free[int(products[free].argmax())])
            gradient = products[support]
            c = gradient @ W[support]
            if c @ c > 0:
                f[support] = torch.relu(f[support] + (c @ residual) / (c @ c) * gradient)
            residual = signal - f @ W
    return codes


@st.composite
def problems(draw):
    n, d_in, d_sae = draw(st.integers(0, 6)), draw(st.integers(1, 6)), draw(st.integers(1, 16))
    sae = dictionary(draw(st.sampled_from(ARCHITECTURES)), d_in, d_sae, draw(st.integers(0, 99)))
    l0 = draw(st.lists(st.sampled_from([0, d_sae]) | st.integers(0, d_sae), min_size=n, max_size=n))
    return sae, tokens_of(n, d_in, draw(st.integers(100, 199))), l0


@given(problems())
def test_equal_to_the_plain_loop(problem):
    sae, x, l0 = problem
    code = encode_by_pursuit(sae, x, torch.tensor(l0, dtype=torch.long))
    assert code.shape == (len(x), sae.cfg.d_sae)
    torch.testing.assert_close(code.to_dense(), by_hand(sae, x, l0), rtol=1e-5, atol=1e-8)
    assert (code.values > 0).all()
    assert (code.tokens.diff() >= 0).all()
    assert (code.matches_per_token() <= torch.tensor(l0)).all()


@given(problems())
def test_equal_decoder_rows(problem):
    sae, x, l0 = problem
    with torch.no_grad():
        sae.W_dec[sae.cfg.d_sae // 2 :] = sae.W_dec[: (sae.cfg.d_sae + 1) // 2].clone()
    code = encode_by_pursuit(sae, x, torch.tensor(l0, dtype=torch.long))
    expected = sae.decode(by_hand(sae, x, l0))  # which of two equal rows comes first is open, not what they sum to
    torch.testing.assert_close(sae.decode(code), expected, rtol=1e-5, atol=1e-8)
    assert torch.unique(code.tokens * sae.cfg.d_sae + code.features).numel() == len(code.values)


def test_by_hand_in_two_dimensions():
    sae = SparseAutoencoder(SAEConfig(2, 3, "standard"))
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[1.0, 0], [0, 2.0], [-1.0, 0]]))
        sae.b_dec.copy_(torch.tensor([1.0, 1.0]))
    x = torch.tensor([[4.0, 2.0], [1.0, 1.0]])
    # s = (3, 1), products (3, 2, -3): feature 0 by 3, r = (0, 1), products (0, 2, 0): feature 1 by 1/2; then r = 0
    for steps, expected in enumerate([[0, 0, 0], [3, 0, 0], [3, 0.5, 0], [3, 0.5, 0]]):
        found = encode_by_pursuit(sae, x, steps)
        torch.testing.assert_close(found.to_dense(), torch.tensor([expected, [0, 0, 0]]).float())


def test_a_decoder_of_zeros_gives_nothing():
    code = encode_by_pursuit(SparseAutoencoder(SAEConfig(6, 24, "standard")), tokens_of(5), 7)
    assert code.shape == (5, 24)
    assert code.values.numel() == 0
    assert code.values.dtype == torch.float32


def test_chunks_change_nothing(monkeypatch):
    sae, x = dictionary(), tokens_of(50)
    l0 = torch.randint(0, 25, (50,), generator=torch.Generator().manual_seed(2))
    whole = encode_by_pursuit(sae, x, l0)
    for rows in (0, 1, 7):
        monkeypatch.setattr("saekit.evals.gradient_pursuit._CHUNK", rows * 24)
        part = encode_by_pursuit(sae, x, l0)
        assert torch.equal(part.tokens, whole.tokens)
        torch.testing.assert_close(part.to_dense(), whole.to_dense(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_l0_as_a_number_a_tensor_or_the_dictionarys_own(architecture):
    sae, x = dictionary(architecture), tokens_of(12)
    number, tensor = encode_by_pursuit(sae, x, 5), encode_by_pursuit(sae, x, torch.full((12,), 5, dtype=torch.int32))
    assert torch.equal(number.to_dense(), tensor.to_dense())
    assert tensor.features.dtype == torch.long
    own = encode_by_pursuit(sae, x.view(3, 4, 6))
    assert not own.values.requires_grad
    given_l0 = encode_by_pursuit(sae, x, sae.encode_sparse(x).matches_per_token())
    assert torch.equal(own.to_dense(), given_l0.to_dense())


def test_mistakes_are_named():
    sae, x = dictionary(), tokens_of(4)
    for l0, message in {
        (1, 2, 3): r"l0 is 4 whole numbers, one a token, not \[3\] torch.int64",
        (1.0, 2.0, 3.0, 4.0): r"not \[4\] torch.float32",
        (0, 1, 2, -1): "l0 from -1 to 2 is not between 0 and the 24 features",
        (0, 1, 2, 25): "l0 from 0 to 25",
    }.items():
        with pytest.raises(SaekitError, match=message):
            encode_by_pursuit(sae, x, torch.tensor(l0))
    with pytest.raises(SaekitError, match="l0 from 25 to 25"):
        encode_by_pursuit(sae, x, 25)
    for width_of in (None, 2):
        with pytest.raises(SaekitError, match="activations of width 5 do not fit a dictionary of d_in = 6"):
            encode_by_pursuit(sae, x[:, :5], width_of)


@pytest.fixture(scope="module")
def trained(trained_run, source, contexts):
    sae = load(trained_run / "sae")
    (found,) = harvest(source.model, source.hook, [contexts])
    return sae, found.x


@torch.no_grad()
def fvu(sae, x, code):
    figures = Reconstruction(sae.cfg.d_in)
    figures.update(x, sae.decode(code))
    return figures.result()["fvu"]


def test_it_explains_more_than_the_trained_encoder(trained):
    sae, x = trained
    code, pursued = sae.encode_sparse(x), encode_by_pursuit(sae, x)
    assert (pursued.matches_per_token() <= code.matches_per_token()).all()
    before, after = fvu(sae, x, code), fvu(sae, x, pursued)
    assert 0 < after < 0.9 * before


@torch.no_grad()
def test_a_trained_dictionary_in_float32(trained):
    sae, x = trained
    x = x[:200]
    l0 = sae.encode_sparse(x).matches_per_token()
    expected, code = by_hand(sae, x, l0.tolist()), encode_by_pursuit(sae, x, l0).to_dense().double()
    same = ((code > 0) == (expected > 0)).all(1)  # a near-tie may fall otherwise in another precision
    assert same.float().mean() > 0.95
    torch.testing.assert_close(code[same], expected[same], rtol=1e-4, atol=1e-4)
    error = [float((x - sae.b_dec - f @ sae.W_dec.double()).square().sum()) for f in (code, expected)]
    assert error[0] == pytest.approx(error[1], rel=1e-3)
