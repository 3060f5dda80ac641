"""Dictionaries of other packages: read as those compute them (``scripts/make_fixtures.py``), written, refused."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made import dictionary, near
from safetensors.torch import load_file, save_file

import saekit
from saekit import SAEConfig, SaekitError, SparseAutoencoder
from saekit.formats import FORMATS, UNSUPPORTED, dictionary_learning, gemma_scope, openai, rewriting, sparsify

DATA = Path(__file__).parents[1] / "data"
GEMMA, GEMMA_2 = "layer_20/width_16k/average_l0_71", "resid_post/layer_9_width_16k_l0_small"
PYTHIA = {"model_name": "EleutherAI/pythia-70m-deduped", "hook_name": "blocks.3.hook_resid_post", "context_size": 128}
SMOL = {"model_name": "HuggingFaceTB/SmolLM2-135M", "dataset_path": "EleutherAI/SmolLM2-135M-10B", "context_size": 256}
OPENAI = {"model_name": "gpt2", "hook_name": "blocks.6.hook_resid_post"}
CLASSES = {
    "AutoEncoder": "standard",
    "AutoEncoderNew": "standard",
    "GatedAutoEncoder": "jumprelu",
    "JumpReluAutoEncoder": "jumprelu",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "jumprelu",
    "MatryoshkaBatchTopKSAE": "jumprelu",
}
FIXTURES = {  # the dictionary; what is expected of it; its rule here; what is known of its origin
    "saelens_gated": ("saelens_gated", "jumprelu", None),
    "saelens_batchtopk": ("saelens_batchtopk", "jumprelu", None),
    "saelens_layer_norm": ("saelens_layer_norm", "topk", None),
    **{f"dictionary_learning_{name}": (f"dictionary_learning_{name}", rule, PYTHIA) for name, rule in CLASSES.items()},
    "dictionary_learning_AutoEncoderTopK/ae.pt": ("dictionary_learning_AutoEncoderTopK", "topk", PYTHIA),
    "sparsify/layers.3": ("sparsify/layers.3", "topk", {**SMOL, "hook_name": "blocks.3.hook_resid_post"}),
    "sparsify/layers.3/sae.safetensors": ("sparsify/layers.3", "topk", None),
    "sparsify_expansion/layers.3.mlp": (
        "sparsify_expansion/layers.3.mlp", "topk", {**SMOL, "hook_name": "blocks.3.hook_mlp_out"},
    ),
    "openai_topk/gpt2-small/resid_post_mlp_v5_32k/autoencoders/6.pt": ("openai_topk", "topk", OPENAI),
    "openai_topk/gpt2-small/resid_post_mlp_v5_32k/autoencoders": ("openai_topk", "topk", OPENAI),
    "openai_relu/gpt2-small/resid_post_mlp_v5_32k/autoencoders/6.pt": ("openai_relu", "standard", OPENAI),
    f"gemma_scope/gemma-scope-2b-pt-res/{GEMMA}": (
        "gemma_scope", "jumprelu",
        {"model_name": "google/gemma-2-2b", "hook_name": "blocks.20.hook_resid_post", "context_size": 1024},
    ),
    f"gemma_scope/gemma-scope-2b-pt-res/{GEMMA}/params.npz": ("gemma_scope", "jumprelu", None),
    f"gemma_scope_2/gemma-scope-2-270m-pt/{GEMMA_2}": ("gemma_scope_2", "jumprelu", {}),
    f"gemma_scope_2/gemma-scope-2-270m-pt/{GEMMA_2}/params.safetensors": ("gemma_scope_2", "jumprelu", {}),
}  # fmt: skip


@pytest.mark.parametrize("path", FIXTURES)
@torch.no_grad()
def test_dictionaries_that_others_wrote(path):
    where, rule, facts = FIXTURES[path]
    expected = load_file(DATA / where / "expected.safetensors")
    sae = saekit.load(DATA / path)
    assert (sae.cfg.architecture, sae.cfg.d_in, sae.cfg.d_sae) == (rule, 8, 32)
    assert not sae.training
    code = sae.encode_sparse(expected["x"])
    assert 0 < len(code.values) < 0.9 * expected["f"].numel()
    near(sae.encode(expected["x"]), expected["f"])
    assert ((code.to_dense() > 0) == (expected["f"] > 0)).all()
    for x_hat in (sae(expected["x"]), sae.decode(code), sae.decode(expected["f"], expected["x"])):
        near(x_hat, expected["x_hat"])
    assert facts is None or sae.cfg.metadata == facts


@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        (n, a)
        for n in FORMATS.writable()
        for a in ("topk", "jumprelu", "standard")
        if (n, a)[0] != "sparsify" or a == "topk"
    ],
)
@torch.no_grad()
def test_written_and_read_again(name, architecture, apply_b_dec, tmp_path):
    facts = {"model_name": "m", "hook_name": "blocks.0.hook_mlp_out", "saekit": {"variant": "topk"}}
    sae = dictionary(architecture, apply_b_dec_to_input=apply_b_dec, metadata=facts)
    assert FORMATS[name].unsupported(sae) is None
    FORMATS[name].write(sae, tmp_path / "x")
    with pytest.raises(SaekitError, match="holds something already"):
        FORMATS[name].write(sae, tmp_path / "x")
    again = saekit.load(FORMATS[name].write(sae, tmp_path / "x", overwrite=True))
    x = torch.randn(100, 8)
    assert {**again.cfg.metadata, **facts} == again.cfg.metadata
    assert (again.cfg.architecture, again.cfg.k) == (sae.cfg.architecture, sae.cfg.k)
    near(again(x), sae(x))
    if (name, architecture) == ("dictionary_learning", "standard"):
        near(again.encode(x), sae.encode(x) * sae.W_dec.norm(dim=1))
        near(again.W_dec.norm(dim=1), torch.ones(32))
    else:
        near(again.encode(x), sae.encode(x))


@torch.no_grad()
def test_dtypes(tmp_path):
    """Sparsify keeps the stored dtype; dictionary_learning loads float32."""
    sae = dictionary("topk", dtype=torch.bfloat16)
    for name, dtype in (
        ("saelens", torch.bfloat16),
        ("sparsify", torch.bfloat16),
        ("dictionary_learning", torch.float32),
    ):
        again = saekit.load(FORMATS[name].write(sae, tmp_path / name))
        assert again.W_enc.dtype == again.b_dec.dtype == dtype
        assert torch.equal(again.W_dec, sae.W_dec.to(dtype))


def test_what_dictionary_learning_says_of_the_origin(tmp_path):
    """In its own words too, where it has them."""
    facts = {"model_name": "gpt2", "hook_name": "blocks.5.hook_resid_post", "context_size": 64}
    for change, expected in (({}, facts), ({"hook_name": "blocks.5.hook_mlp_out"}, {**facts, "hook_name": None})):
        sae = dictionary("topk", metadata=facts | change)
        FORMATS["dictionary_learning"].write(sae, tmp_path, overwrite=True)
        assert saekit.load(tmp_path).cfg.metadata == facts | change
        with_config(tmp_path / "config.json", saekit=None)
        assert saekit.load(tmp_path).cfg.metadata == {name: fact for name, fact in expected.items() if fact}


def test_what_formats_cannot_hold(tmp_path):
    dead = dictionary("standard")
    with torch.no_grad():
        dead.W_dec[3] = 0
    cases = {
        "dictionary_learning": {
            "token_norm": dictionary("jumprelu", affinity_scale="token_norm"),
            "layer_norm": dictionary("topk", input_normalization="layer_norm"),
            "zero_rows": dead,
        },
        "sparsify": {
            "thresholds": dictionary("jumprelu", affinity_scale="token_norm"),
            "layer_norm": dictionary("jumprelu", input_normalization="layer_norm"),
        },
    }
    for name, lacking in cases.items():
        for reason, sae in lacking.items():
            assert FORMATS[name].unsupported(sae) == reason
            with pytest.raises(SaekitError, match=f"the format of {name} cannot hold {UNSUPPORTED[reason]}"):
                FORMATS[name].write(sae, tmp_path / "x")
            assert not (tmp_path / "x").exists()
    assert FORMATS["saelens"].unsupported(cases["sparsify"]["thresholds"]) == "token_norm"


@given(st.integers(0, 10_000))
def test_a_gated_dictionary_is_a_jumprelu(seed):
    torch.manual_seed(seed)
    shapes = {"W_enc": [5, 11], "W_dec": [11, 5], "b_dec": [5], "r_mag": [11], "b_gate": [11], "b_mag": [11]}
    w = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    sae = SparseAutoencoder(SAEConfig(5, 11, "jumprelu"), torch.float64)
    sae.load_state_dict(rewriting.gated(w))
    x = torch.randn(40, 5, dtype=torch.float64)
    p = (x - w["b_dec"]) @ w["W_enc"]
    f = torch.relu(w["r_mag"].exp() * p + w["b_mag"]) * (p + w["b_gate"] > 0)
    torch.testing.assert_close(sae.encode(x), f)
    torch.testing.assert_close(sae(x), f @ w["W_dec"] + w["b_dec"])


def copy_of(name, tmp_path):
    return Path(shutil.copytree(DATA / name, tmp_path / name))


def with_config(path, **changes):
    """Change keys of a JSON file; a value of None drops one."""
    cfg = json.loads(path.read_text())
    for key, value in changes.items():
        cfg.pop(key, None) if value is None else cfg.update({key: value})
    path.write_text(json.dumps(cfg))


def test_several_seeds_of_sparsify(tmp_path):
    run = copy_of("sparsify", tmp_path)
    (run / "layers.3").rename(tmp_path / "seed1")
    (run / "layers.3").mkdir()
    (tmp_path / "seed1").rename(run / "layers.3/seed1")
    expected = {**SMOL, "hook_name": "blocks.3.hook_resid_post"}
    assert saekit.load(run / "layers.3/seed1").cfg.metadata == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transcode": True}, "cfg.json' asks for transcode = True, which saekit does not read"),
        ({"skip_connection": True}, "asks for skip_connection = True"),
        ({"activation": "groupmax"}, "asks for activation = 'groupmax'"),
        ({"d_in": None}, "lacks or does not know 'd_in'"),
        ({"num_latents": 33}, "its config asks for"),
        ({"k": 33}, "k = 33 is not between 1 and the 32 features"),
    ],
)
def test_configs_of_sparsify(change, message, tmp_path):
    folder = copy_of("sparsify", tmp_path) / "layers.3"
    with_config(folder / "cfg.json", **change)
    with pytest.raises(SaekitError, match=message):
        saekit.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dict_class": "CrossCoder"}, "of the class 'CrossCoder', which saekit does not read"),
        ({"dict_class": "AutoEncoderTopk"}, "did you mean 'AutoEncoderTopK'"),
        ({"dict_class": "JumpReluAutoEncoder"}, "a dictionary of that width has"),
        ({"k": 5}, "holds k = 4, but its config asks for 5"),
        ({"k": None}, "lacks or does not know 'k'"),
        ({"dict_class": None}, "lacks or does not know 'dict_class'"),
    ],
)
def test_configs_of_dictionary_learning(change, message, tmp_path):
    folder = copy_of("dictionary_learning_AutoEncoderTopK", tmp_path)
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    trainer = {key: value for key, value in (trainer | change).items() if value is not None}
    with_config(folder / "config.json", trainer=trainer)
    with pytest.raises(SaekitError, match=message):
        saekit.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(SaekitError, match=r"config.json'"):
        saekit.load(folder / "ae.pt")


def changed(path, **changes):
    """Change names of an archive of torch; a value of None drops one."""
    state = {**torch.load(path, weights_only=True), **changes}
    torch.save({name: value for name, value in state.items() if value is not None}, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "Tanh"}, "asks for the activation 'Tanh'"),
        ({"activation_state_dict": {"k": 4, "postact_fn": "Identity"}}, "asks for 'Identity' after TopK"),
        ({"activation_state_dict": {"postact_fn": "ReLU"}}, "lacks or does not know 'k'"),
        ({"activation_state_dict": 5}, "it is no mapping"),
        ({"latent_bias": None}, "but a dictionary of that width has"),
        ({"skip": torch.zeros(8, 8)}, "but a dictionary of that width has"),
        ({"latent_bias": torch.zeros(31)}, "but a dictionary of that width has"),
        ({"latent_bias": torch.zeros(32, dtype=torch.int32)}, "weights in float32, int32, not in floating point"),
    ],
)
def test_files_of_openai(changes, message, tmp_path):
    path = next(copy_of("openai_topk", tmp_path).rglob("*.pt"))
    changed(path, **changes)
    with pytest.raises(SaekitError, match=message):
        saekit.load(path)


def test_transcoders_of_gemma_scope(tmp_path):
    """Their tensors look like an autoencoder's: the path or the config tells."""
    found = copy_of(f"gemma_scope/gemma-scope-2b-pt-res/{GEMMA}", tmp_path)
    moved = tmp_path / "gemma-scope-2b-pt-transcoders/layer_1/width_16k/average_l0_9"
    shutil.copytree(found, moved)
    with pytest.raises(SaekitError, match="is a transcoder, not an autoencoder"):
        saekit.load(moved)
    assert saekit.load(found).cfg.d_sae == 32
    (found / "config.json").write_text(json.dumps({"hf_hook_point_in": "a", "hf_hook_point_out": "b"}))
    with pytest.raises(SaekitError, match="is a transcoder, not an autoencoder"):
        saekit.load(found / "params.npz")


