"""Tokenizers without special tokens, and what TransformerLens installs for a multimodal model when it is let."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import families
import pytest
import torch
import transformers
from families import FAMILIES, VOCABULARY

from saekit.activations import ActivationSource, load_model
from saekit.activations.boot import text_alone, text_tokenizer
from saekit.errors import SaekitError, SaekitWarning
from saekit.no_installs import no_installs
from saekit.special_tokens import special_tokens


@pytest.fixture
def called(tmp_path, monkeypatch):
    """The file that is there once anything has called a stand-in for pip, uv, conda or ``python -m pip``."""
    home = tmp_path / "installers"
    home.mkdir()
    for key, value in families.write_installers(home).items():
        monkeypatch.setenv(key, value)
    return home / "called"


@pytest.mark.parametrize("rows", [VOCABULARY, VOCABULARY + 56])
def test_a_tokenizer_without_special_tokens(rows, saekit_main, tmp_path):
    """TransformerLens adds an EOS to it: one row too far, or one that nobody trained."""
    folder, text = tmp_path / "model", families.write_text(tmp_path / "text.jsonl")
    families.write_model(folder, replace(FAMILIES["llama"], special={}), rows)
    model = load_model(str(folder), device="cpu")
    assert special_tokens(model) == (None, None, None)
    assert len(text_tokenizer(model)) == VOCABULARY < len(model.tokenizer)
    source = ActivationSource.open(str(folder), None, str(text), context_length=16, loaded=model)
    assert not source.prepend_bos
    contexts = next(source.contexts("train"))
    assert int(contexts.tokens.max()) < VOCABULARY
    assert torch.equal(contexts.kept, (torch.arange(16) > 0).expand_as(contexts.kept))
    texts = iter(source.text.documents("train"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for number in range(4):  # documents are told apart by their numbers
        own = tokenizer(next(texts), add_special_tokens=False)["input_ids"]
        assert contexts.tokens.flatten()[contexts.documents.flatten() == number].tolist() == own
    done = saekit_main(
        "train", "--model", folder, "--dataset", text, "--context-length", 16, "--tokens", 2048, "--batch-size", 256,
        "--width", 64, "--k", 4, "--buffer", 1024, "--calibration-tokens", 256, "--eval-tokens", 400,
        "--features-shown", 8, "--out", tmp_path / "run", "--quiet",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/eval.json").read_text())["about"]["prepend_bos"] is False


def test_the_stand_ins_note_what_calls_them(called):
    for command in (
        ["pip", "install", "x"],
        ["uv", "pip", "install", "x"],
        [sys.executable, "-m", "pip", "install", "x"],
    ):
        assert subprocess.run(command).returncode == 1
    assert called.read_text().splitlines() == ["pip install x", "uv pip install x", "pip install x"]


@pytest.mark.parametrize("program", ["uv", "python -m pip"])
def test_transformer_lens_is_kept_from_installing_torchvision(program, called, tmp_path, monkeypatch):
    from transformer_lens.model_bridge import TransformerBridge

    if program != "uv":
        (called.parent / "uv").unlink()
        monkeypatch.setenv("PATH", str(called.parent))
    folder = tmp_path / "model"
    families.write_model(folder, FAMILIES["gemma3_multimodal"])
    monkeypatch.setitem(sys.modules, "torchvision", None)  # as where it is not installed
    with text_alone():
        assert TransformerBridge.boot_transformers(str(folder), device="cpu").processor is None
    assert not called.exists()
    with pytest.warns(SaekitWarning, match=r"refused: .*pip install torchvision -q$"), no_installs():
        TransformerBridge.boot_transformers(str(folder), device="cpu")
    assert not called.exists()
    TransformerBridge.boot_transformers(str(folder), device="cpu")  # by itself it does install
    assert "pip install torchvision -q" in " ".join(called.read_text().split())


def test_the_loader_of_processors_is_as_it_was_afterwards(tmp_path):
    before = transformers.AutoProcessor.from_pretrained
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SaekitError, match="cannot load and hook the model"):
        load_model(str(tmp_path))
    assert transformers.AutoProcessor.from_pretrained == before
