"""Passes that start at a hook predict what passes through all of the model do."""

from __future__ import annotations

import pytest
import torch
from tiny import write_tiny

from saekit.activations import ContextBatch
from saekit.activations.model import load_model
from saekit.activations.resuming import layers_before, resumed
from saekit.evals.passage import Passage, passages
from saekit.evals.reference import Reference

HOOKS = {  # how many of three layers are over when it is reached
    "blocks.0.hook_resid_pre": 0,
    "blocks.0.hook_resid_post": 1,
    "blocks.1.hook_mlp_out": 1,
    "blocks.1.hook_attn_out": 1,
    "blocks.1.attn.hook_z": 1,
    "blocks.2.hook_resid_pre": 2,
    "blocks.2.hook_resid_post": 3,
    "ln_final.hook_in": 3,
    "unembed.hook_in": 3,
}


@pytest.fixture(scope="module", params=["gpt2", "gpt_neox", "opt", "qwen2"])
def tiny(request, tmp_path_factory):
    return load_model(str(write_tiny(tmp_path_factory.mktemp(request.param), request.param)), device="cpu")


def batch_of(model, contexts=3, length=20):
    tokens = torch.randint(0, 4096, (contexts, length), generator=torch.Generator().manual_seed(0))
    kept = torch.ones_like(tokens, dtype=torch.bool)
    kept[:, :2] = False
    return ContextBatch(tokens, torch.arange(contexts)[:, None].expand_as(tokens), kept)


@pytest.mark.parametrize("hook", HOOKS)
def test_edited_passes_after_the_models_own(tiny, hook):
    batch = batch_of(tiny)
    edits = {"half": lambda x: x / 2, "zero": torch.zeros_like, "turned": lambda x: x.roll(1, 1)}
    [passage] = passages(tiny, hook, [batch])
    whole = {name: Passage(passage.end, hook, [], batch).edited(edit) for name, edit in edits.items()}
    own = passage.rows
    assert len(layers_before(tiny, hook)) == HOOKS[hook]
    ran = []
    handles = [block.ln1.register_forward_hook(lambda *call: ran.append(1)) for block in tiny.blocks]
    for name, edit in edits.items():
        ran.clear()
        torch.testing.assert_close(passage.edited(edit), whole[name], rtol=1e-5, atol=1e-6)
        assert len(ran) == 3 - HOOKS[hook], "the layers before the hook are not run again"
    for handle in handles:
        handle.remove()
    assert not torch.allclose(whole["turned"], own)
    passage.forget()
    torch.testing.assert_close(passage.rows, own, rtol=1e-5, atol=1e-6)


def test_a_model_that_looks_at_early_layers_again_runs_all_of_them(contexts, monkeypatch):
    other = load_model()
    kind = type(other.blocks[0].original_component)
    forward = kind.forward
    early = []

    def skips(self, hidden_states, *arguments, **options):
        early[self.self_attn.layer_idx :] = [hidden_states]
        return forward(self, hidden_states, *arguments, **options) + 0.1 * early[1 if len(early) > 2 else 0]

    monkeypatch.setattr(kind, "forward", skips)
    hook = "blocks.1.hook_resid_post"
    assert layers_before(other, hook) == []
    [passage] = passages(other, hook, [contexts.rows(0, 2)])
    expected = Passage(passage.end, hook, [], contexts.rows(0, 2)).edited(torch.zeros_like)
    passage.rows  # noqa: B018
    torch.testing.assert_close(passage.edited(torch.zeros_like), expected)


def test_outside_the_model_is_as_it_was(source, contexts):
    tokens = contexts.tokens[:1]
    before = source.model(tokens, return_type="logits")
    layers = layers_before(source.model, source.hook)
    with resumed(layers, torch.zeros(1, 256, 256)):
        assert not torch.allclose(source.model(tokens, return_type="logits"), before)
    assert torch.equal(source.model(tokens, return_type="logits"), before)


@pytest.mark.parametrize("held", [0, 3 * 4 * 256 * 256 * 2, 2**40], ids=["nothing", "three contexts", "all"])
@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_post", "blocks.1.hook_mlp_out", "unembed.hook_out"])
def test_what_is_held_changes_no_figure(source, contexts, held, hook):
    """x, the rows and the costs, read twice, and after all was let go."""
    few = contexts.rows(0, 5)
    expected = Reference(source.model, hook, few, batch=2)
    reference = Reference(source.model, hook, few, batch=2, held=held)
    for _ in range(2):
        for passage, other in zip(reference, expected, strict=True):
            torch.testing.assert_close(passage.x, other.x)
            torch.testing.assert_close(passage.rows, other.rows)
    assert reference.passes == 2
    torch.testing.assert_close(reference.costs().sums.sums, expected.costs().sums.sums)
    assert reference.passes == 0
    reference.forget()
    torch.testing.assert_close([p.x for p in reference], [p.x for p in expected])


def test_memory_is_held_up_to_the_limit(source, contexts):
    context = 256 * 256 * 4 * 2  # bytes of x and of the rows of one context; x is where passes start
    reference = Reference(source.model, source.hook, contexts.rows(0, 6), batch=2, held=4 * context)
    for _ in range(2):
        held = [passage._x is not None for passage in list(reference)]
        assert held == [True, True, False]
        assert reference.holds
    reference.forget()
    assert not reference.holds
    assert not any(passage._x is not None for passage in reference.batches)
    assert [passage._x is not None for passage in list(reference)] == held, "and again when it is used again"


def test_a_layer_that_somebody_has_replaced_runs_and_so_do_all(source, contexts):
    """As accelerate does, after it was seen that passes can start at the hook."""
    few = contexts.rows(0, 2)
    [passage] = passages(source.model, source.hook, [few])
    expected = Passage(passage.end, source.hook, [], few).edited(torch.zeros_like)
    passage.rows  # noqa: B018
    layer = layers_before(source.model, source.hook)[-1]
    own, ran = layer.forward, []
    vars(layer)["forward"] = lambda *arguments, **options: ran.append(1) or own(*arguments, **options)
    torch.testing.assert_close(passage.edited(torch.zeros_like), expected)
    assert ran
    assert "forward" in vars(layer)
    del vars(layer)["forward"]
