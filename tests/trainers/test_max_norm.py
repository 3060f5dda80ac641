"""Tokens of extreme norm: left out, counted, and by the same number wherever the data is made again."""

from __future__ import annotations

import json

import pytest
import torch
from test_step import config

from saekit import SaekitError
from saekit.activations import ActivationBatch, ActivationCache, ActivationSource
from saekit.activations.finite import BadTokens, norm_limit
from saekit.activations.repair import repair
from saekit.activations.resumable import HarvestPlan, harvest_cache, resume_cache
from saekit.evals import Evaluator
from saekit.trainers import TrainConfig, train, train_hooks
from saekit.trainers.data import training_data
from saekit.trainers.optimizer import DictionaryAdam

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"]
PLAN = {"context_length": 64, "dtype": "float32", "max_norm": 1.1, "skip_first": 5}  # a third of the tokens is beyond


@pytest.fixture
def sunk(live, tmp_path):
    given = {key: value for key, value in PLAN.items() if key != "dtype"} | {"tokens": 256 * 20, "checkpoint_every": 4}
    return lambda name, **changes: live(tmp_path / name, **{**given, **changes})


@pytest.fixture
def once(monkeypatch):
    """After a call, the sample that gives the limit is not looked at again: the number is the recorded one."""

    def forbid():
        for kind in (ActivationSource, ActivationCache):
            monkeypatch.setattr(kind, "norm_limit", lambda self, max_norm: 0.5)

    return forbid


def killed_after(monkeypatch, steps):
    step = DictionaryAdam.step

    def some(self, lr):
        if self.steps == steps:
            raise MemoryError
        return step(self, lr)

    monkeypatch.setattr(DictionaryAdam, "step", some)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def told(run):
    metadata = run.sae.cfg.metadata["saekit"]
    last = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])
    return metadata["provenance"], metadata["skipped_tokens"], last["skipped_tokens"]


def same(run, other):
    return all(torch.equal(value, other.sae.state_dict()[name]) for name, value in run.sae.state_dict().items())


def test_large_tokens_are_left_out_at_every_hook_and_counted():
    rows = torch.arange(6)
    a, b = torch.ones(6, 4), torch.ones(6, 3)
    a[1] = 5.1  # norm 10.2
    a[2, 0] = torch.nan
    b[4] = 50
    bad = BadTokens(skip=True, limits={"one": 10.0, "other": 80.0})
    found = bad.sift([ActivationBatch(x, rows, rows, rows) for x in (a, b)], ["one", "other"], "here")
    assert [batch.tokens.tolist() for batch in found] == [[0, 3, 5]] * 2
    assert bad.count == 3
    with pytest.raises(SaekitError, match="NaN or inf in the activations of 'one'"):
        BadTokens(limits={"one": 10.0}).sift([ActivationBatch(a, rows, rows, rows)], ["one"], "here")
    many = ActivationBatch(torch.full((5000, 2), 3.0), *[torch.arange(5000)] * 3)
    with pytest.raises(SaekitError, match="5,000 of 5,000 tokens .* beyond --max-norm: too many"):
        BadTokens(limits={"hook": 1.0}).sift([many], ["hook"], "here")


def test_the_limit_is_a_multiple_of_the_median(text):
    source = ActivationSource.open(dataset=text, context_length=64, skip_first=5)
    norms, rows = [], 0
    for batch in source.contexts("train"):
        x = source.model.run_with_cache(batch.tokens)[1][source.hook][batch.kept]
        norms.append(x.double().norm(dim=1))
        rows += len(x)
        if rows >= 16_384:
            break
    expected = 7 * float(torch.cat(norms)[:16_384].median())
    assert source.norm_limit(7) == pytest.approx(expected, rel=1e-4)
    x = torch.tensor([3.0, 1.0, 2.0])[:, None]
    assert norm_limit([ActivationBatch(x, *[torch.arange(3)] * 3)], 10) == 20
    for x in (torch.zeros(3, 1), torch.zeros(0, 1), torch.full((3, 1), torch.nan)):
        with pytest.raises(SaekitError, match="--max-norm 10 is a multiple of the median norm, which is (0.0|nan)"):
            norm_limit([ActivationBatch(x, *[torch.arange(len(x))] * 3)], 10)


