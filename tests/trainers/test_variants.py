"""What each variant does over a whole run: schedules, frozen budgets, thresholds, gradients, outside variants."""

from __future__ import annotations

import itertools
import pickle
import signal

import pytest
import torch
from test_step import decided

import saekit
from saekit import SAEConfig, SaekitError, SparseAutoencoder
from saekit.activations import ActivationCache
from saekit.allocation import mutual_choice, token_choice
from saekit.interrupt import Interrupted
from saekit.selection import DenseSelection
from saekit.trainers import VARIANTS, TrainConfig, Variant, train
from saekit.trainers.calibration import feature_thresholds, with_plain_thresholds
from saekit.trainers.checkpoint import load_checkpoints
from saekit.trainers.feature_choice import FeatureChoice
from saekit.trainers.optimizer import DictionaryAdam
from saekit.trainers.statistics import Statistics
from saekit.trainers.variant import Batch
from saekit.zipf import ranks_of, zipf_budgets


def config(cache, out, **changes):
    base = {"cache": cache, "out": out, "width": 64, "k": 4, "batch_size": 128, "tokens": 128 * 50, "device": "cpu"}
    return TrainConfig(**{**base, "lr": 3e-3, **changes})


def rows(cache, part):
    return torch.cat([batch.x for batch in ActivationCache.open(cache).batches(part)])


def batch(pre, done, statistics=None):
    statistics = statistics or Statistics(pre.shape[1], 1000, torch.device("cpu"))
    return Batch(DenseSelection(pre), len(pre), statistics, done)


def test_feature_choice_begins_with_mutual_choice_and_then_freezes_its_budgets(generator):
    cfg = TrainConfig(variant="feature_choice", k=3, width=40, batch_size=32, tokens=3200, feature_choice_fraction=0.25)
    variant = FeatureChoice(cfg, 40)
    pre = torch.randn(32, 40, generator=generator)
    statistics = Statistics(40, 1000, torch.device("cpu"))
    for done in (0.0, 0.74):
        code, expected = variant.allocate(batch(pre, done, statistics)), mutual_choice(pre, 96)
        assert torch.equal(code.features, expected.features)
        statistics.update(code)
    assert variant.budgets is None
    density = statistics.density
    code = variant.allocate(batch(pre.abs() + 1, 0.75, statistics))
    assert torch.equal(code.matches_per_feature(), variant.budgets), "positive columns are used up to their budgets"
    law = variant.law
    assert torch.equal(variant.budgets, zipf_budgets(96, 40, 32, law.exponent, law.shift)[ranks_of(density)])
    assert (variant.budgets[density.argsort(descending=True)].diff() <= 0).all(), "denser features have larger budgets"
    frozen = variant.budgets.clone()
    statistics.update(code)
    variant.allocate(batch(pre, 0.9, statistics))
    assert torch.equal(variant.budgets, frozen)


def test_uniform_and_given_budgets():
    base = {"variant": "feature_choice", "k": 3, "width": 40, "batch_size": 40, "tokens": 4000}
    pre = torch.ones(40, 40)
    for changes, expected in (
        ({"budgets": "uniform"}, [3] * 40),
        ({"zipf_exponent": 1.5, "zipf_shift": 2.0}, zipf_budgets(120, 40, 40, 1.5, 2.0).tolist()),
    ):
        variant = FeatureChoice(TrainConfig(**base, **changes, feature_choice_fraction=1.0), 40)
        variant.allocate(batch(pre, 0.0))
        assert variant.budgets.tolist() == expected


def test_a_run_of_feature_choice_stopped_after_the_switch_goes_on_as_if_it_had_not_been(cache, tmp_path, monkeypatch):
    settings = {"variant": "feature_choice", "feature_choice_fraction": 0.5, "aux": "aux_zipf", "dead_after": 300}
    whole = train(config(cache, tmp_path / "whole", **settings), quiet=True)
    step, calls = DictionaryAdam.step, itertools.count()

    def interrupted(self, lr):
        if next(calls) == 35:
            signal.raise_signal(signal.SIGINT)
        return step(self, lr)

    monkeypatch.setattr(DictionaryAdam, "step", interrupted)
    with pytest.raises(Interrupted):
        train(config(cache, tmp_path / "parts", **settings), quiet=True)
    monkeypatch.undo()
    saved = load_checkpoints([tmp_path / "parts/checkpoints"], torch.device("cpu"))[1][0]["variant"]
    assert int(saved["budgets"].sum()) == 4 * 128
    parts = train(config(cache, tmp_path / "parts", **settings), resume=True, quiet=True)
    for name, value in whole.sae.state_dict().items():
        assert torch.equal(value, parts.sae.state_dict()[name]), name
    assert whole.sae.cfg.metadata["saekit"]["zipf"] == parts.sae.cfg.metadata["saekit"]["zipf"]


