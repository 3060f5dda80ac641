"""What cannot be spliced is named, and the model is as it was."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from spliced import HOOK, MODULE, at, close, dictionary, logits

import saekit
from saekit import SaekitError


@pytest.mark.parametrize("kind", ["bridge", "plain"])
def test_the_model_is_restored_after_mistakes_too(model, plain, tokens, sae, kind):
    each, hook = (model, HOOK) if kind == "bridge" else (plain, MODULE)

    def state():
        modules = list((each.original_model if kind == "bridge" else each).named_modules())
        hooks = [(n, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._modules)) for n, m in modules]
        return hooks, sorted(each.hook_dict) if kind == "bridge" else None

    before, expected = state(), logits(each, tokens)

    def fail():
        with saekit.splice(each, sae, hook) as spliced:
            spliced.features.register_forward_hook(lambda *_: 1 / 0)
            logits(each, tokens)

    with pytest.raises(ZeroDivisionError):
        fail()
    assert state() == before
    assert torch.equal(logits(each, tokens), expected)
    with pytest.raises(SaekitError, match="no feature 512"), saekit.splice(each, sae, hook, ablate=[512]):
        pass
    with saekit.splice(each, sae, hook):
        if kind == "bridge":
            each.reset_hooks(including_permanent=True)
    assert state() == before


def test_mistakes_are_named(model, plain, tokens, sae):
    def enter(each, *arguments, **options):
        with saekit.splice(each, *arguments, **options):
            logits(each, tokens)

    nameless = dictionary(torch.randn(20, 256))
    nameless.cfg.metadata.clear()
    for message, each, arguments, options in [
        ("does not name its hook point", model, (nameless,), {}),
        ("no hook 'blocks.9.hook_resid_post'.*did you mean", model, (sae, "blocks.9.hook_resid_post"), {}),
        ("no module 'model.layer.1'; did you mean 'model.layers.1'", plain, (sae, "model.layer.1"), {}),
        ("no module 'blocks.1.hook_resid_post'", plain, (sae,), {}),
        ("takes width 256.*'lm_head' has .*4096", plain, (sae, "lm_head"), {}),
        ("'model' gives no tensor, but BaseModelOutput", plain, (sae, "model"), {}),
        ("takes width 256.*hook_pattern", model, (sae, "blocks.1.attn.hook_pattern"), {}),
        ("no feature -1: .* 0 to 511", model, (sae,), {"steer": {-1: 2.0}}),
        ("feature 3 is changed twice", model, (sae,), {"steer": {3: 2.0}, "ablate": [3]}),
        ("feature 3 cannot be changed by nan", model, (sae,), {"add": {3: float("nan")}}),
        ("unknown positions 'bos'", model, (sae,), {"positions": "bos"}),
        (r"shape \[2, 5\] do not fit .* \[3, 48\]", model, (sae,), {"positions": torch.ones(2, 5).bool()}),
    ]:
        with pytest.raises(SaekitError, match=message):
            enter(each, *arguments, **options)
    with (
        saekit.splice(model, sae),
        pytest.raises(SaekitError, match="spliced in at 'blocks.1.hook_out' already"),
        saekit.splice(model, sae, "blocks.1.hook_out"),
    ):
        pass
    with (
        saekit.splice(plain, sae, MODULE, positions=lambda tokens: tokens > 0),
        pytest.raises(SaekitError, match="called without any"),
    ):
        plain(inputs_embeds=plain.get_input_embeddings()(tokens))
    assert "blocks.1.hook_resid_post.hook_features" not in model.hook_dict


def test_the_first_position_is_left_alone_without_bos_too(model, tokens, sae):
    """Whatever token stands there; padding on the left is left alone as well, and moves it."""
    tokens = tokens[:, 1:]
    mask = torch.ones_like(tokens)
    for options in ({}, {"attention_mask": mask}):
        before = at(model, tokens, HOOK, **options)
        with saekit.splice(model, sae):
            found = at(model, tokens, HOOK, **options)
        kept = mask.cumsum(1) > 1
        assert torch.equal(found[~kept], before[~kept])
        close(found[kept], sae(before[kept]).detach())
        mask[1, :5] = 0


@torch.no_grad()
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_told_by_their_position(model, tokens, sae, value):
    """Where they would be spliced; where nothing is spliced they stay as they are, and cost the rest nothing."""
    clean = at(model, tokens, "blocks.1.hook_resid_post")
    with saekit.splice(model, sae):
        expected = at(model, tokens, "blocks.2.hook_resid_pre")

    def spoil(row, place):
        def change(activation, hook):
            activation[row, place, 3] = value
            return activation

        return [("blocks.1.mlp.hook_out", change)]

    with (
        model.hooks(fwd_hooks=spoil(1, 5)),
        saekit.splice(model, sae),
        pytest.raises(
            SaekitError,
            match=rf"'{HOOK}' have NaN or infinite numbers, in float32, at 1 positions, the first of them \[1, 5\]",
        ),
    ):
        model(tokens)
    with model.hooks(fwd_hooks=spoil(1, 0)), saekit.splice(model, sae):
        found = at(model, tokens, "blocks.2.hook_resid_pre")
    assert not torch.isfinite(found[1, 0, 3])
    kept = torch.ones_like(tokens, dtype=torch.bool)
    kept[1, 0] = False
    close(found[kept], expected[kept])
    with model.hooks(fwd_hooks=spoil(1, 5)), saekit.splice(model, sae, positions=torch.arange(48) == 7):
        found = at(model, tokens, "blocks.2.hook_resid_pre")
    kept[1, 5], kept[:, 7] = False, False
    close(found[kept], clean[kept])
    large = [("blocks.1.mlp.hook_out", lambda activation, hook: activation + 1e6)]
    half = saekit.splice(model, copy.deepcopy(sae).half())
    with pytest.raises(SaekitError, match=r"in float16, at \d+ positions"), half, model.hooks(fwd_hooks=large):
        model(tokens)


def test_positions_and_features_that_are_none_are_named(model, tokens, sae, x):
    for options, told in (
        ({"positions": [1, 2]}, "ones and zeros"),
        ({"positions": torch.tensor([0, 5])}, "ones and zeros"),
        ({"steer": {"3": 1.0}}, "by whole numbers: 'str' object"),
        ({"steer": [3]}, "by whole numbers: 'list' object"),
        ({"ablate": 3}, "by whole numbers: 'int' object"),
        ({"ablate": [1.5]}, "by whole numbers: 'float' object"),
    ):
        with pytest.raises(SaekitError, match=told), saekit.splice(model, sae, **options):
            pass
    with saekit.splice(model, sae, positions=np.arange(48) == 7):
        found = at(model, tokens, HOOK)
    close(found[:, 7], sae(x[:, 7]).detach())
    assert torch.equal(found[:, :7], x[:, :7])
