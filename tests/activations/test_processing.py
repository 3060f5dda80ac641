"""Processed weights: what hook points hold then, against plain mathematics, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny import write_tiny

from saekit import SaekitError
from saekit.activations import ActivationSource, load_model
from saekit.activations.model import truncated
from saekit.processing import OPTIONS, applied_to

STREAM = ["hook_embed", "blocks.0.hook_resid_pre", "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]
WRITTEN = ["blocks.1.hook_attn_out", "blocks.1.hook_mlp_out"]
INSIDE = ["blocks.1.ln1.hook_normalized", "blocks.1.mlp.hook_pre", "blocks.1.mlp.hook_post"]
TOKENS = torch.randint(1, 4096, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Models in folders of their own, made once."""
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = str(write_tiny(tmp_path_factory.mktemp(kind), kind))
        return made[kind]

    return folder


def seen(model, hooks):
    with truncated(model, hooks) as run:
        return {hook: x.double() for hook, x in zip(hooks, run(TOKENS), strict=True)}


def near(found, expected, tolerance=1e-4):
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def predictions(model):
    with torch.no_grad():
        return model(TOKENS, return_type="logits").double().log_softmax(-1)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "opt"])
def test_centred_writing_weights_take_the_mean_off_the_stream(kind, tiny):
    plain, processed = load_model(tiny(kind)), load_model(tiny(kind), processing=["center_writing_weights"])
    before, after = seen(plain, STREAM + WRITTEN + INSIDE), seen(processed, STREAM + WRITTEN + INSIDE)
    for hook in STREAM + WRITTEN:
        near(after[hook], before[hook] - before[hook].mean(-1, keepdim=True))
        assert float(before[hook].mean(-1).abs().max()) > 0.01, "there is a mean to take off"
    for hook in INSIDE:
        near(after[hook], before[hook])
    near(predictions(processed), predictions(plain))
    assert (applied_to(plain), applied_to(processed)) == ((), ("center_writing_weights",))


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "opt", "qwen2"])
def test_folded_norms_leave_the_stream_and_change_what_the_norm_gives(kind, tiny):
    plain, processed = load_model(tiny(kind)), load_model(tiny(kind), processing=["fold_ln"])
    hooks = [*STREAM, *WRITTEN, *INSIDE, "blocks.1.ln1.hook_out"]
    before, after = seen(plain, hooks), seen(processed, hooks)
    for hook in hooks[:-1]:
        near(after[hook], before[hook])
    norm = plain.blocks[1].ln1
    x = seen(plain, ["blocks.0.hook_resid_post"])["blocks.0.hook_resid_post"]
    centred = x if kind == "qwen2" else x - x.mean(-1, keepdim=True)
    unit = centred / (centred.pow(2).mean(-1, keepdim=True) + plain.cfg.eps).sqrt()
    bias = 0 if kind == "qwen2" else norm.bias.double()
    near(before["blocks.1.ln1.hook_out"], unit * norm.weight.double() + bias)
    near(after["blocks.1.ln1.hook_out"], unit)
    near(predictions(processed), predictions(plain))


@pytest.mark.parametrize("kind", ["gpt2", "opt", "qwen2"])
def test_folded_value_biases_take_the_bias_off_what_heads_mix(kind, tiny):
    plain, processed = load_model(tiny(kind)), load_model(tiny(kind), processing=["fold_value_biases"])
    hooks = ["blocks.1.attn.hook_z", "blocks.1.hook_attn_out", "blocks.1.hook_resid_post"]
    before, after = seen(plain, hooks), seen(processed, hooks)
    stored = load_file(f"{tiny(kind)}/model.safetensors")
    bias = stored["transformer.h.1.attn.c_attn.bias"][64:] if kind == "gpt2" else None
    bias = next(p for name, p in stored.items() if "layers.1.self_attn.v_proj.bias" in name) if bias is None else bias
    near(after[hooks[0]], before[hooks[0]] - bias.double().repeat(32 // len(bias)))
    for hook in hooks[1:]:
        near(after[hook], before[hook])


def test_centred_unembeddings_change_logits_by_their_mean(tiny):
    plain, processed = load_model(tiny("gpt2")), load_model(tiny("gpt2"), processing=["center_unembed"])
    with torch.no_grad():
        before, after = (model(TOKENS, return_type="logits").double() for model in (plain, processed))
    near(after, before - before.mean(-1, keepdim=True))


def test_with_an_rms_norm_nothing_is_centred(tiny):
    """As TransformerLens does: there the mean matters."""
    before, after = (seen(load_model(tiny("qwen2"), processing=p), STREAM) for p in ([], ["center_writing_weights"]))
    for hook in STREAM:
        assert torch.equal(before[hook], after[hook])


def test_what_cannot_be_had_is_refused_by_name(tiny, monkeypatch):
    with pytest.raises(SaekitError, match=r"unknown processing 'fold_lm'; did you mean 'fold_ln'"):
        load_model(tiny("gpt2"), processing=["fold_lm"])
    with pytest.raises(SaekitError, match=r"refactor_factored_attn_matrices cannot be had with .* not unique"):
        load_model(tiny("gpt2"), processing=["fold_ln", "refactor_factored_attn_matrices"])
    with pytest.raises(SaekitError, match=r"^fold_ln cannot be had with .* this kind of model$"):
        load_model(tiny("bert"), processing=["fold_ln"])
    from transformer_lens.weight_processing import ProcessWeights

    def wrong(state, *args, **kwargs):
        return {name: 1.5 * value for name, value in state.items()}

    monkeypatch.setattr(ProcessWeights, "fold_value_biases", wrong)
    with pytest.raises(SaekitError, match=r"^fold_value_biases cannot be had with .* predictions would change by"):
        load_model(tiny("gpt2"), processing=["fold_value_biases"])
    with pytest.raises(SaekitError, match="has no revision 'main'"):
        load_model(tiny("gpt2"), revision="main")


def test_processed_models_go_on_as_others(tiny):
    """Frozen, and told in the provenance; the order of options is ours."""
    source = ActivationSource.open(tiny("gpt2"), processing=["fold_value_biases", "fold_ln"])
    assert source.provenance("heldout")["processing"] == ["fold_ln", "fold_value_biases"]
    assert "processing" not in ActivationSource.open(tiny("gpt2")).provenance("heldout")
    assert not any(p.requires_grad for p in source.model.parameters())
    assert set(applied_to(source.model)) < set(OPTIONS)
    assert applied_to(SimpleNamespace(_weights_processed=True)) is None, "it does not say what"


@pytest.mark.parametrize("dtype", [torch.bfloat16, "torch.bfloat16", "bfloat16"])
def test_dtypes_of_models_are_spelled_as_torch_spells_them(dtype, tiny):
    assert next(load_model(tiny("gpt2"), dtype=dtype).parameters()).dtype == torch.bfloat16
    with pytest.raises(SaekitError, match="unknown dtype 'float31'"):
        load_model(tiny("gpt2"), dtype="torch.float31")