@pytest.mark.parametrize("scale", ["none", "token_norm"])
def test_each_feature_fires_at_its_budgets_rate(cache, tmp_path, scale):
    run = train(config(cache, tmp_path / "run", variant="feature_choice", affinity_scale=scale), quiet=True)
    state = load_checkpoints([tmp_path / "run/checkpoints"], torch.device("cpu"))[1][0]["variant"]
    calibration = rows(cache, "calibration")
    wanted = (state["budgets"] / 128 * len(calibration)).round()
    found = run.sae.encode_sparse(calibration).matches_per_feature()
    positive = (run.sae.pre_activations(calibration) > 0).sum(0)
    # raw and scaled arithmetic may round a pair to the other side
    assert ((found - torch.minimum(wanted, positive)).abs() <= 1).all()


@pytest.mark.parametrize("scale", ["none", "token_norm"])
def test_feature_thresholds_are_exact(scale, generator):
    # in float64, where no two affinities are so near that pieces and the whole, added otherwise, could swap them
    sae = SparseAutoencoder(SAEConfig(4, 64, "jumprelu", affinity_scale=scale), torch.float64)
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(4, 64, generator=generator))
        sae.b_enc.copy_(torch.randn(64, generator=generator))
    x = torch.randn(1500, 4, generator=generator, dtype=torch.float64)
    x[700:] *= 20  # the sample does not know where the large ones are
    rates = torch.rand(64, generator=generator).square()
    rates[:3] = torch.tensor([0.0, 1.0, 1e-9])
    with torch.no_grad():
        sae.threshold.copy_(feature_thresholds(sae, lambda: x.split([1, 699, 800]), rates))
        affinity = sae.pre_activations(x)
        if scale == "token_norm":
            affinity = affinity / x.norm(dim=1, keepdim=True)
    wanted = torch.minimum((rates.double() * 1500).round(), (affinity > 0).sum(0))
    assert torch.equal(sae.encode_sparse(x).matches_per_feature(), wanted.long())
    assert float(sae.threshold[0]) > 1.0005 * float(affinity[:, 0].max()), "by more than rounding makes up for"
    with pytest.raises(SaekitError, match="no held-out activations"):
        feature_thresholds(sae, list, rates)


@pytest.mark.parametrize("variant", ["mutual_choice", "feature_choice"])
def test_a_saved_dictionary_applies_the_rule_of_its_training(cache, tmp_path, variant):
    run = train(config(cache, tmp_path / "run", variant=variant), quiet=True)
    sae, x = saekit.load(tmp_path / "run"), rows(cache, "heldout")
    assert (sae.cfg.architecture, sae.cfg.affinity_scale) == ("jumprelu", "token_norm")
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    wanted = torch.relu(pre) * (pre > sae.threshold * (x - sae.b_dec).norm(dim=1, keepdim=True))
    sure = decided(sae, x)
    assert sure.float().mean() > 0.999
    torch.testing.assert_close(sae.encode(x)[sure], wanted[sure], rtol=1e-4, atol=1e-4)
    assert sae.encode_sparse(x).l0 == pytest.approx(4, rel=0.15)
    torch.testing.assert_close(run.sae.encode(x), sae.encode(x))


def test_the_nearest_plain_thresholds_fire_as_often(cache, tmp_path):
    sae = train(config(cache, tmp_path / "run", variant="mutual_choice"), quiet=True).sae
    x = rows(cache, "calibration")
    plain = with_plain_thresholds(sae, lambda: [x])
    assert plain.cfg.affinity_scale == "none"
    before, after = (each.encode_sparse(x).matches_per_feature() for each in (sae, plain))
    assert torch.equal(before, after)
    assert not torch.equal(sae.encode_sparse(x).tokens, plain.encode_sparse(x).tokens), "but not on the same tokens"


def test_gradient_topk_without_weight_is_topk_bit_for_bit(cache, tmp_path):
    weights = [
        train(config(cache, tmp_path / name, variant=name, **changes), quiet=True).sae.W_enc
        for name, changes in (("topk", {}), ("gradient_topk", {"beta": 0.0}))
    ]
    assert torch.equal(*weights)
    x = ActivationCache.open(cache)
    plain = ActivationCache.from_tensor(tmp_path / "plain", x.read(0, len(x)).x)
    without = train(config(plain.path, tmp_path / "without", variant="gradient_topk", beta=0.0), quiet=True).sae
    assert torch.equal(without.W_enc, weights[0]), "nor does it ask for gradients"
    other = train(config(cache, tmp_path / "other", variant="gradient_topk"), quiet=True).sae
    assert not torch.equal(other.W_enc, weights[0])
    assert (other.cfg.architecture, other.cfg.k, other.cfg.metadata["saekit"]["beta"]) == ("topk", 4, 1.0)


