"""What the report says of any figures, and when the commands write it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import saekit
from saekit import SAEConfig, SparseAutoencoder
from saekit.activations import ActivationCache
from saekit.evals import evaluate, features, html
from saekit.evals.html import Subject, overview, write_report
from saekit.evals.html.page import page
from saekit.files import WriteError

EVIL = '</script><img src=x onerror="window.hacked=1"><script>window.hacked=1</script>&lt;b&gt;'


class TestThePage:
    def test_it_is_the_same_each_time_and_names_no_other_place(self, study):
        one, again = (
            page(
                [Subject("a", study.sae)],
                features.study_features(study.sae, study.model, study.contexts.rows(0, 4), features=range(40)),
            )
            for _ in range(2)
        )
        assert one == again
        assert "http:" not in one.replace("http://www.w3.org/2000/svg", "")
        assert "https:" not in one

    def test_curves_take_numbers_only(self, tmp_path):
        line = {"tokens": 10, "loss": 0.5, "fvu": 0.4, "l0": 3, "dead_share": 0, "seconds": 1.5}
        lines = [{**line, "tokens": 10 * step} for step in range(1, 2002)]
        bad = ["", "[" * 5000, "null", '{"tokens": 1}', json.dumps({**line, "loss": EVIL}), '{"tokens": 1e999}']
        bad += [json.dumps({**line, "l0": float("nan")}), json.dumps({**line, "fvu": True})[:40]]
        (tmp_path / "metrics.jsonl").write_text("\n".join([*bad, *map(json.dumps, lines)]))
        found = overview.curves(tmp_path / "metrics.jsonl")
        assert set(found) == {"tokens", "loss", "fvu", "l0", "dead_share"}
        assert 300 < len(found["tokens"]) <= 400
        assert found["tokens"][-1] == 20_010
        assert {*found["loss"]} == {0.5}

    def test_figures_that_are_none(self, study):
        """What another's eval.json may hold in place of figures."""
        for junk in (
            EVIL,
            5,
            None,
            [],
            {"tokens": EVIL},
            {"density_by_rank": EVIL},
            {"l0_histogram": {"counts": EVIL}},
        ):
            for group in ("sparsity", "reconstruction", "downstream", "dark_matter"):
                found = overview.overview(Subject("a", study.sae, {group: junk}), None)
                assert (found["headline"], found["tables"], found["density"], found["l0"]) == ([], [], None, None)
        ranks = {"rank": [1, 9], "density": [0.5, 0.1]}
        names = ("exponent", "shift", "scale", "r2")
        for law in (None, {}, {"exponent": EVIL}, dict.fromkeys(names, EVIL), dict.fromkeys(names, -1e200)):
            assert overview._density({"density_by_rank": ranks, "zipf": law}, 10)["fitted"] is None
        assert overview._density({"density_by_rank": ranks, "zipf": dict.fromkeys(names, 1.0)}, 10)["fitted"] == [
            0.5,
            0.1,
        ]
        assert overview._density({"density_by_rank": {**ranks, "rank": [1, 10**12]}}, 10) is None

    def test_standard_errors_stand_beside_their_figures(self, study):
        """Reports of older versions have none, and those of others may have anything in their place."""
        groups = {"reconstruction": {"fvu": 0.125, "fvu_se": 0.0021}, "sparsity": {"l0": 8.0, "documents": 57}}
        found = overview.overview(Subject("a", study.sae, groups), None)
        assert ["FVU", "0.1250", "0.0021"] in [row[:3] for row in found["headline"]]
        assert found["errors"] == ["± standard error over 57 documents (jackknife)"]
        rows = overview.comparison([Subject("a", study.sae, groups), Subject("b", study.sae)])["rows"]
        assert ["0.1250", "0.0021"] in rows[0]
        assert ["", ""] in rows[1]
        for junk in (EVIL, None, [], {}, -1, float("nan"), 10**400):
            groups = {"reconstruction": {"fvu": 0.125, "fvu_se": junk}, "sparsity": {"documents": junk}}
            found = overview.overview(Subject("a", study.sae, groups), None)
            assert [row[:3] for row in found["headline"]] == [["FVU", "0.1250", ""]]
            assert found["errors"] == []

    def test_weak_passages_keep_their_strength(self, source, contexts, shown, tmp_path):
        """Colours are rounded to hundredths of the peak; the activation that a passage was chosen for is not."""
        torch.manual_seed(0)
        sae = SparseAutoencoder(SAEConfig(256, 128, "standard")).requires_grad_(False)
        sae.W_enc.normal_()
        sae.b_enc.fill_(-30)
        found = features.study_features(sae, source.model, contexts.rows(0, 12), hook=source.hook)
        weakest = [(j, example) for j in range(128) for example in found.examples(j) if example.band == 5]
        j, example = min(weakest, key=lambda each: each[1].values[each[1].at] / found.peak(each[0]))
        value = example.values[example.at]
        assert value < 0.005 * found.peak(j)
        write_report(tmp_path / "report.html", [Subject("weak", sae)], found)
        tab = shown(tmp_path / "report.html", f"#feature-{j}")
        strength = tab.locator(".strength").last.evaluate("node => node.firstChild.textContent")
        assert float(strength) == pytest.approx(value, rel=6e-3)

    def test_nothing_fires(self, source, contexts, shown, tmp_path):
        sae = SparseAutoencoder(SAEConfig(256, 16, "topk", k=2)).requires_grad_(False)
        sae.b_enc.fill_(-1)
        groups = evaluate(sae, source.model, contexts.rows(0, 2), hook=source.hook).groups
        write_report(tmp_path / "report.html", [Subject("dead", sae, groups)])
        tab = shown(tmp_path / "report.html")
        assert tab.locator("#overview .chart .title").all_inner_texts() == ["L0 of a token"]
        assert overview._density(groups["sparsity"], 16) is None

    def test_figures_that_hardly_differ(self, study, shown, tmp_path):
        """Ticks at steps that a number would not notice are none."""
        line = {"tokens": 10, "loss": 1.0, "fvu": 1.0, "l0": 3.0, "dead_share": 0}
        lines = [line, {**line, "tokens": 20, "loss": 1.0000000000000002, "fvu": 1.0000000000000002}]
        (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        write_report(tmp_path / "report.html", [Subject("a", study.sae, metrics=tmp_path / "metrics.jsonl")])
        tab = shown(tmp_path / "report.html")
        assert tab.locator("#overview path.line").count() == 3

    def test_features_of_another_space_have_no_logits(self, source, contexts, shown, tmp_path):
        sae = SparseAutoencoder(SAEConfig(256, 16, "topk", k=2)).requires_grad_(False)
        sae.W_enc.normal_()
        found = features.study_features(sae, source.model, contexts.rows(0, 2), hook="blocks.1.attn.hook_z")
        write_report(tmp_path / "report.html", [Subject("z", sae)], dataclasses.replace(found))
        tab = shown(tmp_path / "report.html", "#feature-3")
        assert "not in the space of the residual stream" in tab.locator(".panels .notice").inner_text()


class TestCommands:
    def test_a_report_that_is_missing_is_drawn_again_and_one_that_is_there_is_left(
        self, trained_run, saekit_main, tmp_path
    ):
        shutil.copytree(trained_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "report.html"))
        report, command = tmp_path / "run/report.html", ("train", "--out", "run", "--resume", "--quiet")
        done = saekit_main(*command, "--eval-tokens", 3000, "--features-shown", 50, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"report: {Path('run/report.html')} (" in done.stdout
        assert '"width":1024' in report.read_text()
        assert len(report.read_text().partition('id="lines">')[2].partition("</script>")[0].splitlines()) == 50
        before = os.stat(report)
        done = saekit_main(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert os.stat(report) == before

    def test_several_dictionaries(self, trained_run, saekit_main, tmp_path, shown):
        command = ("eval", trained_run, trained_run / "sae", "--tokens", 1000, "--quiet", "--html", "report.html")
        done = saekit_main(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        tab = shown(tmp_path / "report.html")
        assert tab.locator(".comparison tbody tr").count() == 2
        assert tab.locator(".comparison tbody th").first.inner_text() == str(trained_run)
        assert tab.locator("#overview path.line").count() == 4  # the run's curves too
        refused = saekit_main(*command, cwd=tmp_path)
        assert (refused.returncode, refused.stderr) == (
            2,
            "saekit: 'report.html' exists already; choose another --html\n",
        )
        refused = saekit_main(*command[:-1], "no/report.html", cwd=tmp_path)
        assert "there is no folder 'no'" in refused.stderr

    def test_a_cache_alone_and_no_evaluation_and_a_report_that_fails(self, saekit_main, tmp_path, shown, monkeypatch):
        torch.manual_seed(0)
        ActivationCache.from_tensor(tmp_path / "mine", torch.randn(4000, 16))
        run = ("train", "--cache", "mine", "--tokens", 20_000, "--batch-size", 200, "--width", 32, "--k", 4)
        run += ("--out", "run", "--quiet")
        done = saekit_main(*run, "--eval-tokens", 0, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        tab = shown(tmp_path / "run/report.html")
        assert "Not judged" in tab.locator("#overview .notice").inner_text()
        assert tab.locator("#overview path.line").count() == 3
        again = ("train", "--out", "run", "--resume", "--quiet")

        def fails(*arguments):
            raise WriteError("cannot write 'run/report.html': No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(html, "write_report", fails)
            done = saekit_main(*again, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (
            2,
            "saekit: cannot write 'run/report.html': No space left on device\n",
        )
        assert json.loads((tmp_path / "run/eval.json").read_text())["sparsity"]["features"] == 32
        assert saekit.load(tmp_path / "run").cfg.d_sae == 32
        (tmp_path / "run/report.html").unlink()
        done = saekit_main(*again, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        tab = shown(tmp_path / "run/report.html", "#features")
        assert "activations and no text" in tab.locator("#features .notice").inner_text()
