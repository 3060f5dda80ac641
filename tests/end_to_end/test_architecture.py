"""The examples of docs/architecture.md, each added from outside the package by its one file: they appear everywhere."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import saekit

PAGE = Path(__file__).parents[2] / "docs/architecture.md"
EXAMPLES = dict(re.findall(r'```python title="(\w+)\.py"\n(.*?)```', PAGE.read_text(), re.DOTALL))
POINTS = """
[saekit.variants]
priced = priced:Priced
[saekit.evals]
crowds = crowds:Crowds
[saekit.formats]
one_file = one_file:FORMAT
"""
SMALL = ["--tokens", 24_576, "--width", 256, "--k", 8, "--batch-size", 1024, "--buffer", 8192, "--quiet"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Of a process in which packages with the examples are installed."""
    site = tmp_path_factory.mktemp("site")
    about = site / "examples-1.0.dist-info"
    about.mkdir()
    for name, text in EXAMPLES.items():
        (site / f"{name}.py").write_text(text)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: examples\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(POINTS)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))}


@pytest.fixture(scope="module")
def run(environment, saekit_command, tmp_path_factory):
    """A run of the variant, evaluated at its end."""
    out = tmp_path_factory.mktemp("priced") / "run"
    done = saekit_command(
        "train", "--variant", "priced", "--price", 0.02, *SMALL, "--checkpoint-every", 8, "--log-every", 1,
        "--eval-tokens", 4000, "--features-shown", 20, "--out", out, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_the_page_has_an_example_of_each_kind():
    assert EXAMPLES.keys() == {"priced", "crowds", "one_file", "blocks"}


def test_help_and_completion_know_them(environment, saekit_command):
    wide = {**environment, "COLUMNS": "300"}
    page = saekit_command("train", "--help", env=wide).stdout
    assert re.search(r"--price .*priced: weight of the price", page)
    assert "hierarchical_topk, priced" in " ".join(page.split())
    assert re.search(
        r"--crowd .*features above which a token is crowded", saekit_command("eval", "--help", env=wide).stdout
    )
    assert "one_file" in saekit_command("convert", "--help", env=wide).stdout


def test_the_variant_s_loss_setting_and_parameter(run, environment, saekit_command):
    out, _ = run
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(line["loss"] == pytest.approx(line["fvu"] + 0.02 * line["price"], rel=1e-5) for line in lines)
    assert "price: 0.02" in (out / "config.yaml").read_text()
    learned = load_file(out / "statistics.safetensors")["log_price"]
    assert learned.shape == (256,)
    assert float(learned.abs().max()) > 0
    refused = saekit_command("train", "--variant", "topk", "--price", 0.02, env=environment)
    assert refused.returncode == 2
    assert refused.stderr == "saekit: price belongs to priced; this run has variant topk\n"


def test_the_variant_resumes_to_the_bit(run, environment, saekit_command, tmp_path):
    out, _ = run
    part = shutil.copytree(out, tmp_path / "part")
    shutil.rmtree(part / "sae")
    newest = max((part / "checkpoints").iterdir(), key=lambda path: int(re.sub(r"\D", "", path.stem)))
    newest.unlink()
    done = saekit_command("train", "--out", part, "--resume", "--eval-tokens", 0, "--quiet", env=environment)
    assert done.returncode == 0, done.stderr
    for name in ("sae/sae_weights.safetensors", "statistics.safetensors"):
        assert (part / name).read_bytes() == (out / name).read_bytes()


def test_the_evaluation_is_in_table_file_report_and_card(run, environment, saekit_command, tmp_path):
    out, printed = run
    found = json.loads((out / "eval.json").read_text())
    share = found["crowds"]["share"]
    assert found["crowds"]["tokens"] == found["sparsity"]["tokens"]
    assert share == 0, "topk of 8 has no token of more than 16"
    assert re.search(r"crowded +│ +0\.0% +│.*share of the tokens with a crowd", printed)
    page = (out / "report.html").read_text()
    assert "Crowded tokens" in page
    assert '"price"' in page, "the curve of the variant's own loss"
    done = saekit_command("eval", out, "--tokens", 2000, "--crowd", 3, "--out", tmp_path / "x.json", env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "x.json").read_text())["crowds"]["share"] > 0.9
    assert "| crowded | 0.0% |" in card_of(out, environment)


def card_of(folder, environment):
    """The model card, as a process makes it in which the packages are installed."""
    import subprocess
    import sys

    code = f"from saekit.card import card; print(card({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_the_format_holds_it(run, environment, saekit_command, tmp_path):
    out, _ = run
    done = saekit_command("convert", out, tmp_path / "one", "--to", "one_file", env=environment)
    assert done.returncode == 0, done.stderr
    assert "one_file" in saekit_command("info", tmp_path / "one", env=environment).stdout
    done = saekit_command("convert", tmp_path / "one", tmp_path / "back", env=environment)
    assert done.returncode == 0, done.stderr
    assert torch.equal(saekit.load(tmp_path / "back").W_enc, saekit.load(out).W_enc)


def test_the_kernel_gives_what_its_reference_gives(monkeypatch):
    from saekit.allocation import token_choice
    from saekit.kernels.pairs import pair_products

    monkeypatch.setattr(pair_products, "implementations", dict(pair_products.implementations))
    exec(compile(EXAMPLES["blocks"], "blocks.py", "exec"), {})
    a, b = torch.randn(40, 7, dtype=torch.float64), torch.randn(30, 7, dtype=torch.float64)
    code = token_choice(a @ b.T, 3)
    assert pair_products.chosen("cpu").__name__ == "by_blocks"
    torch.testing.assert_close(pair_products(a, b, code), pair_products.reference(a, b, code), rtol=1e-12, atol=1e-12)
