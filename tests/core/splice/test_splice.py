"""A dictionary spliced into a model: exact where nothing changes, along the decoder where something does, then gone."""

from __future__ import annotations

import pytest
import torch
from spliced import HOOK, MODULE, at, close, dictionary, logits, strongest
from transformers import AutoModelForCausalLM

import saekit
from saekit.activations.model import model_path
from saekit.code import SparseCode
from saekit.evals.costs import costs


def test_the_reconstruction_costs_what_evaluations_say(model, contexts, sae):
    batch = contexts.rows(0, 2)
    expected = costs(model, HOOK, [batch], {"clean": None, "reconstructed": lambda x: sae(x).detach()})
    with saekit.splice(model, sae, positions=batch.kept):
        found = logits(model, batch.tokens)[:, :-1][batch.kept[:, :-1]]
    nats = float(torch.nn.functional.cross_entropy(found, batch.tokens[:, 1:][batch.kept[:, :-1]]))
    assert nats == pytest.approx(expected.ce["reconstructed"], rel=1e-4)
    assert expected.ce["reconstructed"] > expected.ce["clean"] + 0.1


def test_bos_is_left_alone_unless_all_is_asked_for(model, tokens, sae, x):
    assert (tokens[:, 0] == model.tokenizer.bos_token_id).all()
    reconstructed = sae(x).detach()
    with saekit.splice(model, sae):
        text = at(model, tokens, HOOK)
    assert torch.equal(text[:, 0], x[:, 0])
    close(text[:, 1:], reconstructed[:, 1:])
    with saekit.splice(model, sae, positions="all"):
        close(at(model, tokens, HOOK), reconstructed)
    chosen = tokens % 2 == 0
    for positions in (chosen, lambda tokens: tokens % 2 == 0):
        with saekit.splice(model, sae, positions=positions):
            close(at(model, tokens, HOOK), torch.where(chosen[..., None], reconstructed, x))
    with saekit.splice(model, sae, positions=torch.arange(tokens.shape[1]) >= 7):
        assert torch.equal(at(model, tokens, HOOK)[:, :7], x[:, :7])


@pytest.mark.parametrize("watched", [False, True])
def test_with_the_error_the_model_is_as_it_was(model, plain, tokens, sae, watched):
    for each, hook in ((model, HOOK), (plain, MODULE)):
        with saekit.splice(each, sae, hook, add_error=True, positions="all") as spliced:
            if watched:
                spliced.features.register_forward_hook(lambda *_: None)
            found = logits(each, tokens)
        close(found, logits(each, tokens))


def test_changes_move_the_activation_along_decoder_directions(model, tokens, sae, x):
    j = strongest(sae, x)
    other, silent = (j + 1) % 512, (j + 2) % 512
    f = sae.encode(x).detach()
    changes = {"steer": {j: 8.0}, "add": {other: -2.5}, "ablate": [silent]}
    change = (8.0 - f[..., j, None]) * sae.W_dec[j] - 2.5 * sae.W_dec[other] - f[..., silent, None] * sae.W_dec[silent]
    if (scale := sae.normalised(x)[1]) is not None:
        change = change * scale.scale
    for add_error, before in ((True, x), (False, sae(x))):
        with saekit.splice(model, sae, add_error=add_error, positions="all", **changes):
            close(at(model, tokens, HOOK), (before + change).detach())
    with saekit.splice(model, sae, ablate=[j, j], positions="all"):
        features = at(model, tokens, f"{HOOK}.hook_features")
    assert f[..., j].any()
    assert not features[..., j].any()
    close(features, torch.where(torch.arange(512) == j, 0, f))


