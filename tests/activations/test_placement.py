"""Where models lie and in which numbers; cards are made up here, as far as a processor can stand in for one."""

from __future__ import annotations

import importlib.util
import re
from types import SimpleNamespace

import pytest
import torch
import transformers

from saekit import SaekitError
from saekit.activations import ActivationSource, SourceSettings, harvest, load_model
from saekit.activations.gradients import with_gradients
from saekit.activations.manifest import first_change
from saekit.activations.passes import that_fit
from saekit.activations.placement import device_of, fastest_dtype, quantization_of
from saekit.activations.settings import StreamSettings
from saekit.evals.saved import Evaluator


def test_auto_is_float32_but_on_cards_that_have_bfloat16(monkeypatch):
    assert fastest_dtype("cpu") == fastest_dtype(None) == fastest_dtype("mps") == "float32"
    monkeypatch.setattr(torch.cuda, "device", lambda card: torch.no_grad())
    for has in (True, False):
        monkeypatch.setattr("saekit.activations.placement.has_fast_bfloat16", lambda device, has=has: has)
        assert fastest_dtype("cuda:1") == ("bfloat16" if has else "float32")
        assert fastest_dtype("cpu") == "float32"


def test_what_auto_was_is_written_down(source):
    opened = ActivationSource.of(SourceSettings(), loaded=source.model)
    assert opened.provenance("train")["model_dtype"] == "float32"
    assert opened.provenance("train")["model_quantization"] == "none"
    assert "harvest_batch" not in opened.provenance("train"), "on a CPU it is what it always was"


def test_two_places_for_one_model_are_refused():
    with pytest.raises(SaekitError, match="--model-device and --model-device-map both say"):
        SourceSettings(model_device="cpu", model_device_map="auto")
    with pytest.raises(SaekitError, match="unknown device 'cdua:1'; did you mean 'cuda'"):
        SourceSettings(model_device="cdua:1")
    with pytest.raises(SaekitError, match="this machine has no device 'cuda:7'"):
        ActivationSource.of(SourceSettings(model_device="cuda:7"))


