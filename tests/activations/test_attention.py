"""The model's own attention gives what TransformerLens's gives, and steps back where somebody looks inside."""

from __future__ import annotations

import pytest
import torch

from saekit.activations.attention import quick_attention, try_quick_attention
from saekit.activations.model import load_model


@pytest.fixture(scope="module")
def model():
    return load_model()


def kernels(model, hook, tokens):
    """Logits, and whether torch's fused attention made them."""
    with quick_attention(model, *([hook] if hook else [])), torch.profiler.profile() as profile, torch.no_grad():
        logits = model(tokens, return_type="logits")
    return logits, any("scaled_dot_product" in event.key for event in profile.key_averages())


def test_the_same_predictions_by_the_fused_kernel(model, contexts):
    tokens = contexts.tokens[:2]
    before, fused = kernels(model, None, tokens)
    assert not fused, "nothing is replaced before it was tried"
    try_quick_attention(model)
    after, fused = kernels(model, "blocks.1.hook_resid_post", tokens)
    assert fused
    torch.testing.assert_close(after, before, rtol=0, atol=2e-4)
    again = model(tokens, return_type="logits")
    assert torch.equal(again, before), "outside, the model is as it was"


@pytest.mark.parametrize("hook", ["blocks.1.attn.hook_z", "blocks.1.hook_attn_out", "blocks.0.attn.hook_pattern"])
def test_hooks_inside_the_attention_are_reached(model, contexts, hook):
    try_quick_attention(model)
    assert not kernels(model, hook, contexts.tokens[:1])[1]
    seen = []
    with quick_attention(model, hook), model.hooks(fwd_hooks=[(hook, lambda x, hook: seen.append(x.shape))]):
        model(contexts.tokens[:1])
    assert seen


def test_hooks_of_others_inside_the_attention_are_reached(model, contexts):
    try_quick_attention(model)
    seen = []
    with model.hooks(fwd_hooks=[("blocks.2.attn.hook_pattern", lambda x, hook: seen.append(x.shape))]):
        assert not kernels(model, "blocks.1.hook_resid_post", contexts.tokens[:1])[1]
    assert seen


def test_a_model_whose_own_attention_differs_keeps_transformerlenss(contexts, monkeypatch):
    other = load_model()
    kind = type(other.blocks[0].attn.original_component)
    forward = kind.forward

    def louder(self, *arguments, **options):
        out, weights = forward(self, *arguments, **options)
        return 1.01 * out, weights

    monkeypatch.setattr(kind, "forward", louder)
    try_quick_attention(other)
    assert not kernels(other, "blocks.1.hook_resid_post", contexts.tokens[:1])[1]


def test_a_model_whose_own_attention_fails_keeps_transformerlenss(contexts, monkeypatch):
    other = load_model()

    def fail(*arguments, **options):
        raise RuntimeError("no")

    monkeypatch.setattr(type(other.blocks[0].attn.original_component), "forward", fail)
    try_quick_attention(other)
    logits, fused = kernels(other, "blocks.1.hook_resid_post", contexts.tokens[:1])
    assert not fused
    assert logits.isfinite().all()
