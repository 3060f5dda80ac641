"""SAELens opens what saekit saves. SAELens needs an older TransformerLens, so it gets an environment of its own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from environments import python_of
from safetensors.torch import load_file, save_file

import saekit
from saekit.activations import ActivationCache
from saekit.trainers import TrainConfig, train

SCRIPT = """
import sys
from safetensors.torch import load_file, save_file
from sae_lens import SAE
sae = SAE.load_from_disk(sys.argv[1])
x = load_file(sys.argv[2])["x"]
f = sae.encode(x)
save_file({"f": f.detach().contiguous(), "x_hat": sae.decode(f).detach().contiguous()}, sys.argv[3])
"""


@pytest.fixture(scope="module")
def saelens_python() -> Path:
    """The interpreter of an environment with sae-lens, made once (minutes)."""
    return python_of("saelens", "sae-lens==6.54.12")


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["topk", "mutual_choice", "feature_choice"])
def test_saelens_gives_the_same_features_and_reconstruction(variant, saelens_python, tmp_path):
    torch.manual_seed(0)
    x = 5 * torch.relu(torch.randn(8000, 100) - 1) @ torch.nn.functional.normalize(torch.randn(100, 48), dim=1) + 3
    ActivationCache.from_tensor(tmp_path / "cache", x)
    config = TrainConfig(
        variant=variant, affinity_scale="none", cache=tmp_path / "cache", width=256, k=8, tokens=400_000,
        batch_size=1024, out=tmp_path / "run",
    )  # fmt: skip
    train(config, quiet=True)
    check(tmp_path / "run/sae", x[-400:], saelens_python, tmp_path)


@pytest.mark.slow
def test_saelens_refuses_thresholds_by_token_norm_and_opens_the_nearest_plain_ones(
    trained_run, saekit_command, saelens_python, tmp_path, source
):
    x = torch.cat([batch.x for batch in source.batches("heldout", 1000)])
    refused = run_script(trained_run / "sae", x, saelens_python, tmp_path)
    assert refused.returncode != 0
    assert "saekit_jumprelu_token_norm" in refused.stderr
    done = saekit_command("convert", trained_run, tmp_path / "plain", "--lossy")
    assert done.returncode == 0, done.stderr
    check(tmp_path / "plain", x, saelens_python, tmp_path)


def run_script(folder, x, python, tmp_path):
    save_file({"x": x.contiguous()}, tmp_path / "x.safetensors")
    arguments = [str(folder), str(tmp_path / "x.safetensors"), str(tmp_path / "out.safetensors")]
    return subprocess.run([str(python), "-c", SCRIPT, *arguments], capture_output=True, text=True, timeout=600)


def check(folder, x, python, tmp_path):
    done = run_script(folder, x, python, tmp_path)
    assert done.returncode == 0, done.stderr
    theirs = load_file(tmp_path / "out.safetensors")
    sae = saekit.load(folder)
    with torch.no_grad():
        f, x_hat = sae.encode(x), sae(x)
    assert (f > 0).sum() > 100
    # relative to the largest entry: activations of a language model are in the hundreds
    assert float((theirs["f"] - f).abs().max() / f.abs().max()) < 1e-5
    assert float((theirs["x_hat"] - x_hat).abs().max() / x_hat.abs().max()) < 1e-5
