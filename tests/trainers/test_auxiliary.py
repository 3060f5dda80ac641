"""The auxiliary losses by their definition, and the limit in which one is the other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saekit import SAEConfig, SaekitError, SparseAutoencoder
from saekit.kernels.workspace import Workspace
from saekit.trainers import TrainConfig, auxiliary, train
from saekit.trainers.auxiliary import auxiliary_step


def dictionary(seed, d=6, width=20, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    sae = SparseAutoencoder(SAEConfig(d, width, "topk", k=3), dtype)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return sae, generator


def loss_of(sae, x, x_hat, pool, k_aux, weight=1.0):
    """The loss, with its gradients in ``grad``."""
    for parameter in sae.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with torch.no_grad():
        return auxiliary_step(sae, x - sae.b_dec, x - x_hat, pool, k_aux, weight, Workspace())


@given(st.integers(0, 1000), st.data())
def test_the_loss_and_its_gradients_by_definition(seed, data):
    sae, generator = dictionary(seed)
    x, x_hat = (torch.randn(8, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    pool = torch.tensor(data.draw(st.lists(st.booleans(), min_size=20, max_size=20).filter(any)))
    k_aux = data.draw(st.integers(1, 20))
    loss = loss_of(sae, x, x_hat, pool, k_aux, weight=0.7)
    error = x - x_hat
    estimate = torch.zeros_like(x)
    for t in range(8):
        pre = {j: (x[t] - sae.b_dec) @ sae.W_enc[:, j] + sae.b_enc[j] for j in range(20) if pool[j]}
        for j in sorted(pre, key=lambda j: -pre[j].item())[:k_aux]:
            estimate[t] = estimate[t] + torch.relu(pre[j]) * sae.W_dec[j]
    expected = (error - estimate).square().sum() / (error - error.mean(0)).square().sum()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    wanted = torch.autograd.grad(0.7 * expected, list(sae.parameters()))
    for parameter, gradient in zip(sae.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)


def test_a_few_tokens_at_a_time_give_the_same(monkeypatch):
    sae, generator = dictionary(0)
    x, x_hat = (torch.randn(50, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    pool = torch.arange(20) % 3 > 0
    whole = loss_of(sae, x, x_hat, pool, 4)
    gradients = [p.grad for p in sae.parameters()]
    monkeypatch.setattr(auxiliary, "_ENTRIES", 60)  # 4 tokens
    torch.testing.assert_close(loss_of(sae, x, x_hat, pool, 4), whole)
    for parameter, gradient in zip(sae.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_among_equal_pre_activations_the_first_count():
    pre = torch.tensor([[3.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0], [-1.0, -1.0, 0.0, 0.0]])
    assert auxiliary._largest(pre, 2).tolist()[:2] == [[True, True, False, False], [False, False, True, True]]


def test_a_dead_features_encoder_learns_and_the_others_do_not():
    sae, generator = dictionary(0)
    pool = torch.zeros(20, dtype=torch.bool)
    pool[4] = True
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    loss_of(sae, x, x * 0.5, pool, 3)
    assert sae.W_enc.grad[:, 4].abs().min() > 0
    assert sae.W_dec.grad[4].abs().min() > 0
    others = torch.arange(20) != 4
    assert not sae.W_enc.grad[:, others].any()
    assert not sae.W_dec.grad[others].any()


def test_no_error_gives_no_loss_instead_of_nan():
    sae, _ = dictionary(0)
    x = torch.zeros(4, 6, dtype=torch.float64)
    with torch.no_grad():
        sae.b_dec.zero_()
    for b_enc in (-1, 1):  # nothing of the pool is active, or something
        with torch.no_grad():
            sae.b_enc.fill_(b_enc)
        assert loss_of(sae, x, x, torch.ones(20, dtype=torch.bool), 3) == 0
        assert not any(bool(p.grad.any()) for p in sae.parameters())


@pytest.mark.parametrize("variant", ["topk", "mutual_choice", "feature_choice", "gradient_topk"])
def test_aux_zipf_without_tolerance_is_aux_k_bit_for_bit(cache, tmp_path, variant):
    base = {"cache": cache, "variant": variant, "width": 64, "k": 4, "batch_size": 128, "tokens": 128 * 40}
    base |= {"dead_after": 40, **({"feature_choice_fraction": 0.5} if variant == "feature_choice" else {})}
    runs = {
        name: train(TrainConfig(**base, **changes, out=tmp_path / name), quiet=True).sae.state_dict()
        for name, changes in {
            "aux_k": {"aux": "aux_k"},
            "limit": {"aux": "aux_zipf", "tau": 0.0},
            "aux_zipf": {"aux": "aux_zipf", "tau": 0.5},
            "none": {},
        }.items()
    }
    assert all(torch.equal(value, runs["limit"][name]) for name, value in runs["aux_k"].items())
    assert not torch.equal(runs["aux_k"]["W_enc"], runs["none"]["W_enc"]), "the loss does something"
    assert not torch.equal(runs["aux_k"]["W_enc"], runs["aux_zipf"]["W_enc"])


def test_impossible_settings(cache, tmp_path):
    with pytest.raises(SaekitError, match="k_aux = 65 is larger than the width of 64"):
        TrainConfig(aux="aux_k", k_aux=65, width=64)
    narrow = {"aux": "aux_k", "k_aux": 65, "expansion": 4, "k": 4}
    with pytest.raises(SaekitError, match="k_aux = 65 is larger than the width of 48"):
        train(TrainConfig(cache=cache, **narrow, batch_size=128, tokens=1280, out=tmp_path / "r"))
    with pytest.raises(SaekitError, match="unknown auxiliary loss 'aux_z'; did you mean 'aux_k' or 'aux_zipf'"):
        TrainConfig(aux="aux_z")
    with pytest.raises(SaekitError, match="tau = -0.1"):
        TrainConfig(aux="aux_zipf", tau=-0.1)