@pytest.mark.parametrize("missing", ["accelerate", "bitsandbytes"])
def test_a_missing_package_is_named(missing, monkeypatch, saekit_main, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr("saekit.activations.placement.find_spec", lambda name: None if name == missing else found(name))
    flag = ["--model-quantization", "4bit"] if missing == "bitsandbytes" else ["--model-device-map", "auto"]
    done = saekit_main("cache", "--out", tmp_path / "c", "--tokens", 1000, *flag)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"which is not installed: pip install {missing}" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_model_of_which_half_is_not_in_memory_gives_the_same(source, contexts):
    layers = {f"model.layers.{i}": "disk" if i % 2 == 0 else "cpu" for i in range(4)}
    others = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    model = load_model(device_map={**others, **layers})
    assert {each.device.type for each in model.parameters()} == {"cpu", "meta"}
    assert device_of(model) == torch.device("cpu")
    few = [contexts.rows(0, 4)]
    for hook in ("blocks.1.hook_resid_post", "blocks.3.hook_mlp_out"):
        (found,), (plain,) = harvest(model, hook, few), harvest(source.model, hook, few)
        assert torch.equal(found.x, plain.x)
    x, gradient = with_gradients(model, "blocks.1.hook_resid_post")(few[0].tokens)
    y, expected = with_gradients(source.model, "blocks.1.hook_resid_post")(few[0].tokens)
    torch.testing.assert_close(x, y, rtol=0, atol=1e-5 * float(y.abs().max()))
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_a_device_map_of_one_device_is_that_device(source, contexts):
    opened = ActivationSource.of(SourceSettings(model_device_map="auto"))
    (found,) = harvest(opened.model, source.hook, [contexts.rows(0, 2)])
    (plain,) = harvest(source.model, source.hook, [contexts.rows(0, 2)])
    assert torch.equal(found.x, plain.x)


@pytest.fixture
def quantiser(monkeypatch):
    """bitsandbytes as if it were there: what transformers is asked for, and a model that may not be moved."""
    asked = []
    load = transformers.AutoModelForCausalLM.from_pretrained

    def from_pretrained(place, *, quantization_config=None, device_map=None, **how):
        if quantization_config is None:
            return load(place, **how)
        asked.append((quantization_config, device_map, how))
        network = load(place, **how)

        def to(*_, **__):
            raise ValueError("`.to` is not supported for quantised models")

        network.to = to
        return network

    monkeypatch.setattr("saekit.activations.placement.find_spec", lambda name: object())
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(transformers, "BitsAndBytesConfig", lambda **given: SimpleNamespace(**given))
    return asked


def test_a_quantised_model_is_asked_for_known_again_and_judged_alike(quantiser, source, contexts, tmp_path):
    opened = ActivationSource.of(SourceSettings(model_quantization="4bit", model_dtype="bfloat16"), device="cpu")
    ((config, layout, how),) = quantiser
    assert (config.load_in_4bit, config.bnb_4bit_quant_type) == (True, "nf4")
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert (layout, how["dtype"], how["attn_implementation"]) == ({"": "cpu"}, torch.bfloat16, "eager")
    next(harvest(opened.model, opened.hook, [contexts.rows(0, 1)]))

    facts = opened.provenance("train")
    assert (quantization_of(opened.model), facts["model_quantization"]) == ("4bit", "4bit")
    assert first_change(facts, source.provenance("train")) is not None
    assert first_change({**source.provenance("train"), "model_quantization": "4bit"}, source.provenance("train"))
    old = {key: value for key, value in source.provenance("train").items() if key != "model_quantization"}
    assert first_change(old, source.provenance("train")) is None, "caches of before"
    again = StreamSettings.of(facts)
    assert (again.model_quantization, again.model_dtype, again.harvest_batch) == ("4bit", "bfloat16", 0)

    from saekit.sae import SAEConfig, SparseAutoencoder

    saekit = {"saekit": {"provenance": {"model_quantization": "4bit", "model_dtype": "float32"}}}
    told = {"model_name": "embedded", "hook_name": opened.hook, "prepend_bos": opened.prepend_bos, **saekit}
    sae = SparseAutoencoder(SAEConfig(256, 8, "topk", k=2, metadata=told))
    assert quantization_of(Evaluator().source_of(sae, "x").model) == "4bit"
    assert len(quantiser) == 2
    assert quantization_of(Evaluator(model_quantization="none").source_of(sae, "x").model) == "none"
    assert len(quantiser) == 2


def test_weights_that_are_not_changed_are_not_processed():
    with pytest.raises(SaekitError, match="fold_ln cannot be had with 8bit weights"):
        load_model(quantization="8bit", processing=["fold_ln"])
    with pytest.raises(SaekitError, match=re.escape("unknown quantization '8bits'; did you mean '8bit' or '4bit'?")):
        load_model(quantization="8bits")


def test_passes_are_doubled_while_half_of_the_free_memory_holds_them(monkeypatch):
    card, now, peak = torch.device("cuda:0"), 1000, 0

    def run(tokens):
        nonlocal peak
        if now + 10 * tokens.numel() > 10_000:
            raise torch.cuda.OutOfMemoryError("full")
        peak = now + 10 * tokens.numel()
        return [tokens]

    made_up = {
        "mem_get_info": lambda card: (9000, 10_000),
        "memory_reserved": lambda card: now,
        "memory_allocated": lambda card: now,
        "max_memory_allocated": lambda card: peak,
        "reset_peak_memory_stats": lambda card: None,
        "empty_cache": lambda: None,
    }
    for name, stand_in in made_up.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    assert that_fit(run, [card], 16) == 16, "16 contexts take 2,560 of 9,000 bytes; 32 would take more than half"
    assert that_fit(run, [card], 500) == 1