def test_the_parts_are_hook_points_of_the_bridge(model, tokens, sae, x):
    names = [f"{HOOK}.{name}" for name in ("hook_features", "hook_reconstruction", "hook_error")]
    before = model.hook_dict
    with saekit.splice(model, sae, add_error=True, positions="all") as spliced:
        assert set(model.hook_dict) - set(before) == set(names)
        _, cache = model.run_with_cache(tokens)
        close(cache[names[0]], sae.encode(x).detach())
        close(cache[names[1]], sae(x).detach())
        close(cache[names[2]], x - sae(x).detach())
        assert cache[names[0]].shape == (*tokens.shape, 512)

        j = strongest(sae, x)

        def ablate(f, hook):
            assert hook.name == names[0]
            f = f.clone()
            f[..., j] = 0
            return f

        by_hook = model.run_with_hooks(tokens, fwd_hooks=[(names[0], ablate)])
        model.add_hook(names[0], ablate)
        by_added = logits(model, tokens)
        model.reset_hooks()
        spliced.features.register_forward_hook(lambda module, _, f: ablate(f, module))
        by_module = logits(model, tokens)
    assert set(model.hook_dict) == set(before)
    with saekit.splice(model, sae, add_error=True, positions="all", ablate=[j]):
        expected = logits(model, tokens)
    assert not torch.allclose(expected, logits(model, tokens), atol=1e-3)
    for found in (by_hook, by_added, by_module):
        close(found, expected)


@pytest.mark.parametrize("changes", [{}, {"steer": {5: 3.0}}, {"add": {5: 3.0, 8: -1.0}, "ablate": [9]}])
def test_dense_features_are_made_for_those_who_look(model, tokens, sae, monkeypatch, changes):
    def fail(code):
        raise AssertionError("dense")

    with saekit.splice(model, sae, **changes) as spliced:
        spliced.features.register_forward_hook(lambda *_: None)
        expected = logits(model, tokens)
    monkeypatch.setattr(SparseCode, "to_dense", fail)
    with saekit.splice(model, sae, **changes):
        close(logits(model, tokens), expected)


