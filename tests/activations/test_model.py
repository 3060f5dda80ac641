"""Hooked models: the embedded one is real, passes stop at the hook, mistakes are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import saekit
from saekit import SaekitError
from saekit.activations import ContextBatch, harvest, harvest_hooks, load_model
from saekit.activations.attention import try_quick_attention
from saekit.activations.model import default_hook, model_path, truncated

EMBEDDED = Path(saekit.__file__).parent / "embedded"


def test_the_embedded_model_is_small_and_was_trained():
    assert sum(f.stat().st_size for f in EMBEDDED.iterdir() if f.is_file()) < 12e6
    figures = json.loads((EMBEDDED / "training.json").read_text())
    assert figures["heldout_cross_entropy"] < 3.2
    assert figures["heldout_cross_entropy"] < figures["heldout_bigram_cross_entropy"]
    assert figures["heldout_bigram_cross_entropy"] < figures["heldout_unigram_cross_entropy"]


@pytest.mark.slow
def test_its_cross_entropy_on_heldout_text_is_what_it_claims(source):
    import itertools

    losses = []
    for batch in itertools.islice(source.contexts("heldout"), 0, 160, 10):  # files differ: from all over the text
        with torch.no_grad():
            logits = source.model(batch.tokens)
        losses.append(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.tokens[:, 1:].flatten()))
    claimed = json.loads((EMBEDDED / "training.json").read_text())["heldout_cross_entropy"]
    assert float(torch.stack(losses).mean()) == pytest.approx(claimed, abs=0.2)


@pytest.mark.parametrize(
    "hook", ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_post", "blocks.2.hook_mlp_out", "blocks.3.attn.hook_out"]
)
def test_truncated_passes_give_what_whole_passes_give(source, contexts, hook):
    tokens = contexts.tokens[:4]
    _, cache = source.model.run_with_cache(tokens)
    with truncated(source.model, [hook]) as run:
        (found,), whole = run(tokens), cache[hook].flatten(2)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-6 * float(whole.abs().max()))


def test_nothing_runs_beyond_the_hook(source, contexts):
    reached = []
    watch = [
        (f"blocks.{i}.hook_resid_pre", lambda x, hook, i=i: reached.append(i)) for i in range(source.model.cfg.n_layers)
    ]
    with source.model.hooks(fwd_hooks=watch), truncated(source.model, ["blocks.1.hook_resid_post"]) as run:
        run(contexts.tokens[:2])
    assert reached == [0, 1]
    reached.clear()
    source.model(contexts.tokens[:1])
    assert not reached, "hooks are gone afterwards"


PARTS = ["blocks.2.hook_resid_post", "blocks.0.hook_resid_post", "blocks.2.hook_mlp_out", "blocks.2.hook_attn_out"]


@pytest.mark.parametrize("losses", [False, True])
def test_several_hooks_from_one_pass(source, contexts, losses):
    few = ContextBatch(*(column[:4] for column in contexts))
    try_quick_attention(source.model)  # that runs the model once
    reached = []
    watch = [("blocks.3.hook_resid_pre", lambda x, hook: reached.append(hook))]
    with source.model.hooks(fwd_hooks=watch):
        (found,) = harvest_hooks(source.model, PARTS, [few], losses=losses)
    assert bool(reached) is losses, "without losses the pass ends at the last of the hooks"
    assert list(found.batches) == PARTS
    for hook, batch in found.batches.items():
        (alone,) = harvest(source.model, hook, [few])
        torch.testing.assert_close(batch.x, alone.x, rtol=0, atol=1e-5 * float(alone.x.abs().max()))
        assert torch.equal(batch.documents, alone.documents)
        assert torch.equal(batch.positions, alone.positions)
    if losses:
        log_p = source.model(few.tokens, return_type="logits")[:, :-1].log_softmax(-1)
        nats = -log_p.gather(2, few.tokens[:, 1:, None])[..., 0]
        last = batch.positions == few.tokens.shape[1] - 1
        assert torch.equal(found.losses.isnan(), last)
        torch.testing.assert_close(found.losses[~last], nats[few.kept[:, :-1]], rtol=1e-3, atol=1e-3)
    else:
        assert found.losses is None


def test_the_residual_equals_that_of_the_plain_hugging_face_model(contexts):
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32, attn_implementation="eager")
    tokens = contexts.tokens[:2]
    with torch.no_grad():
        states = plain(tokens, output_hidden_states=True).hidden_states
    with truncated(load_model(device="cpu"), ["blocks.1.hook_resid_post"]) as run:
        torch.testing.assert_close(run(tokens)[0], states[2], rtol=1e-4, atol=1e-4 * float(states[2].abs().max()))


def test_the_default_hook_is_the_middle_of_the_model(source):
    assert default_hook(source.model) == "blocks.1.hook_resid_post"


def test_harvest_leaves_out_bos_and_separators(source, contexts):
    (found,) = harvest(source.model, source.hook, [contexts])
    assert len(found.x) == int(contexts.kept.sum()) < contexts.kept.numel()
    assert (found.positions > 0).all()
    assert torch.equal(found.tokens, contexts.tokens[contexts.kept])
    with truncated(source.model, [source.hook]) as run:
        (whole,) = run(contexts.tokens)
    row = int((found.positions == 17).nonzero()[0])
    assert torch.equal(found.x[row], whole[0, 17])


def test_a_nan_activation_is_named(source, contexts):
    def poison(x, hook):
        x = x.clone()
        x[1, 5] = float("nan")
        return x

    batch = ContextBatch(contexts.tokens[:2], contexts.documents[:2], torch.ones_like(contexts.kept[:2]))
    with (
        source.model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", poison)]),
        pytest.raises(SaekitError, match=rf"NaN or inf .*token id {int(batch.tokens[1, 5])}, .* position 5"),
    ):
        list(harvest(source.model, source.hook, [batch]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt-2", "unknown model 'gpt-2'.*did you mean.*gpt2"),
        ("embeded", "unknown model 'embeded'.*did you mean.*embedded"),
        ("EleutherAI/pythia-70m", "unknown model 'EleutherAI/pythia-70m'.*did you mean 'EleutherAI/pythia-70m-"),
        ("./no/such/folder", "no model folder"),
        ("/no/such/folder", "no model folder"),
    ],
)
def test_unknown_models_are_named(name, message):
    with pytest.raises(SaekitError, match=message):
        load_model(name)


def test_an_incomplete_model_folder_is_named(tmp_path):
    with pytest.raises(SaekitError, match=r"config.json is missing"):
        model_path(str(tmp_path))
    (tmp_path / "config.json").write_text((EMBEDDED / "config.json").read_text())
    with pytest.raises(SaekitError, match="incomplete|cannot hook"):
        load_model(str(tmp_path))
    with pytest.raises(SaekitError, match="unknown dtype 'float23'; did you mean 'float32'"):
        load_model(dtype="float23")


def test_unknown_hooks_name_close_ones(source):
    with (
        pytest.raises(SaekitError, match=r"no hook 'blocks.7.hook_resid_post'.*blocks 0 to 3.*did you mean"),
        truncated(source.model, ["blocks.7.hook_resid_post"]),
    ):
        pass
