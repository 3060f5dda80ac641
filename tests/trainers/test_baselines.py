"""The baselines: gradients against dense float64 autograd, what is saved against what was trained, resumption."""

from __future__ import annotations

import json

import pytest
import torch

import saekit
from saekit import SaekitError
from saekit.activations import ActivationCache
from saekit.kernels.workspace import Workspace
from saekit.sae import SAEConfig, SparseAutoencoder
from saekit.selection import Selection
from saekit.trainers import VARIANTS, TrainConfig, train
from saekit.trainers.optimizer import DictionaryAdam
from saekit.trainers.statistics import Statistics
from saekit.trainers.terms import Step
from saekit.trainers.variant import Batch

BASELINES = ["relu", "jumprelu", "gated", "matryoshka", "hierarchical_topk", "frequency_control"]
N, D, F, K = 60, 9, 32, 6


def jump(pre, theta, width):
    """pre · [pre > θ], with the straight-through estimate of its slope in θ."""

    class Jump(torch.autograd.Function):
        @staticmethod
        def forward(ctx, pre, theta):
            ctx.save_for_backward(pre, theta)
            return pre * (pre > theta)

        @staticmethod
        def backward(ctx, grad):
            pre, theta = ctx.saved_tensors
            near = ((pre - theta).abs() < width / 2).double()
            return grad * (pre > theta), (-grad * near * theta / width).sum(0)

    return Jump.apply(pre, theta)


def active(pre, theta, width):
    """[pre > θ], whose slope in θ is estimated and whose slope in pre is not used."""

    class Active(torch.autograd.Function):
        @staticmethod
        def forward(ctx, pre, theta):
            ctx.save_for_backward(pre, theta)
            return (pre > theta).double()

        @staticmethod
        def backward(ctx, grad):
            pre, theta = ctx.saved_tensors
            return None, (-grad * ((pre - theta).abs() < width / 2) / width).sum(0)

    return Active.apply(pre, theta)


class Problem:
    """One step of a variant on random numbers in float64, and what its dense twin needs."""

    def __init__(self, name, seed=0, **settings):
        torch.manual_seed(seed)
        base = {"variant": name, "width": F, "k": K, "batch_size": N, "tokens": 100 * N, "device": "cpu"}
        self.config = TrainConfig(**{**base, "dead_after": 500, **settings})
        self.variant = VARIANTS[name](self.config, F)
        self.sae = SparseAutoencoder(SAEConfig(D, F, "topk", k=K), torch.float64)
        with torch.no_grad():
            for p in self.sae.parameters():
                p.copy_(torch.randn_like(p) * 0.5)
            self.sae.W_dec.div_(self.sae.W_dec.norm(dim=1, keepdim=True))
        self.x = torch.randn(N, D, dtype=torch.float64)
        self.variant.begin(self.sae)
        self.statistics = Statistics(F, 100, torch.device("cpu"))
        self.statistics.since_fired[::7] = 1000
        self.terms = list(self.variant.terms())

    def run(self, done=0.5):
        """Gradients by the variant's own terms; returns the weighted loss."""
        sae = self.sae
        optimizer = DictionaryAdam(sae, 1.0, self.variant.parameters())
        with torch.no_grad():
            centred = self.x - sae.b_dec
        norms = centred.norm(dim=1) if self.variant.compares_tokens else None
        select = Selection(centred, sae.W_enc.detach(), sae.b_enc.detach(), token_norms=norms)
        code = self.variant.allocate(Batch(select, N, self.statistics, done))
        self.step = Step(sae, self.x, centred, code, norms, self.statistics, done, Workspace())
        optimizer.begin_step(overwritten=self.terms[0].overwrites)
        return float(sum(term.weight * term.add(self.step) for term in self.terms))

    def check(self, dense):
        """Compare with the gradients of a dense loss(x, pre, W_dec, b_dec, learned)."""
        value = self.run()
        sae = self.sae
        leaves = [p.detach().clone().requires_grad_() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)]
        learned = {name: p.detach().clone().requires_grad_() for name, p in self.variant.parameters().items()}
        W_enc, b_enc, W_dec, b_dec = leaves
        loss = dense(self.x, (self.x - b_dec) @ W_enc + b_enc, W_dec, b_dec, learned)
        assert value == pytest.approx(loss.item(), rel=1e-10)
        expected = torch.autograd.grad(loss, [*leaves, *learned.values()])
        ours = [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, *self.variant.parameters().values()]
        for got, want in zip(ours, expected, strict=True):
            assert float(want.abs().max()) > 0
            torch.testing.assert_close(got.grad, want, rtol=1e-10, atol=1e-10)