def test_a_cache_holds_the_rows_that_a_live_run_gets(text, sunk, tmp_path):
    made = harvest_cache(tmp_path / "c", HarvestPlan(**PLAN, dataset=text, tokens=6000, pool=5000))
    limit = made.provenance["norm_limit"]
    cached = made.read(0, 6000)
    assert (cached.x.norm(dim=1) <= limit).all()
    assert (cached.positions >= 5).all()
    skipped = json.loads((tmp_path / "c/manifest.json").read_text())["skipped"]
    assert 500 < skipped < 6000
    data = training_data(sunk("run", pool=5000), torch.device("cpu"))
    pieces, rows = [], 0
    for piece in data.rows(0):
        pieces.append(piece)
        rows += len(piece)
        if rows >= 6000:
            break
    assert torch.equal(torch.cat(pieces)[:6000], cached.x)
    assert data.bad.count == skipped
    facts = {key: made.provenance[key] for key in ("max_norm", "norm_limit", "skip_first")}
    assert facts == {key: data.provenance[key] for key in facts}
    assert (facts["max_norm"], facts["skip_first"]) == (1.1, 5)


def test_harvests_that_go_on_and_repairs_take_the_recorded_limit(text, tmp_path, monkeypatch, once):
    monkeypatch.setattr("saekit.activations.cache.SHARD_ROWS", 700)
    plan = HarvestPlan(**PLAN, dataset=text, tokens=4000)
    harvest_cache(tmp_path / "whole", plan)
    harvested, calls = ActivationSource.batches, iter(range(10**6))

    def some(self, *a, **k):
        for batch in harvested(self, *a, **k):
            if next(calls) == 11:  # after the sample and the width
                raise MemoryError
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(ActivationSource, "batches", some)
        with pytest.raises(MemoryError):
            harvest_cache(tmp_path / "c", plan)
    once()
    with pytest.raises(SaekitError, match="begun with another max_norm"):
        resume_cache(tmp_path / "c", {"max_norm": 3.0})
    resume_cache(tmp_path / "c", {})
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")
    (tmp_path / "c/shard-00002.safetensors").unlink()
    repair(tmp_path / "c")
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


def test_a_live_run_that_is_killed_ends_as_if_it_had_not_been(sunk, monkeypatch, once):
    whole = train(sunk("whole"), quiet=True)
    provenance, skipped, logged = told(whole)
    assert skipped == logged > 1000
    with monkeypatch.context() as patch:
        killed_after(patch, 10)
        with pytest.raises(MemoryError):
            train(sunk("parts"), quiet=True)
    once()
    resumed = train(sunk("parts"), resume=True, quiet=True)
    assert same(resumed, whole)
    assert told(resumed) == (provenance, skipped, logged)
    with pytest.raises(SaekitError, match="started with max_norm = 1.1, not 2.0"):
        train(sunk("parts", max_norm=2.0), resume=True, quiet=True)


def test_where_no_token_is_beyond_nothing_changes(sunk):
    loose, without = train(sunk("loose", max_norm=50.0), quiet=True), train(sunk("without", max_norm=None), quiet=True)
    assert same(loose, without)
    assert told(loose)[1:] == (0, 0)


def test_several_hooks_have_a_limit_each(text, sunk, monkeypatch, once):
    whole = train_hooks(sunk("whole", max_norm=1.4), HOOKS, quiet=True)
    limits = {hook: told(run)[0]["norm_limit"] for hook, run in whole.items()}
    for hook, limit in limits.items():
        pool = sunk("whole").source.pooled(sunk("whole").tokens).pool
        source = ActivationSource.open(hook=hook, dataset=text, context_length=64, skip_first=5, pool=pool)
        assert limit == source.norm_limit(1.4)
    assert len(set(limits.values())) == 2
    counts = {told(run)[1:] for run in whole.values()}
    assert len(counts) == 1, "what is left out at one is left out at all"
    with monkeypatch.context() as patch:
        killed_after(patch, 10)
        with pytest.raises(MemoryError):
            train_hooks(sunk("parts", max_norm=1.4), HOOKS, quiet=True)
    once()
    resumed = train_hooks(sunk("parts", max_norm=1.4), HOOKS, resume=True, quiet=True)
    assert all(same(resumed[hook], run) and told(resumed[hook]) == told(run) for hook, run in whole.items())


