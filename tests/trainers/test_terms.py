"""A variant from elsewhere with losses of its own and something that it learns: right gradients, resumed to the bit."""

from __future__ import annotations

import json

import pytest
import torch

from saekit.errors import SaekitError
from saekit.kernels.decode import decode
from saekit.kernels.workspace import Workspace
from saekit.sae import SAEConfig, SparseAutoencoder
from saekit.trainers import VARIANTS, TrainConfig, Variant, train
from saekit.trainers.optimizer import DictionaryAdam
from saekit.trainers.statistics import Statistics
from saekit.trainers.terms import AutogradTerm, Reconstruction, Step


class Sparsity(AutogradTerm):
    """A penalty of each activation by the norm of its direction, and by what is learned of its feature."""

    name, weight = "sparsity", 0.3

    def __init__(self, cost):
        self.cost = cost

    def loss(self, step, code, W_dec, b_dec):
        norms = W_dec.norm(dim=1)[code.features]
        return (code.values * norms * torch.exp(self.cost[code.features])).sum() / len(step.x)


class Rebuilt(AutogradTerm):
    """The reconstruction loss once more, by autograd."""

    name = "rebuilt"

    def loss(self, step, code, W_dec, b_dec):
        return (step.x - decode(code, W_dec, b_dec)).square().sum() / step.variance


class Priced(Variant):
    """TopK that learns a price for each feature."""

    architecture = "topk"

    def begin(self, sae):
        self.cost = torch.zeros_like(sae.b_enc).requires_grad_()

    def parameters(self):
        return {"cost": self.cost}

    def allocate(self, batch):
        return batch.select.token_choice(self.k)

    def terms(self):
        return [Reconstruction(), Sparsity(self.cost)]


@pytest.fixture
def priced(monkeypatch):
    monkeypatch.setitem(VARIANTS, "priced", Priced)


def a_step(generator=0, n=40, d=7, F=23, k=3):
    torch.manual_seed(generator)
    sae = SparseAutoencoder(SAEConfig(d, F, "topk", k=k), torch.float64)
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn_like(p))
    x = torch.randn(n, d, dtype=torch.float64)
    with torch.no_grad():
        code = sae.encode_sparse(x)
        centred = x - sae.b_dec
    return Step(sae, x, centred, code, None, Statistics(F, 100, torch.device("cpu")), 0.5, Workspace())


def dense(step, loss):
    """Gradients of a loss of (x, f, W_dec, b_dec), f the dense code, by autograd."""
    sae = step.sae
    leaves = [p.detach().clone().requires_grad_() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)]
    W_enc, b_enc, W_dec, b_dec = leaves
    matched = (step.code.to_dense() > 0).double()
    f = torch.relu((step.x - b_dec) @ W_enc + b_enc) * matched
    value = loss(step.x, f, W_dec, b_dec)
    return value, torch.autograd.grad(value, leaves, allow_unused=True)


def test_gradients_of_autograd_terms_are_those_of_dense_autograd():
    step = a_step()
    cost = torch.randn(23, dtype=torch.float64, requires_grad=True)
    optimizer = DictionaryAdam(step.sae, 1.0, {"cost": cost})
    optimizer.begin_step(overwritten=False)
    for term in (Sparsity(cost), Rebuilt()):
        term.add(step)

    def loss(x, f, W_dec, b_dec):
        price = (f * W_dec.norm(dim=1) * torch.exp(cost)).sum() / len(x)
        return 0.3 * price + (x - f @ W_dec - b_dec).square().sum() / (x - x.mean(0)).square().sum()

    value, expected = dense(step, loss)
    sae = step.sae
    for got, want in zip((sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec), expected, strict=True):
        torch.testing.assert_close(got.grad, want, rtol=1e-10, atol=1e-10)
    own = torch.autograd.grad(loss(step.x, step.code.to_dense(), sae.W_dec.detach(), sae.b_dec.detach()), cost)[0]
    torch.testing.assert_close(cost.grad, own, rtol=1e-10, atol=1e-10)
    assert value > 0
    assert cost.grad.abs().sum() > 0


def test_the_reconstruction_by_hand_is_that_by_autograd():
    by_hand, by_autograd = a_step(1), a_step(1)
    for step, term in ((by_hand, Reconstruction()), (by_autograd, Rebuilt())):
        DictionaryAdam(step.sae, 1.0).begin_step(overwritten=term.overwrites)
        torch.testing.assert_close(term.add(step), step.fvu, rtol=1e-12, atol=0)
    for a, b in zip(by_hand.sae.parameters(), by_autograd.sae.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)


def settings(cache, out, **changes):
    base = {"variant": "priced", "cache": cache, "out": out, "width": 48, "k": 4, "batch_size": 256, "device": "cpu"}
    return TrainConfig(**{**base, "tokens": 256 * 16, "log_every": 1, "checkpoint_every": 5, **changes})


def test_its_loss_has_a_name_in_the_metrics_and_its_parameter_is_learned(cache, tmp_path, priced):
    from safetensors.torch import load_file

    run = train(settings(cache, tmp_path / "run"), quiet=True)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 16
    for line in lines:
        assert line["loss"] == pytest.approx(line["fvu"] + 0.3 * line["sparsity"], rel=1e-5)
    cost = load_file(run.path / "statistics.safetensors")["cost"]
    assert cost.shape == (48,)
    assert (cost < 0).any(), "a lower price lowers the loss"


def test_it_goes_on_to_the_bit_where_it_was_stopped(cache, tmp_path, priced, stopped_at):
    whole = train(settings(cache, tmp_path / "whole"), quiet=True)
    with stopped_at(7), pytest.raises(SaekitError, match="stopped"):
        train(settings(cache, tmp_path / "part"), quiet=True)
    again = train(settings(cache, tmp_path / "part"), resume=True, quiet=True)
    for name in ("sae/sae_weights.safetensors", "statistics.safetensors"):
        assert (whole.path / name).read_bytes() == (again.path / name).read_bytes()
