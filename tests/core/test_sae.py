"""The dictionary itself: its inference rules against plain formulas, its file format, its light import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made import dictionary
from safetensors.torch import load_file, save_file

import saekit
from saekit import SAEConfig, SaekitError, SparseAutoencoder
from saekit.commands.evaluating import evaluated


def features_by_hand(sae, x):
    """Formulas of the format, entry by entry in float64."""
    h = (x - sae.b_dec if sae.cfg.apply_b_dec_to_input else x).double() @ sae.W_enc.double() + sae.b_enc.double()
    f = torch.relu(h)
    if sae.cfg.architecture == "topk":
        kept = torch.zeros_like(h)
        kept.scatter_(-1, h.topk(sae.cfg.k, dim=-1).indices, 1)
        return f * kept
    if sae.cfg.affinity_scale == "token_norm":
        return f * (h > sae.threshold.double() * (x - sae.b_dec).double().norm(dim=-1, keepdim=True))
    if sae.cfg.architecture == "jumprelu":
        return f * (h > sae.threshold.double())
    return f


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "standard"])
@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_encode_and_decode(architecture, apply_b_dec):
    sae = dictionary(architecture, apply_b_dec_to_input=apply_b_dec)
    x = torch.randn(3, 5, 8)
    expected = features_by_hand(sae, x)
    f = sae.encode(x)
    assert f.shape == (3, 5, 32)
    torch.testing.assert_close(f.double(), expected, rtol=1e-5, atol=1e-5)
    x_hat = (expected @ sae.W_dec.double() + sae.b_dec.double()).float()
    torch.testing.assert_close(sae.decode(f), x_hat, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae(x), x_hat, rtol=1e-4, atol=1e-4)
    code = sae.encode_sparse(x)
    assert code.shape == (15, 32)
    torch.testing.assert_close(code.to_dense().view(3, 5, 32), f)
    torch.testing.assert_close(sae.decode(code).view(3, 5, 8), x_hat, rtol=1e-4, atol=1e-4)
    assert code.matches_per_token().tolist() == (f > 0).sum(-1).flatten().tolist()
    assert code.matches_per_feature().tolist() == (f > 0).flatten(0, 1).sum(0).tolist()


def test_encode_has_gradients():
    sae = dictionary("topk")
    x = torch.randn(6, 8, requires_grad=True)
    sae.encode(x).sum().backward()
    assert x.grad.norm() > 0
    assert sae.W_enc.grad.norm() > 0


def test_long_inputs_are_encoded_in_parts(monkeypatch):
    sae = dictionary("jumprelu")
    x = torch.randn(100, 8)
    whole = sae.encode(x)
    monkeypatch.setattr("saekit.sae._CHUNK", 7 * 32)
    torch.testing.assert_close(sae.encode(x), whole)


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "standard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_again(tmp_path, architecture, dtype):
    sae = dictionary(architecture, dtype=dtype).with_metadata(model_name="m", hook_name="blocks.0.hook_resid_post")
    sae.save(tmp_path / "sae")
    loaded = saekit.load(tmp_path / "sae")
    assert not loaded.training
    assert (loaded.cfg.d_in, loaded.cfg.d_sae, loaded.cfg.architecture) == (8, 32, architecture)
    assert loaded.cfg.metadata["hook_name"] == "blocks.0.hook_resid_post"
    assert loaded.W_enc.shape == (8, 32)
    x = torch.randn(4, 8)
    assert torch.equal(loaded.encode(x), sae.encode(x))
    assert torch.equal(loaded(x), sae(x))


def test_files_are_those_of_saelens(tmp_path):
    dictionary("jumprelu").save(tmp_path / "a")
    dictionary("topk").save(tmp_path / "b")
    cfg = json.loads((tmp_path / "a/cfg.json").read_text())
    assert cfg["architecture"] == "jumprelu"
    assert cfg["dtype"] == "float32"
    assert cfg["apply_b_dec_to_input"] is True
    assert int(cfg["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    shapes = {k: tuple(v.shape) for k, v in load_file(tmp_path / "a/sae_weights.safetensors").items()}
    assert shapes == {"W_enc": (8, 32), "W_dec": (32, 8), "b_enc": (32,), "b_dec": (8,), "threshold": (32,)}
    assert "threshold" not in load_file(tmp_path / "b/sae_weights.safetensors")
    assert json.loads((tmp_path / "b/cfg.json").read_text())["k"] == 4


def test_thresholds_by_token_norm_are_saved_under_a_name_that_saelens_refuses(tmp_path):
    sae = dictionary("jumprelu", affinity_scale="token_norm")
    with torch.no_grad():
        sae.threshold /= 3
    x = torch.randn(50, 8) * torch.logspace(-1, 1, 50)[:, None]
    expected = features_by_hand(sae, x)
    torch.testing.assert_close(sae.encode(x).double(), expected, rtol=1e-5, atol=1e-5)
    again = saekit.load(sae.save(tmp_path / "sae"))
    assert (again.cfg.architecture, again.cfg.affinity_scale) == ("jumprelu", "token_norm")
    assert torch.equal(again.encode(x), sae.encode(x))
    assert json.loads((tmp_path / "sae/cfg.json").read_text())["architecture"] not in ("jumprelu", "topk", "standard")
    with pytest.raises(SaekitError, match="means nothing for 'topk'"):
        SAEConfig(8, 32, "topk", 4, affinity_scale="token_norm")
    with pytest.raises(SaekitError, match="unknown affinity_scale 'norm'"):
        SAEConfig(8, 32, "jumprelu", affinity_scale="norm")


def test_selection_by_decoder_norm_is_read_as_unit_rows(tmp_path):
    sae = dictionary("topk")
    sae.save(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | {"rescale_acts_by_decoder_norm": True}))
    loaded = saekit.load(tmp_path)
    x = torch.randn(20, 8)
    norms = sae.W_dec.norm(dim=1)
    h = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc) * norms
    f = torch.zeros_like(h).scatter(1, h.topk(4, dim=1).indices, torch.relu(h.topk(4, dim=1).values))
    torch.testing.assert_close(loaded(x), f @ (sae.W_dec / norms[:, None]) + sae.b_dec, rtol=1e-4, atol=1e-4)


def test_a_full_folder_is_not_overwritten(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(SaekitError, match="holds something"):
        dictionary("topk").save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.txt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_sae": 33}, "asks for"),
        ({"architecture": "transcoder"}, "unknown architecture 'transcoder'"),
        ({"architecture": "standard"}, "asks for"),
        ({"normalize_activations": "expected_average_only_in"}, "normalize_activations"),
        ({"dtype": "float7"}, "float7"),
        ({"d_in": None}, "damaged"),
        ({"architecture": "topk", "k": "many"}, "damaged"),
    ],
)
def test_configs_that_do_not_fit_are_refused(tmp_path, change, message):
    dictionary("jumprelu").save(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | change))
    with pytest.raises(SaekitError, match=message):
        saekit.load(tmp_path)


def test_damaged_files_are_named(tmp_path):
    sae = dictionary("topk")
    sae.save(tmp_path)
    weights = tmp_path / "sae_weights.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:100])
    with pytest.raises(SaekitError, match=r"sae_weights.safetensors' is damaged"):
        saekit.load(tmp_path)
    save_file({"W_enc": torch.zeros(8, 32)}, weights)
    with pytest.raises(SaekitError, match="asks for"):
        saekit.load(tmp_path)
    (tmp_path / "cfg.json").write_text("{")
    with pytest.raises(SaekitError, match=r"cfg.json' is damaged"):
        saekit.load(tmp_path)


def test_missing_dictionaries_are_named(tmp_path):
    (tmp_path / "demo").mkdir()
    with pytest.raises(SaekitError, match=r"no dictionary at .*did you mean .*demo"):
        saekit.load(tmp_path / "dmeo")
    with pytest.raises(SaekitError, match="no dictionary in a known format"):
        saekit.load(tmp_path / "demo")
    dictionary("topk").save(tmp_path / "demo" / "one" / "sae")
    with pytest.raises(SaekitError, match=r"no dictionary in a known format .*; name what is in it, such as '.*one'"):
        saekit.load(tmp_path / "demo")


def test_paths_are_looked_at_before_any_is_judged(tmp_path):
    dictionary("topk").save(tmp_path / "good")
    with pytest.raises(SaekitError, match="no dictionary at .*goood"):
        evaluated(lambda path: pytest.fail("judged"), [tmp_path / "good", tmp_path / "goood"], quiet=True)


def test_activations_of_another_width_are_refused():
    with pytest.raises(SaekitError, match="width 9 do not fit a dictionary of d_in = 8"):
        dictionary("topk").encode(torch.zeros(2, 9))
    for code in (torch.zeros(3, 31), dictionary("topk", d_sae=16).encode_sparse(torch.zeros(3, 8))):
        with pytest.raises(SaekitError, match=f"a code of {code.shape[-1]} features does not fit a dictionary of 32"):
            dictionary("topk").decode(code)


def test_a_sparse_code_in_one_line():
    code = dictionary("topk", d_sae=2048).encode_sparse(torch.randn(3, 8))
    assert repr(code) == "SparseCode(12 matches of 3 tokens and 2,048 features)"


def test_loading_needs_torch_and_safetensors_alone(tmp_path):
    dictionary("jumprelu").save(tmp_path / "sae")
    script = f"""