class Mixing(torch.nn.Module):
    """A causal model that is float64 throughout."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(20, 8)
        self.layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()) for _ in range(3))
        self.unembed = torch.nn.Linear(8, 20)
        self.double().requires_grad_(False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None])
        return self.unembed(x)


@pytest.mark.parametrize("add_error", [False, True])
def test_gradients_of_features_equal_finite_differences(add_error):
    """On a frozen model and dictionary; the error stays what it was."""
    model, tokens = Mixing(), torch.tensor([[0, 3, 8, 19, 2, 7]])
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    sae = dictionary(x, width=32).double().requires_grad_(False)
    change, seen = torch.zeros(6, 32, dtype=torch.float64), []

    def shift(module, _, f):
        seen.append(f)
        return f + change

    def loss():
        return torch.nn.functional.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:])

    with saekit.splice(
        model, sae, "layers.1", add_error=add_error, positions=lambda tokens: tokens != 0, steer={4: 0.3}
    ) as spliced:
        spliced.features.register_forward_hook(shift)
        (gradient,) = torch.autograd.grad(loss(), seen[0])
        assert not gradient[0, 0].any(), "nothing is spliced in at BOS"
        expected = torch.zeros_like(change)
        for t, j in torch.ones(6, 32).nonzero().tolist():
            values = []
            for step in (1e-5, -1e-5):
                change[t, j] = step
                values.append(float(loss().detach()))
                change[t, j] = 0
            expected[t, j] = (values[0] - values[1]) / 2e-5
    torch.testing.assert_close(gradient[0], expected, rtol=1e-6, atol=1e-10)


def test_gradients_reach_x_through_the_dictionary_alone(model, tokens, sae, x):
    """With the error, which is a constant: what goes past the dictionary has no gradient."""
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))

    def gradient(function):
        leaf = x.clone().requires_grad_(True)
        (found,) = torch.autograd.grad((function(leaf) * direction).sum(), leaf)
        return found

    with saekit.splice(model, sae, add_error=True, positions="all") as spliced:
        close(gradient(spliced), gradient(sae))
        close(spliced(x).detach(), x)


def test_gradients_are_cached_by_the_bridge(model, tokens, x):
    sae = dictionary(x.flatten(0, 1)).requires_grad_(False)
    name = f"{HOOK}.hook_features"
    with saekit.splice(model, sae, add_error=True):
        _, cache = model.run_with_cache(tokens, incl_bwd=True, return_type="loss", names_filter=[name, HOOK])
    expected = cache[HOOK + "_grad"][:, 1:] @ sae.W_dec.T
    assert expected.any()
    close(cache[name + "_grad"][:, 1:], expected)


def test_a_plain_model_does_what_the_bridge_does(model, plain, tokens, sae, x):
    j = strongest(sae, x)
    seen = []
    for options in ({}, {"add_error": True, "steer": {j: 20.0}}):
        with saekit.splice(model, sae, **options):
            expected = logits(model, tokens)
            features = at(model, tokens, f"{HOOK}.hook_features")
        with saekit.splice(plain, sae, MODULE, **options) as spliced:
            spliced.features.register_forward_hook(lambda module, _, f: seen.append(f))
            close(logits(plain, tokens), expected, 1e-4)
        close(seen[-1].detach(), features, 1e-4)


def test_outputs_that_are_tuples(plain, tokens, sae, x):
    """The attention gives its weights too: the first output is spliced, the rest is left."""
    name = "model.layers.1.self_attn"
    attention, seen = plain.get_submodule(name), []
    handle = attention.register_forward_hook(lambda module, _, output: seen.append(output))
    before = logits(plain, tokens)
    with saekit.splice(plain, sae, name, positions="all"):
        keep = attention.register_forward_hook(lambda module, _, output: seen.append(output))
        after = logits(plain, tokens)
    handle.remove()
    keep.remove()
    assert isinstance(seen[0], tuple)
    close(seen[-1][0].detach(), sae(seen[0][0]).detach())
    assert torch.equal(seen[-1][1], seen[0][1])
    assert not torch.allclose(before, after, atol=1e-2)


def test_two_dictionaries_at_once(model, tokens, x):
    later = "blocks.2.hook_mlp_out"
    first = dictionary(x.flatten(0, 1))
    second = dictionary(at(model, tokens, later).flatten(0, 1), seed=1)
    text = (tokens != model.tokenizer.bos_token_id)[..., None]

    def replaced_by(sae):
        return lambda x, hook: torch.where(text, sae(x).detach(), x)

    expected = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, replaced_by(first)), (later, replaced_by(second))])
    with saekit.splice(model, first), saekit.splice(model, second, later):
        assert {f"{HOOK}.hook_features", f"{later}.hook_features"} <= set(model.hook_dict)
        close(logits(model, tokens), expected)


def test_heads_are_flattened(model, tokens):
    hook = "blocks.1.attn.hook_z"
    z = at(model, tokens, hook)
    assert z.ndim == 4
    sae = dictionary(z.flatten(2).flatten(0, 1))
    with saekit.splice(model, sae, hook, positions="all"):
        close(at(model, tokens, hook), sae(z.flatten(2)).detach().reshape(z.shape))
    with saekit.splice(model, sae, hook, add_error=True):
        close(logits(model, tokens), logits(model, tokens))


@pytest.mark.parametrize("start", [0, 1], ids=["BOS", "no BOS"])
def test_generation_with_a_cache_of_keys_and_values(model, plain, tokens, sae, x, start):
    """Steered at each step, as whole passes are; the first position is left alone in the first pass only."""
    prompt = tokens[:2, start : start + 16]
    steer = {strongest(sae, x): 40.0}
    greedy = {"do_sample": False, "max_new_tokens": 6}
    with saekit.splice(plain, sae, MODULE, steer=steer, add_error=True):
        expected = prompt
        for _ in range(6):
            expected = torch.cat([expected, logits(plain, expected)[:, -1].argmax(-1, keepdim=True)], 1)
        found = plain.generate(prompt, use_cache=True, pad_token_id=1, eos_token_id=None, **greedy)
    assert torch.equal(found, expected)
    with saekit.splice(model, sae, steer=steer, add_error=True):
        by_bridge = model.generate(prompt, verbose=False, stop_at_eos=False, **greedy)
    assert torch.equal(by_bridge, expected)
    assert not torch.equal(model.generate(prompt, verbose=False, stop_at_eos=False, **greedy), expected)


def test_precision_is_that_of_the_model(tokens, x):
    model = AutoModelForCausalLM.from_pretrained(model_path("embedded"), dtype=torch.bfloat16)
    sae = dictionary(x.flatten(0, 1))
    expected = logits(model, tokens)
    with torch.inference_mode(), saekit.splice(model, sae, MODULE, add_error=True) as spliced:
        spliced.features.register_forward_hook(lambda *_: None)
        found = model(tokens).logits
    assert found.dtype == torch.bfloat16
    close(found.float(), expected.float(), 0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_with_the_error_a_coarser_dictionary_changes_nothing(model, tokens, x, dtype):
    sae = dictionary(x.flatten(0, 1)).to(dtype)
    with saekit.splice(model, sae, positions="all", add_error=True):
        close(at(model, tokens, HOOK), x, 1e-6)