def test_batch_topk_is_mutual_choice(cache, tmp_path):
    one, other = (
        train(config(cache, tmp_path / v, variant=v), quiet=True).sae for v in ("batch_topk", "mutual_choice")
    )
    assert torch.equal(one.W_enc, other.W_enc)


def test_a_variant_from_outside(cache, tmp_path, monkeypatch):
    class Alternating(Variant):
        """TopK with half of k on even batches, and one and a half of it on odd ones."""

        def __init__(self, cfg, d_sae):
            super().__init__(cfg, d_sae)
            self.calls = 0

        def allocate(self, batch):
            self.calls += 1
            return token_choice(batch.pre, self.k // 2 if self.calls % 2 else self.k * 3 // 2)

        def facts(self):
            return {"calls": self.calls}

    monkeypatch.setitem(VARIANTS, "alternating", Alternating)
    run = train(config(cache, tmp_path / "run", variant="alternating"), quiet=True)
    assert saekit.load(run.path).cfg.metadata["saekit"]["calls"] == 50
    assert saekit.load(run.path).cfg.k == 4


def test_what_a_run_remembers_is_saved_with_it(cache, tmp_path):
    from safetensors.torch import load_file

    train(config(cache, tmp_path / "run", variant="topk"), quiet=True)
    found = load_file(tmp_path / "run/statistics.safetensors")
    assert set(found) == {"density", "rank", "since_fired", "smallest_kept"}
    assert float(found["density"].sum()) == pytest.approx(4, rel=0.01)
    assert sorted(found["rank"].tolist()) == list(range(1, 65))
    run = train(config(cache, tmp_path / "other", variant="feature_choice", affinity_scale="token_norm"), quiet=True)
    found = load_file(run.path / "statistics.safetensors")
    assert int(found["budgets"].sum()) == 4 * 128
    assert (found["budgets"][found["rank"].argsort()].diff() <= 0).float().mean() > 0.7, "they follow the ranks"
    # the smallest kept affinity estimates the threshold, in the same units
    ratio = run.sae.threshold / found["smallest_kept"]
    assert 0.5 < float(ratio[ratio.isfinite() & (ratio > 0)].median()) < 2


@pytest.mark.parametrize("steps", [1, 5])
def test_even_a_short_run_of_feature_choice_reaches_its_switch(cache, tmp_path, steps):
    run = train(config(cache, tmp_path / "run", variant="feature_choice", tokens=128 * steps), quiet=True)
    assert run.sae.cfg.metadata["saekit"]["zipf"]["exponent"] >= 0


def test_an_interrupt_can_travel_between_processes():
    stop = pickle.loads(pickle.dumps(Interrupted(15)))
    assert (type(stop), stop.code) == (Interrupted, 143)


def test_an_outside_rule_may_compare_tokens_and_be_saved_as_topk(cache, tmp_path, monkeypatch):
    class Mutual(VARIANTS["mutual_choice"]):
        architecture = "topk"

        def calibrate(self, sae, heldout):
            pass

    monkeypatch.setitem(VARIANTS, "mutual", Mutual)
    run = train(config(cache, tmp_path / "run", variant="mutual"), quiet=True)
    assert (run.sae.cfg.architecture, run.sae.cfg.affinity_scale) == ("topk", "none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "gradient_topk", "cache": "PLAIN"}, "holds no gradients; write one by `saekit cache --gradients`"),
        ({"variant": "gradient_topk", "beta": -1}, "beta = -1"),
        ({"variant": "feature_choice", "batch_size": 8, "width": 64}, "32 matches cannot be shared among 64 features"),
        ({"variant": "feature_choice", "feature_choice_fraction": 0.0}, "feature_choice_fraction = 0.0"),
        ({"variant": "feature_choice", "feature_choice_fraction": 1.5}, "feature_choice_fraction = 1.5"),
        ({"variant": "feature_choice", "budgets": "zip"}, "budgets = 'zip'"),
        ({"affinity_scale": "norm"}, "affinity_scale = 'norm'"),
    ],
)
def test_impossible_settings(cache, tmp_path, changes, message):
    if changes.get("cache") == "PLAIN":
        ActivationCache.from_tensor(tmp_path / "plain", torch.randn(6000, 12))
        changes = {**changes, "cache": tmp_path / "plain"}
    with pytest.raises(SaekitError, match=message):
        train(config(**{"cache": cache, "out": tmp_path / "run", **changes}), quiet=True)
    assert not (tmp_path / "run").exists()