import sys
from pathlib import Path
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {{"transformer_lens", "transformers", "datasets", "matplotlib", "einops", "jaxtyping",
                                  "pydantic", "typer", "rich", "yaml", "pandas", "scipy", "huggingface_hub", "wandb",
                                  "tensorboard"}}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
import torch, saekit
sae = saekit.load({str(tmp_path / "sae")!r})
x = torch.randn(3, 8)
assert sae.decode(sae.encode(x)).shape == sae(x).shape == (3, 8)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["topk", "topk_rescaled", "jumprelu", "standard"])
def test_dictionaries_that_saelens_wrote(name):
    """``tests/data`` holds dictionaries and features that sae-lens 6.54.12 saved and computed."""
    folder = Path(__file__).parents[1] / "data" / f"saelens_{name}"
    expected = load_file(folder / "expected.safetensors")
    sae = saekit.load(folder)
    f = sae.encode(expected["x"])
    if name == "topk_rescaled":  # read as the same dictionary with unit decoder rows: f is then in other units
        assert ((f > 0) == (expected["f"] > 0)).all()
    else:
        torch.testing.assert_close(f, expected["f"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(expected["x"]), expected["x_hat"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "value"), [("k", 5), ("apply_b_dec_to_input", False), ("normalize_activations", "layer_norm")]
)
def test_a_config_with_another_rule_than_the_weights_were_saved_with_is_refused(key, value, tmp_path):
    sae = SparseAutoencoder(SAEConfig(d_in=4, d_sae=8, architecture="topk", k=2))
    sae.save(tmp_path / "sae")
    cfg = json.loads((tmp_path / "sae/cfg.json").read_text())
    (tmp_path / "sae/cfg.json").write_text(json.dumps({**cfg, "dtype": "bfloat16"}))  # a matter of taste
    assert saekit.load(tmp_path / "sae").W_dec.dtype == torch.bfloat16
    (tmp_path / "sae/cfg.json").write_text(json.dumps({**cfg, key: value}))
    with pytest.raises(SaekitError, match=f"{key} = {value}.* but its weights were saved with .*{key} = {cfg[key]}"):
        saekit.load(tmp_path / "sae")
