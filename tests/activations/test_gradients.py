"""Gradients of the model's loss at a hook, against plain autograd on the plain Hugging Face model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import saekit
from saekit import SaekitError
from saekit.activations import ActivationCache, ContextBatch, harvest, load_model
from saekit.activations.gradients import check_causal, not_causal, with_gradients
from saekit.activations.stream import cache_rows, live_rows

EMBEDDED = Path(saekit.__file__).parent / "embedded"


@pytest.fixture(scope="module")
def few(contexts):
    return ContextBatch(*(column[:3] for column in contexts))


def by_hugging_face(tokens, labels):
    """Activations after the second block and the gradient there, with nothing of saekit or TransformerLens."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32, attn_implementation="eager")
    found = {}

    def keep(module, inputs, output):
        found["x"] = output[0] if isinstance(output, tuple) else output
        found["x"].retain_grad()

    plain.model.layers[1].register_forward_hook(keep)
    logits = plain(tokens).logits
    cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum").backward()
    return found["x"].detach(), found["x"].grad


def test_a_gradient_harvest_equals_autograd_on_the_plain_model(source, few):
    x, gradient = by_hugging_face(few.tokens, few.tokens[:, 1:])
    (found,) = harvest(source.model, "blocks.1.hook_resid_post", [few], gradients=True)
    torch.testing.assert_close(found.gradients, gradient[few.kept], rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))
    torch.testing.assert_close(found.x, x[few.kept], rtol=1e-4, atol=1e-4 * float(x.abs().max()))
    assert float(gradient.abs().max()) > 0
    (plain,) = harvest(source.model, "blocks.1.hook_resid_post", [few])
    torch.testing.assert_close(plain.x, found.x)
    assert plain.gradients is None


def test_the_model_keeps_no_trace_of_it(source, few):
    run = with_gradients(source.model, "blocks.1.hook_resid_post")
    x, gradient = run(few.tokens)
    assert not x.requires_grad
    assert not gradient.requires_grad
    assert all(parameter.grad is None for parameter in source.model.parameters())
    assert not source.model(few.tokens, return_type="logits").requires_grad


def test_sampled_labels_come_from_the_model_and_from_the_seed(source, few):
    hook = "blocks.1.hook_resid_post"
    gradients = [with_gradients(source.model, hook, "sampled", seed)(few.tokens)[1] for seed in (0, 0, 1)]
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[0], gradients[2])
    # drawn from the model's own predictions, the gradient of the log-likelihood is zero on average
    mean = torch.stack([with_gradients(source.model, hook, "sampled", seed)(few.tokens)[1] for seed in range(24)]).mean(
        0
    )
    true = with_gradients(source.model, hook)(few.tokens)[1]
    assert float(mean.norm()) < 0.35 * float(gradients[0].norm())
    assert float((true - mean).norm()) > 0.5 * float(true.norm())


def test_models_that_are_not_causal_are_refused(source, tmp_path):
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    check_causal(source.model)
    config = BertConfig(
        vocab_size=4096, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(EMBEDDED).save_pretrained(tmp_path)
    with pytest.raises(SaekitError, match="not causal: its predictions depend on later tokens"):
        check_causal(load_model(str(tmp_path)))


def test_a_hook_that_the_loss_does_not_depend_on_is_named(source, few):
    model = load_model(device="cpu")
    with (
        model.hooks(fwd_hooks=[("blocks.2.hook_resid_post", lambda x, hook: torch.zeros_like(x))]),
        pytest.raises(SaekitError, match=r"no gradient .* hook 'blocks.1.hook_resid_post'"),
    ):
        with_gradients(model, "blocks.1.hook_resid_post")(few.tokens)


def test_gradients_in_a_cache(source, tmp_path):
    wanted = list(source.batches("train", 3000, gradients=True))
    provenance = source.provenance("train", gradients=True)
    cache = ActivationCache.write(tmp_path / "g", iter(wanted), provenance, dtype="float32")
    assert ActivationCache.open(cache.path).gradients
    assert "cross-entropy" in cache.provenance["gradients"]
    assert cache.read(10, 20).gradients is None
    found = cache.read(0, 3000, gradients=True)
    assert torch.equal(found.gradients, torch.cat([batch.gradients for batch in wanted]))
    rows = next(cache_rows(cache, 0, True))
    assert rows.shape[1] == 2 * 256
    width = next(live_rows(source, True)).shape[1]
    assert width == 2 * 256
    assert next(cache_rows(cache, 0)).shape[1] == 256
    plain = ActivationCache.from_tensor(tmp_path / "plain", torch.randn(100, 4))
    with pytest.raises(SaekitError, match="holds no gradients; write one by `saekit cache --gradients`"):
        plain.read(0, 5, gradients=True)
    with pytest.raises(SaekitError, match=r"gradients of shape \[100, 3\] do not fit"):
        ActivationCache.from_tensor(tmp_path / "bad", torch.randn(100, 4), gradients=torch.randn(100, 3))
    nan = torch.randn(100, 4)
    nan[7, 2] = torch.nan
    with pytest.raises(SaekitError, match="NaN or inf in the gradients .* row 7"):
        ActivationCache.from_tensor(tmp_path / "nan", torch.randn(100, 4), gradients=nan)


def test_float16_caches_keep_small_gradients(tmp_path):
    gradients = torch.full((50, 4), 1e-9)
    cache = ActivationCache.from_tensor(tmp_path / "c", torch.randn(50, 4), gradients=gradients, dtype="float16")
    torch.testing.assert_close(cache.read(0, 50, gradients=True).gradients.float(), gradients, rtol=1e-2, atol=0)


def test_a_model_is_asked_once_whether_it_is_causal(source, monkeypatch):
    from saekit.activations import gradients

    model = load_model(device="cpu")
    asked = []
    ask = gradients._ask
    monkeypatch.setattr(gradients, "_ask", lambda model: asked.append(model) or ask(model))
    assert gradients.not_causal(model) is None
    assert gradients.not_causal(model) is None
    assert len(asked) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rounding_makes_no_model_look_ahead(dtype):
    assert not_causal(load_model(device="cpu", dtype=dtype)) is None
