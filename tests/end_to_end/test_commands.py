"""The real commands on the embedded model, from text to a judged dictionary."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import saekit
from saekit.activations import ActivationCache, ActivationSource
from saekit.evals import heldout_contexts

EMBEDDED = Path(saekit.__file__).parent / "embedded"


def test_a_run_holds_what_it_should(trained_run):
    assert {p.name for p in trained_run.iterdir()} >= {"config.yaml", "metrics.jsonl", "sae", "eval.json"}
    config = yaml.safe_load((trained_run / "config.yaml").read_text())
    assert (config["variant"], config["k"], config["width"], config["lr"]) == ("mutual_choice", 16, 1024, 4e-3)
    lines = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 300_000 // 2048
    assert lines[-1]["tokens"] == 300_000 // 2048 * 2048
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert {"fvu", "l0", "dead_share", "lr", "tokens_per_second"} <= set(lines[-1])


def test_its_evaluation_is_sound(trained_run):
    report = json.loads((trained_run / "eval.json").read_text())
    assert report["about"]["model"] == "embedded"
    assert report["about"]["part"] == "heldout"
    assert report["about"]["hook"] == "blocks.1.hook_resid_post"
    sparsity, reconstruction, down = report["sparsity"], report["reconstruction"], report["downstream"]
    assert sparsity["tokens"] == reconstruction["tokens"] >= 30_000
    assert sparsity["features"] == 1024
    assert sparsity["l0"] == pytest.approx(16, rel=0.1)
    assert reconstruction["fvu"] < 0.4
    assert down["ce_clean"] < 3.3
    assert down["ce_clean"] < down["ce_reconstructed"] < min(down["ce_zero"], down["ce_mean"])
    assert down["recovered_share"] > 0.8


def test_the_dictionary_loads_and_explains_heldout_activations(trained_run, source):
    sae = saekit.load(trained_run / "sae")
    assert (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.architecture) == (256, 1024, "jumprelu")
    assert sae.cfg.metadata["model_name"] == "embedded"
    assert sae.cfg.metadata["saekit"]["variant"] == "mutual_choice"
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(1024))
    with torch.no_grad():
        x = torch.cat([b.x for b in source.batches("heldout", 8000)])
        fvu = float((x - sae(x)).square().sum() / (x - x.mean(0)).square().sum())
    reported = json.loads((trained_run / "eval.json").read_text())["reconstruction"]["fvu"]
    assert fvu == pytest.approx(reported, rel=0.15)


def test_several_dictionaries_give_one_table(trained_run, saekit_command, tmp_path):
    done = saekit_command(
        "eval",
        trained_run,
        trained_run / "sae",
        "--hook",
        "blocks.0.hook_resid_post",
        "--tokens",
        3000,
        "--out",
        tmp_path / "both.json",
        "--quiet",
    )
    assert done.returncode == 0, done.stderr
    reports = json.loads((tmp_path / "both.json").read_text())
    assert set(reports) == {str(trained_run), str(trained_run / "sae")}
    told = f"saekit: '{trained_run}' belongs to 'blocks.1.hook_resid_post'; here it is judged at 'blocks.0."
    assert told in done.stderr
    first, second = reports.values()
    assert first["reconstruction"] == second["reconstruction"]
    assert done.stdout.count("│ /") >= 2


def test_info(trained_run, saekit_command):
    done = saekit_command("info", trained_run)
    assert done.returncode == 0
    assert json.loads(done.stdout)["d_sae"] == 1024


def test_cache_then_train_on_it(saekit_command, tmp_path):
    cache, run = tmp_path / "cache", tmp_path / "run"
    done = saekit_command("cache", "--out", cache, "--tokens", 40_000, "--hook", "blocks.0.hook_resid_post", "--quiet")
    assert done.returncode == 0, done.stderr
    assert len(ActivationCache.open(cache)) == 40_000
    assert ActivationCache.open(cache).dtype == "bfloat16"
    done = saekit_command(
        "train", "--variant", "topk", "--cache", cache, "--tokens", 80_000, "--batch-size", 1024, "--width", 512,
        "--k", 8, "--out", run, "--eval-tokens", 4000, "--quiet",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((run / "eval.json").read_text())
    assert report["about"]["hook"] == "blocks.0.hook_resid_post"
    assert report["sparsity"]["l0"] <= 8
    assert report["reconstruction"]["fvu"] < 0.6
    assert saekit.load(run).cfg.architecture == "topk"


def test_a_users_own_activations_need_no_language_model(saekit_command, tmp_path):
    torch.manual_seed(0)
    x = torch.relu(torch.randn(20_000, 64) - 1) @ torch.randn(64, 24)
    ActivationCache.from_tensor(tmp_path / "mine", x)
    run = tmp_path / "run"
    done = saekit_command(
        "train", "--cache", tmp_path / "mine", "--tokens", 200_000, "--batch-size", 512, "--width", 128, "--k", 8,
        "--out", run, "--quiet",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((run / "eval.json").read_text())
    assert set(report) == {"about", "sparsity", "reconstruction"}
    assert report["sparsity"]["tokens"] == 1000
    assert report["reconstruction"]["fvu"] < 0.5


def test_another_model_folder_and_a_plain_text_file(saekit_command, tmp_path):
    model = tmp_path / "my_model"
    shutil.copytree(EMBEDDED, model, ignore=shutil.ignore_patterns("__*"))
    text = tmp_path / "file.txt"
    licence = Path(sys.base_prefix, "lib", f"python{sys.version_info[0]}.{sys.version_info[1]}", "typing.py")
    text.write_text(licence.read_text())
    run = tmp_path / "run"
    done = saekit_command(
        "train", "--variant", "topk", "--model", model, "--hook", "blocks.2.hook_resid_post", "--dataset", text,
        "--tokens", 40_000, "--batch-size", 512, "--width", 512, "--context-length", 64, "--out", run,
        "--eval-tokens", 1000, "--quiet",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((run / "eval.json").read_text())
    assert report["about"]["model"] == str(model)
    assert report["about"]["dataset"] == str(text)
    assert report["about"]["context_length"] == 64
    # what was judged on is held-out text of this file
    source = ActivationSource.open(str(model), "blocks.2.hook_resid_post", str(text), context_length=64)
    assert report["sparsity"]["tokens"] == int(heldout_contexts(source, 1000).kept.sum())


def test_a_model_of_another_shape(saekit_command, tmp_path):
    """GPT-2's shape: learned positions, BOS and EOS of one id. Its weights are random: only the path is tested."""
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    model = tmp_path / "gpt2_shaped"
    config = GPT2Config(vocab_size=4096, n_positions=32, n_embd=32, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(model)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(EMBEDDED / "tokenizer.json"))
    tokenizer.add_special_tokens({"bos_token": "<|bos|>", "eos_token": "<|bos|>"})
    tokenizer.save_pretrained(model)
    run = tmp_path / "run"
    done = saekit_command(
        "train", "--variant", "topk", "--model", model, "--tokens", 8192, "--batch-size", 256, "--width", 64, "--k", 4,
        "--buffer", 4096, "--calibration-tokens", 512, "--eval-tokens", 600, "--out", run, "--quiet",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((run / "eval.json").read_text())
    assert report["about"]["context_length"] == 32
    assert report["about"]["hook"] == "blocks.1.hook_resid_post"
    assert saekit.load(run).cfg.d_in == 32


@pytest.mark.slow
def test_an_interrupt_saves_and_resume_finishes(saekit_command, tmp_path):
    cache, run = tmp_path / "cache", tmp_path / "run"
    ActivationCache.from_tensor(cache, torch.randn(30_000, 64))
    flags = ["--cache", cache, "--tokens", 3_000_000, "--batch-size", 512, "--width", 512, "--k", 8, "--out", run]
    command = [sys.executable, "-m", "saekit.cli", "train", *map(str, flags), "--quiet", "--eval-tokens", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.1)
    time.sleep(1)  # at any moment
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130, errors
    assert "--resume" in errors
    (checkpoint,) = (run / "checkpoints").iterdir()
    stopped = int(checkpoint.stem.split("-")[1])
    assert 0 < stopped < 3_000_000 // 512
    done = saekit_command("train", "--out", run, "--resume", "--quiet", "--eval-tokens", 0)
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 3_000_000 // 512
    assert saekit.load(run).cfg.d_sae == 512
