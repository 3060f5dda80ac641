"""The variants by the real command, on the embedded model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import saekit
from saekit.activations import ActivationCache

SMALL = ["--tokens", 60_000, "--width", 512, "--k", 8, "--batch-size", 512, "--eval-tokens", 3000, "--quiet"]


def report_of(run):
    return json.loads((run / "eval.json").read_text())


def test_gradient_topk_live_and_from_a_cache(saekit_main, tmp_path):
    live, cached = tmp_path / "live", tmp_path / "cached"
    flags = ["--variant", "gradient_topk", *SMALL, "--buffer", 8192]
    fewer = [20_000 if flag == 60_000 else flag for flag in flags]
    done = saekit_main("train", *fewer, "--out", live)
    assert done.returncode == 0, done.stderr
    done = saekit_main("cache", "--gradients", "--out", tmp_path / "cache", "--tokens", 40_000, "--quiet")
    assert done.returncode == 0, done.stderr
    assert ActivationCache.open(tmp_path / "cache").gradients
    done = saekit_main("train", *flags, "--cache", tmp_path / "cache", "--out", cached)
    assert done.returncode == 0, done.stderr
    for run in (live, cached):
        assert saekit.load(run).cfg.architecture == "topk"
        report = report_of(run)
        assert report["gradient_selection"]["beta"] == 1.0
        assert report["downstream"]["ce_clean"] < report["gradient_selection"]["ce_reconstructed_sampled"]
    assert report_of(cached)["reconstruction"]["fvu"] < 0.6
    assert "leaks" in done.stdout
    # the same data without gradients
    done = saekit_main("cache", "--out", tmp_path / "plain", "--tokens", 20_000, "--quiet")
    done = saekit_main("train", *flags, "--cache", tmp_path / "plain", "--out", tmp_path / "none")
    assert done.returncode == 2
    assert "holds no gradients" in done.stderr


def test_feature_choice_with_aux_zipf(saekit_main, tmp_path):
    run = tmp_path / "run"
    done = saekit_main(
        "train", "--variant", "feature_choice", "--aux", "aux_zipf", *SMALL, "--calibration-tokens", 30_000,
        "--feature-choice-fraction", 0.3, "--out", run,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts = saekit.load(run).cfg.metadata["saekit"]
    assert (facts["aux"], facts["budgets"]) == ("aux_zipf", "zipf")
    assert facts["zipf"]["r2"] > 0.8
    assert report_of(run)["sparsity"]["l0"] == pytest.approx(8, rel=0.2)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"aux", "aux_pool"} <= set(lines[-1])


def test_convert_says_what_saelens_cannot_hold(trained_run, saekit_main, tmp_path):
    assert saekit.load(trained_run).cfg.affinity_scale == "token_norm"
    done = saekit_main("convert", trained_run, tmp_path / "plain")
    assert done.returncode == 2
    assert "cannot hold; --lossy" in done.stderr
    assert not (tmp_path / "plain").exists()
    done = saekit_main("convert", trained_run, tmp_path / "plain", "--lossy", "--tokens", 20_000)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("FVU") == 2
    own, plain = (float(line.split("FVU ")[1].split()[0]) for line in done.stdout.splitlines()[:2])
    assert own != plain
    assert plain == pytest.approx(own, rel=0.2)
    cfg = json.loads((tmp_path / "plain/cfg.json").read_text())
    assert cfg["architecture"] == "jumprelu"
    before, after = saekit.load(trained_run), saekit.load(tmp_path / "plain")
    assert torch.equal(before.W_dec, after.W_dec)
    assert not torch.equal(before.threshold, after.threshold)
    done = saekit_main("convert", tmp_path / "plain", tmp_path / "same")
    assert done.returncode == 0, done.stderr
    assert torch.equal(saekit.load(tmp_path / "same").threshold, after.threshold)


def test_a_package_adds_a_variant(saekit_command, tmp_path):
    site = tmp_path / "site"
    (site / "mine-1.0.dist-info").mkdir(parents=True)
    (site / "mine-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (site / "mine-1.0.dist-info/entry_points.txt").write_text("[saekit.variants]\nhalf = mine:Half\nbroken = none:No\n")
    (site / "mine.py").write_text(
        "from saekit.allocation import token_choice\n"
        "from saekit.trainers import Variant\n"
        "class Half(Variant):\n"
        "    def allocate(self, batch):\n"
        "        return token_choice(batch.pre, max(1, self.k // 2))\n"
    )
    ActivationCache.from_tensor(tmp_path / "cache", torch.randn(5000, 16))
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = saekit_command(
        "train", "--variant", "half", "--cache", tmp_path / "cache", "--width", 64, "--k", 4, "--tokens", 5120,
        "--batch-size", 256, "--out", tmp_path / "run", "--quiet", env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(Path(tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["l0"] <= 2
    assert "variant 'broken' (none:No) cannot be loaded" in done.stderr
    done = saekit_command("train", "--variant", "haf", env=environment)
    assert "did you mean 'half'" in done.stderr