def fvu(x, x_hat):
    return (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()


def test_relu():
    problem = Problem("relu", l1=0.3)
    norms = (problem.x - problem.sae.b_dec.detach()).norm(dim=1).sum()

    def dense(x, pre, W_dec, b_dec, learned):
        z = torch.relu(pre)
        return fvu(x, z @ W_dec + b_dec) + 0.3 * (z * W_dec.norm(dim=1)).sum() / norms

    problem.check(dense)
    assert problem.step.code.l0 > K, "a fixed weight aims at no k"


def test_jumprelu():
    problem = Problem("jumprelu", bandwidth=0.4, l0_weight=0.7, pre_act_weight=0.02)
    problem.run()  # thresholds begin
    with torch.no_grad():
        problem.variant.threshold.add_(torch.rand(F, dtype=torch.float64) * 0.3)
    dead = problem.statistics.dead(500)

    def dense(x, pre, W_dec, b_dec, learned):
        theta = learned["threshold"]
        l0 = active(pre, theta, 0.4).sum() / N
        revival = torch.relu(theta - pre)[:, dead].sum() / N
        return fvu(x, jump(pre, theta, 0.4) @ W_dec + b_dec) + 0.7 * (l0 / K - 1) ** 2 + 0.02 * revival

    problem.check(dense)
    assert dead.any()


def test_jumprelu_begins_at_its_k():
    problem = Problem("jumprelu")
    problem.run()
    assert problem.step.code.l0 == pytest.approx(K, abs=1 / N)


def test_gated():
    problem = Problem("gated", l1=0.2)
    with torch.no_grad():
        for p in problem.variant.parameters().values():
            p.copy_(0.3 * torch.randn_like(p))
    norms = (problem.x - problem.sae.b_dec.detach()).norm(dim=1).sum()

    def dense(x, pre, W_dec, b_dec, learned):
        z = torch.relu(pre * learned["log_scale"].exp() + learned["shift"]) * (pre > 0)
        gate = torch.relu(pre)
        aux = fvu(x, gate @ W_dec.detach() + b_dec.detach())
        return fvu(x, z @ W_dec + b_dec) + 0.2 * (gate * W_dec.norm(dim=1)).sum() / norms + aux

    problem.check(dense)


@pytest.mark.parametrize("choice", ["mutual", "token"])
def test_matryoshka(choice):
    problem = Problem("matryoshka", prefixes="4,0.5,1", choice=choice)
    assert problem.variant.facts() == {"matryoshka_widths": [4, 16, 32]}

    def dense(x, pre, W_dec, b_dec, learned):
        z = torch.relu(pre) * (problem.step.code.to_dense() > 0)
        return sum(fvu(x, z[:, :m] @ W_dec[:m] + b_dec) for m in (4, 16, 32)) / 3

    problem.check(dense)


def test_hierarchical_topk():
    problem = Problem("hierarchical_topk", k_list="1,3")

    def dense(x, pre, W_dec, b_dec, learned):
        parts = []
        for k in (1, 3, K):
            chosen = torch.zeros_like(pre).scatter(1, pre.topk(k, dim=1).indices, 1)
            parts.append(fvu(x, (torch.relu(pre) * chosen) @ W_dec + b_dec))
        return sum(parts) / 3

    problem.check(dense)


def test_frequency_control_meets_its_budgets_without_a_batch_rule():
    problem = Problem("frequency_control", control_rate=0.05, control_fraction=0.8)
    variant = problem.variant
    problem.statistics._fired += torch.linspace(1, 0.1, F, dtype=torch.float64)
    problem.run(done=0.1)
    assert variant.thresholds is None
    problem.run(done=0.2)
    before = problem.step.code
    assert before.l0 == pytest.approx(K, abs=1 / N), "where mutual choice ends, nothing is cut off"
    fired = torch.zeros(F, dtype=torch.float64)
    for step in range(1200):
        problem.x = torch.randn(N, D, dtype=torch.float64)
        problem.run(done=min(1.0, 0.2 + step / 1000))
        fired += problem.step.code.matches_per_feature() if step >= 800 else 0
    rates, budgets = fired / (400 * N), variant.budgets / N
    assert float((rates / budgets - 1).abs().median()) < 0.1
    assert (rates > 0).all()


def settings(name, cache, out, **changes):
    base = {"variant": name, "cache": cache, "out": out, "width": 48, "k": 4, "batch_size": 256, "device": "cpu"}
    return TrainConfig(**{**base, "tokens": 256 * 20, "log_every": 1, "checkpoint_every": 5, **changes})


@pytest.mark.parametrize("name", BASELINES)
def test_it_goes_on_to_the_bit_and_loads(name, cache, tmp_path, stopped_at):
    whole = train(settings(name, cache, tmp_path / "whole"), quiet=True)
    with stopped_at(12), pytest.raises(SaekitError, match="stopped"):
        train(settings(name, cache, tmp_path / "part"), quiet=True)
    again = train(settings(name, cache, tmp_path / "part"), resume=True, quiet=True)
    for file in ("sae/sae_weights.safetensors", "statistics.safetensors"):
        assert (whole.path / file).read_bytes() == (again.path / file).read_bytes()
    lines = [json.loads(line) for line in (whole.path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["fvu"] < lines[0]["fvu"]
    sae = saekit.load(whole.path)
    assert sae.cfg.architecture == VARIANTS[name].architecture
    x = next(iter(ActivationCache.open(cache).batches("heldout"))).x
    assert 0 < sae.encode_sparse(x).l0 < 48


def test_a_gated_dictionary_is_saved_as_the_jumprelu_dictionary_that_it_is(cache, tmp_path):
    problem = Problem("gated", l1=0.2)
    with torch.no_grad():
        for p in problem.variant.parameters().values():
            p.copy_(0.3 * torch.randn_like(p))
    problem.run()
    saved = SparseAutoencoder(SAEConfig(D, F, "jumprelu"), torch.float64)
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            getattr(saved, name).copy_(getattr(problem.sae, name))
        problem.variant.calibrate(saved, None)
        torch.testing.assert_close(saved.encode(problem.x), problem.step.code.to_dense(), rtol=1e-10, atol=1e-12)


def test_k_is_annealed(cache, tmp_path):
    run = train(settings("topk", cache, tmp_path / "run", k_start=12, k_anneal=0.5), quiet=True)
    l0 = [json.loads(line)["l0"] for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert l0[0] == 12
    assert l0[10:] == [4.0] * 10
    assert l0 == sorted(l0, reverse=True)
    with pytest.raises(SaekitError, match="k_start = 50 is larger than the width of 48"):
        settings("topk", cache, tmp_path / "r", k_start=50)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("relu", {"l1": -1}, "l1 = -1"),
        ("jumprelu", {"bandwidth": 0}, "bandwidth = 0"),
        ("matryoshka", {"prefixes": "a"}, "prefixes = a are no numbers"),
        ("matryoshka", {"prefixes": "64"}, "within the width of 48"),
        ("hierarchical_topk", {"k_list": "9"}, "k_list = 9 are not all from 1 to k = 4"),
        ("frequency_control", {"width": 2000}, "cannot be shared among 2000 features"),
    ],
)
def test_impossible_settings(name, changes, message, cache, tmp_path):
    with pytest.raises(SaekitError, match=message):
        train(settings(name, cache, tmp_path / "run", **changes))
