"""Dictionaries that normalise each token first: as their definition says, saved, and pursued."""

from __future__ import annotations

import pytest
import torch
from made import dictionary, near

import saekit
from saekit import SAEConfig, SaekitError, SparseCode
from saekit.allocation import token_choice
from saekit.evals import encode_by_pursuit


def layer_norm_by_hand(sae, x):
    """Encoding and decoding in float64, entry by entry of the definition."""
    x = x.double()
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    std = ((x - mean).square().sum(-1, keepdim=True) / (x.shape[-1] - 1)).sqrt()
    pre = ((x - mean) / (std + 1e-5) - sae.b_dec.double()) @ sae.W_enc.double() + sae.b_enc.double()
    if sae.cfg.architecture == "jumprelu":
        f = torch.relu(pre) * (pre > sae.threshold.double())
    else:
        f = torch.relu(pre).where(pre >= pre.topk(4).values[..., -1:], 0)
    return f, (f @ sae.W_dec.double() + sae.b_dec.double()) * std + mean


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
@torch.no_grad()
def test_layer_norm_of_the_input(architecture, tmp_path, monkeypatch):
    sae = dictionary(architecture, input_normalization="layer_norm", dtype=torch.float64)
    x = (torch.randn(5, 7, 8) * torch.logspace(-2, 2, 7)[:, None] + 3).double()
    f, x_hat = layer_norm_by_hand(sae, x)
    torch.testing.assert_close(sae.encode(x), f)
    torch.testing.assert_close(sae(x), x_hat)
    torch.testing.assert_close(sae.decode(f, x), x_hat)
    near(sae.decode(SparseCode(*vars_of(sae.encode_sparse(x))), x), x_hat.reshape(-1, 8))
    near(sae.decode(sae.encode_sparse(x[2, 3]), x[2, 3])[0], x_hat[2, 3])
    monkeypatch.setattr("saekit.sae._CHUNK", 4 * 32)  # codes of parts, put together
    code = sae.encode_sparse(x)
    near(sae.decode(code), x_hat.reshape(-1, 8))
    half = code.with_values(code.values / 2)
    near(sae.decode(half), sae.decode(f / 2, x).reshape(-1, 8))
    strongest = code.values > code.values.median()
    near(sae.decode(code.where(strongest)), sae.decode(code.where(strongest).to_dense().view(5, 7, 32), x).view(-1, 8))
    chosen = token_choice(sae.pre_activations(x.flatten(0, 1)), 32)  # by a rule that knows nothing of the layer norm
    torch.testing.assert_close(chosen.to_dense() * (code.to_dense() > 0), code.to_dense())
    for lost in (f, chosen, SparseCode(*vars_of(code))):
        with pytest.raises(SaekitError, match="normalises each token: decode what encode_sparse gives"):
            sae.decode(lost)
    again = saekit.load(sae.save(tmp_path / "x"))
    assert again.cfg == SAEConfig(**{**vars(sae.cfg), "metadata": again.cfg.metadata})
    assert torch.equal(again(x), sae(x))


def vars_of(code):
    return code.tokens, code.features, code.values, code.n_tokens, code.n_features


@torch.no_grad()
def test_pursuit_behind_a_layer_norm():
    """It finds what a dictionary without one finds of the normalised tokens."""
    sae = dictionary("topk", input_normalization="layer_norm")
    plain = dictionary("topk")
    x = torch.randn(50, 8) * torch.logspace(-2, 2, 50)[:, None] + 3
    inner, scale = sae.normalised(x)
    code, expected = encode_by_pursuit(sae, x), encode_by_pursuit(plain, inner)
    torch.testing.assert_close(code.to_dense(), expected.to_dense())
    near(sae.decode(code), plain.decode(expected) * scale.scale + scale.mean)


def test_layer_norms_that_make_no_sense():
    for change in ({"affinity_scale": "token_norm"}, {"d_in": 1}):
        with pytest.raises(SaekitError, match="layer_norm is for activations of width 2 or more"):
            SAEConfig(
                **{"d_in": 8, "d_sae": 32, "architecture": "jumprelu", "input_normalization": "layer_norm", **change}
            )
    with pytest.raises(SaekitError, match="unknown input_normalization 'rms'"):
        SAEConfig(8, 32, "jumprelu", input_normalization="rms")
