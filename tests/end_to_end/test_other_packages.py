"""Other packages open what saekit writes, and find the same features and reconstructions."""

from __future__ import annotations

import copy
import subprocess

import pytest
import torch
from environments import ROOT, python_of
from safetensors.torch import load_file, save_file

import saekit
from saekit import SAEConfig, SparseAutoencoder
from saekit.formats import FORMATS

DATA = ROOT / "tests/data"
PACKAGES = {"saelens": "sae-lens==6.54.12", "dictionary-learning": "dictionary-learning==0.1.0"}
PACKAGES |= {"sparsify": "eai-sparsify==1.3.3"}
OPENS = {
    "saelens": """
from sae_lens import SAE
def opened(folder, x):
    sae = SAE.load_from_disk(folder)
    x = x.view(len(x), 2, 4) if "heads" in folder else x
    f = sae.encode(x)
    return f, sae.decode(f).flatten(1)
""",
    "dictionary-learning": """
from dictionary_learning.utils import load_dictionary
def opened(folder, x):
    sae, _ = load_dictionary(folder, "cpu")
    f = sae.encode(x)
    return f, sae.decode(f)
""",
    "sparsify": """
import torch
from sparsify import SparseCoder
def opened(folder, x):
    sae = SparseCoder.load_from_disk(folder)
    top = sae.encode(x)
    f = torch.zeros(len(x), sae.num_latents).scatter(1, top.top_indices, top.top_acts)
    return f, sae.decode(top.top_acts, top.top_indices)
""",
}
SCRIPT = """
import sys
from pathlib import Path
from safetensors.torch import load_file, save_file
for folder in sorted(Path(sys.argv[1]).iterdir()):
    f, x_hat = opened(str(folder), load_file(sys.argv[2])["x"])
    save_file({"f": f.detach().contiguous(), "x_hat": x_hat.detach().contiguous()}, Path(sys.argv[3]) / folder.name)
"""


def dictionaries():
    """One of each rule, with and without b_dec taken from the input; and those of other packages, as they are read."""
    torch.manual_seed(0)
    for rule in ("topk", "jumprelu", "standard"):
        for subtracts in (True, False):
            sae = SparseAutoencoder(SAEConfig(8, 32, rule, 4 if rule == "topk" else None, subtracts))
            with torch.no_grad():
                for name, value in sae.state_dict().items():
                    value.copy_(torch.randn(value.shape) if name != "threshold" else torch.rand(32) * 2)
            yield f"{rule}, {'x - b_dec' if subtracts else 'x'}", sae
    yield "heads", copy.deepcopy(sae).with_metadata(hook_name="blocks.0.attn.hook_z")
    for path in (
        "saelens_gated",
        "saelens_layer_norm",
        "dictionary_learning_AutoEncoder",
        "dictionary_learning_GatedAutoEncoder",
        "dictionary_learning_MatryoshkaBatchTopKSAE",
        "sparsify/layers.3",
        "openai_topk/gpt2-small/resid_post_mlp_v5_32k/autoencoders/6.pt",
        "gemma_scope/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71",
    ):
        yield path.replace("/", ", "), saekit.load(DATA / path)


@pytest.mark.slow
@pytest.mark.parametrize("package", OPENS)
@torch.no_grad()
def test_opened_by(package, tmp_path):
    to = package.replace("-", "_")
    saes = {name: sae for name, sae in dictionaries() if FORMATS[to].unsupported(sae) is None}
    assert len(saes) >= 3
    for folder in ("written", "found"):
        (tmp_path / folder).mkdir()
    for name, sae in saes.items():
        FORMATS[to].write(sae, tmp_path / "written" / name)
    x = torch.randn(300, 8) * torch.logspace(-1, 1, 300)[:, None] + 0.5
    save_file({"x": x}, tmp_path / "x")
    command = [python_of(package, PACKAGES[package]), "-c", OPENS[package] + SCRIPT]
    command += [tmp_path / "written", tmp_path / "x", tmp_path / "found"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for name, sae in saes.items():
        theirs, code = load_file(tmp_path / "found" / name), sae.encode_sparse(x)
        f, x_hat = code.to_dense(), sae.decode(code)
        if to == "dictionary_learning" and sae.cfg.architecture == "standard":
            f = f * sae.W_dec.norm(dim=1)  # their decoder rows have norm 1
        assert (f > 0).sum() > 300
        for found, expected in ((theirs["f"], f), (theirs["x_hat"], x_hat)):
            assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5, name