def test_a_threshold_that_was_never_set(tmp_path):
    """As BatchTopKSAE's own code behaves: relu alone, and a word about it."""
    folder = copy_of("dictionary_learning_BatchTopKSAE", tmp_path)
    changed(folder / "ae.pt", threshold=torch.tensor(-1.0))
    with pytest.warns(UserWarning, match="has no threshold yet"):
        sae = saekit.load(folder)
    w = {name: value.double() for name, value in torch.load(folder / "ae.pt", weights_only=True).items()}
    x = load_file(folder / "expected.safetensors")["x"]
    f = torch.relu((x.double() - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"])
    near(sae.encode(x).detach(), f)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saekit.load(DATA / "dictionary_learning_BatchTopKSAE")


@torch.no_grad()
def test_a_dead_decoder_row_stays_where_others_are_normalised(tmp_path):
    folder = copy_of("dictionary_learning_AutoEncoder", tmp_path)
    weight = torch.load(folder / "ae.pt", weights_only=True)["decoder.weight"].clone()
    weight[:, 3] = 0
    changed(folder / "ae.pt", **{"decoder.weight": weight})
    sae = saekit.load(folder)
    assert torch.equal(sae.W_dec[3], torch.zeros(8))
    near(sae.W_dec.norm(dim=1), (torch.arange(32) != 3).float())
    assert sae(torch.randn(5, 8)).isfinite().all()


@torch.no_grad()
def test_a_dead_decoder_row_where_selection_is_by_its_norm(tmp_path):
    sae, x = dictionary("topk"), torch.randn(50, 8)
    sae.W_dec[3] = 0
    sae.b_enc[3] = 100
    with_config(sae.save(tmp_path) / "cfg.json", rescale_acts_by_decoder_norm=True)
    again = saekit.load(tmp_path)
    assert (again.encode(x)[:, 3] == 0).all()
    assert again(x).isfinite().all()


OLD = {"d_in": 8, "d_sae": 32, "dtype": "float32", "model_name": "gpt2", "hook_point": "blocks.1.hook_resid_pre"}


@torch.no_grad()
def test_configs_of_saelens_before_6(tmp_path):
    sae = dictionary("standard")
    sae.save(tmp_path)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    save_file({**tensors, "scaling_factor": torch.ones(32)}, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({**OLD, "normalize_activations": False, "context_size": 128}))
    again = saekit.load(tmp_path)
    origin = {"model_name": "gpt2", "hook_name": OLD["hook_point"], "context_size": 128}
    assert again.cfg.metadata == {**origin, "prepend_bos": True}, "as SAELens took it"
    x = torch.randn(10, 8)
    assert torch.equal(again(x), sae(x))
    top_k = {**OLD, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}
    (tmp_path / "cfg.json").write_text(json.dumps(top_k))
    assert (saekit.load(tmp_path).cfg.architecture, saekit.load(tmp_path).cfg.k) == ("topk", 3)
    for change, message in (
        ({"activation_fn_str": "tanh-relu"}, "asks for activation_fn = 'tanh-relu'"),
        ({"activation_fn_kwargs": {"k": 3, "signed": True}}, "asks for activation_fn = 'topk' of"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor"),
        ({"normalize_activations": True}, "normalize_activations = 'expected_average_only_in' is not read"),
        ({"reshape_activations": "hook_q"}, "reshape_activations = 'hook_q'"),
        ({"apply_b_dec_to_input": "false"}, "cfg.json' is damaged: apply_b_dec_to_input = 'false'"),
        ({"rescale_acts_by_decoder_norm": "no"}, "cfg.json' is damaged: rescale_acts_by_decoder_norm = 'no'"),
    ):
        (tmp_path / "cfg.json").write_text(json.dumps(top_k | change))
        with pytest.raises(SaekitError, match=message):
            saekit.load(tmp_path)
    save_file({**tensors, "scaling_factor": torch.full((32,), 2.0)}, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps(OLD))
    with pytest.raises(SaekitError, match="holds a scaling_factor"):
        saekit.load(tmp_path)


def test_names_of_places_that_are_certain():
    trainer = {"lm_name": "m", "layer": 8, "submodule_name": "resid_post_layer_8"}
    hook = {"hook_name": "blocks.8.hook_resid_post"}
    assert dictionary_learning.origin(trainer, {"ctx_len": 64}) == {"model_name": "m", **hook, "context_size": 64}
    for change in ({"layer": 7}, {"submodule_name": "mlp_out_layer_8"}, {"submodule_name": None}):
        assert dictionary_learning.origin(trainer | change, None) == {"model_name": "m"}
    assert dictionary_learning.origin({"lm_name": ["x"], "layer": 1}, {"ctx_len": -5}) == {}
    for name, run, found in (
        ("layers.10", {}, "blocks.10.hook_resid_post"),
        ("h.10", {"model": "gpt2"}, "blocks.10.hook_resid_post"),
        ("layers.10.mlp", {"model": "meta-llama/Llama-3.2-1B"}, "blocks.10.hook_mlp_out"),
        ("layers.10.mlp", {"model": "google/gemma-2-2b"}, None),  # there a norm follows
        ("layers.10.mlp", {}, None),
        ("layers.10.self_attn", {"model": "m"}, None),
        ("embed_tokens", {"model": "m"}, None),
    ):
        assert sparsify.origin(Path("/x") / name, run).get("hook_name") == found
    scope = Path("/c/models--google--gemma-scope-9b-it-mlp/snapshots/abc/layer_31/width_131k/average_l0_12")
    found = {"model_name": "google/gemma-2-9b-it", "hook_name": "blocks.31.hook_mlp_out", "context_size": 1024}
    assert gemma_scope.origin(scope) == found
    for elsewhere in ("/c/layer_3/width_16k/x", "/c/gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6"):
        assert gemma_scope.origin(Path(elsewhere)) == {}
    assert openai.origin(Path("/c/6.pt")) == {}
    attention = Path("/c/gpt2-small/resid_delta_attn_v5_128k/autoencoders/11.pt")
    assert openai.origin(attention)["hook_name"] == "blocks.11.hook_attn_out"