def test_a_cache_of_ones_own_with_sinks(tmp_path, monkeypatch, once):
    torch.manual_seed(0)
    x = torch.randn(6000, 12)
    sinks = torch.arange(6000) % 256 == 9
    x[sinks] *= 100
    ActivationCache.from_tensor(tmp_path / "c", x)
    whole = train(
        config(tmp_path / "c", tmp_path, out=tmp_path / "whole", max_norm=10.0, checkpoint_every=7), quiet=True
    )
    provenance, skipped, logged = told(whole)
    assert provenance["norm_limit"] == pytest.approx(10 * float(x.norm(dim=1).median()), rel=0.02)
    assert 15 < skipped == logged < 60  # of 5,400 rows to train on, more than once
    plain = train(config(tmp_path / "c", tmp_path, out=tmp_path / "plain"), quiet=True)
    assert "max_norm" not in plain.sae.cfg.metadata["saekit"]["provenance"]
    assert (
        plain.sae.cfg.metadata["saekit"]["activation_scale"]
        < 0.8 * whole.sae.cfg.metadata["saekit"]["activation_scale"]
    )
    cfg = config(tmp_path / "c", tmp_path, max_norm=10.0, checkpoint_every=7)
    with monkeypatch.context() as patch:
        killed_after(patch, 20)
        with pytest.raises(MemoryError):
            train(cfg, quiet=True)
    once()
    resumed = train(cfg, resume=True, quiet=True)
    assert same(resumed, whole)
    assert told(resumed) == told(whole)


def test_what_a_cache_cannot_be_asked_for(text, sunk, tmp_path):
    made = harvest_cache(tmp_path / "c", HarvestPlan(**PLAN, dataset=text, tokens=6000))
    for setting, value in (("max_norm", 2.0), ("skip_first", 7)):
        cfg = TrainConfig(cache=made.path, out=tmp_path / "run", batch_size=256, tokens=2560, **{setting: value})
        with pytest.raises(SaekitError, match=f"has {setting} '.*', not '{value}' as asked"):
            training_data(cfg, torch.device("cpu"))
    run = train(sunk("run", cache=made.path, expansion=0.2, tokens=2560), quiet=True)
    assert run.sae.cfg.metadata["saekit"]["provenance"]["norm_limit"] == made.provenance["norm_limit"]
    assert run.config.max_norm == 1.1
    assert run.config.skip_first == 5
    with pytest.raises(SaekitError, match=r"has max_norm '1.1', not '3.0' as asked"):
        made.norm_limit(3.0)
    for wrong in (1.0, -3.0, float("inf"), float("nan")):
        with pytest.raises(SaekitError, match="max_norm|max-norm"):
            TrainConfig(max_norm=wrong)
        with pytest.raises(SaekitError, match="max_norm"):
            HarvestPlan(max_norm=wrong)
        with pytest.raises(SaekitError, match="max-norm"):
            Evaluator(max_norm=wrong)


def test_an_evaluation_leaves_them_out_where_it_is_asked_to(sunk, tmp_path, once):
    run = train(sunk("run", tokens=2560), quiet=True)
    evaluator = Evaluator(tokens=2000)
    whole = evaluator(run.path)
    assert whole.about["skip_first"] == 5, "as it was trained"
    source, contexts = evaluator.text_of(run.sae, str(run.path))
    assert not contexts.kept[:, :5].any()
    once()  # the number of the training it is
    narrow = Evaluator(tokens=2000, max_norm=1.1, skip_first=2)
    report = narrow(run.path)
    limit = told(run)[0]["norm_limit"]
    assert (report.about["norm_limit"], report.about["max_norm"], report.about["skip_first"]) == (limit, 1.1, 2)
    source, contexts = narrow.text_of(run.sae, str(run.path))
    norms = source.model.run_with_cache(contexts.tokens)[1][source.hook].norm(dim=2)
    separators = contexts.tokens == source.model.tokenizer.eos_token_id
    expected = (norms <= limit) & ~separators
    expected[:, :2] = False
    assert torch.equal(contexts.kept, expected)
    assert contexts.kept[:, 2:5].any()
    assert report["sparsity"]["tokens"] == report["reconstruction"]["tokens"] == int(contexts.kept.sum())
    assert report["downstream"]["tokens"] == int(contexts.kept[:, :-1].sum())


def test_an_evaluation_by_a_cache(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(6000, 12)
    x[torch.arange(6000) % 50 == 9] *= 100
    ActivationCache.from_tensor(tmp_path / "c", x)
    run = train(config(tmp_path / "c", tmp_path, max_norm=10.0), quiet=True)
    with pytest.warns(UserWarning, match="hold 9.% of the variance"):
        plain = Evaluator(tokens=10_000)(run.path)["reconstruction"]
    found = Evaluator(tokens=10_000, max_norm=10.0)(run.path)["reconstruction"]
    assert plain["outliers"] == plain["tokens"] - found["tokens"] > 0
    assert found["fvu"] == found["fvu_without_outliers"] == pytest.approx(plain["fvu_without_outliers"], rel=1e-6)
