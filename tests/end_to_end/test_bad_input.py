"""One line that names the mistake and the nearest right thing, exit code 2, nothing written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

import saekit
from saekit import SAEConfig, SparseAutoencoder
from saekit.activations import ActivationCache

EMBEDDED = Path(saekit.__file__).parent / "embedded"
TWO_HOOKS = "--hook blocks.0.hook_resid_post --hook blocks.1.hook_resid_post"
MISTAKES = {
    "unknown command": ("trian", "No such command 'trian'. Did you mean 'train'"),
    "unknown flag": ("train --widht 9", "No such option: --widht.*--width"),
    "no number": ("train --k many", "--k"),
    "unknown variant": ("train --variant mutual", "did you mean 'mutual_choice'"),
    "k above the width": ("train --k 65 --width 64", "k = 65 is larger than the width of 64"),
    "two widths": ("train --width 64 --expansion 4", "--width and --expansion both say"),
    "zero": ("train --tokens 0", "tokens = 0"),
    "negative": ("train --batch-size -4", "batch_size = -4"),
    "unknown model": ("train --model embeded", "unknown model 'embeded'.*did you mean 'embedded'"),
    "unknown hook": ("train --hook blocks.2.hook_resid_pots", "did you mean 'blocks.2.hook_resid_post'"),
    "one hook twice": (f"train {TWO_HOOKS} --hook blocks.0.hook_resid_post", "hook_resid_post' is named twice"),
    "unknown hook of two": ("train --hook hook_embed --hook blocks.1.hook_mlp_uot", "no hook 'blocks.1.hook_mlp_uot'"),
    "hooks into a full folder": (f"train {TWO_HOOKS} --out FULL", "holds something already.*--overwrite"),
    "layer too high": ("train --hook blocks.12.hook_resid_post", "blocks 0 to 3"),
    "long context": ("train --context-length 300", "300 tokens is longer than the 256"),
    "missing text": ("train --dataset nowhere.txt", "no text file matches 'nowhere.txt'"),
    "unknown column": ("train --dataset DATA.jsonl --column txt", "no column 'txt'; did you mean 'text'"),
    "empty text": ("train --dataset EMPTY.txt", "empty"),
    "missing cache": ("train --cache nowhere", "no activation cache at 'nowhere'"),
    "full folder": ("train --out FULL", "holds something already.*--overwrite"),
    "nothing to resume": ("train --resume --out FULL", "no run to resume"),
    "missing config": ("train --config nowhere.yaml", "cannot read 'nowhere.yaml': No such file"),
    "unknown setting": ("train --config WRONG.yaml", "unknown setting 'widht'; did you mean 'width'"),
    "full cache folder": ("cache --out FULL", "holds something already"),
    "unknown dtype": ("cache --out NEW --dtype bf16", "unknown dtype 'bf16'; did you mean 'bfloat16'"),
    "no dictionary": ("eval nowhere", "no dictionary at 'nowhere'"),
    "unknown origin": ("eval SAE", "does not say which model"),
    "wrong width": ("eval SAE --model embedded --hook blocks.1.hook_resid_post", "takes width 8, .* width 256"),
    "wrong hook": ("eval SAE --model embedded --hook blocks.1.hook_resid", "no hook 'blocks.1.hook_resid'"),
    "existing report": ("eval SAE --out DATA.jsonl", "exists already"),
    "one file for both reports": ("eval SAE --out NEW.json --html ./NEW.json", "--out and --html are the same file"),
    "NaN activations": ("train --cache NAN --batch-size 64 --tokens 640 --width 64 --k 2", "NaN or inf .* document 5"),
    "no such device": ("train --device cuda:7", "no device 'cuda:7'"),
    "unknown device": ("eval SAE --device gpu", "no device 'gpu'"),
    "huge seed": ("train --seed 99999999999", "seed = 99999999999"),
    "hook switched off": ("train --hook blocks.1.attn.hook_result", "switched off in this model"),
    "damaged text": ("train --dataset BAD.jsonl", "BAD.jsonl"),
    "no folder for the report": ("eval SAE --out nowhere/x.json", "no folder 'nowhere'"),
    "cache and model": ("eval SAE --cache NAN --model embedded", "not by --cache and --model"),
    "no gradients": ("train --variant gradient_topk --cache NAN --batch-size 64 --tokens 640", "holds no gradients"),
    "not causal": ("cache --gradients --model BERT --out NEW", "the model is not causal"),
    "not causal, live": ("train --variant gradient_topk --model BERT --tokens 640 --batch-size 64", "not causal"),
    "budgets too small": (
        "train --variant feature_choice --batch-size 16 --tokens 640 --width 64 --k 2",
        "32 matches cannot be shared among 64 features",
    ),
    "negative beta": ("train --variant gradient_topk --beta -1", "beta = -1"),
    "large pool": ("train --aux aux_k --k-aux 99 --width 64", "k_aux = 99 is larger than the width of 64"),
    "unknown loss": ("train --aux zipf", "unknown auxiliary loss 'zipf'; did you mean 'aux_zipf'"),
    "unknown format": ("convert SAE NEW --to sparsfy", "unknown format 'sparsfy'"),
    "full folder to convert into": ("convert SAE FULL", "holds something"),
    "unknown split": ("train --dataset SAVED --split tset", "no split 'tset'; did you mean 'test'"),
}


PROVED_FOR_REAL = {"unknown flag", "unknown setting", "not causal", "NaN activations"}  # in a process of their own


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What the commands find."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "FULL").mkdir()
    (folder / "FULL/mine.txt").write_text("precious")
    (folder / "EMPTY.txt").write_text("")
    (folder / "BAD.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    DatasetDict({"test": Dataset.from_dict({"text": ["some text"]})}).save_to_disk(str(folder / "SAVED"))
    (folder / "WRONG.yaml").write_text("widht: 9\n")
    (folder / "DATA.jsonl").write_text(json.dumps({"text": "some text"}) + "\n")
    SparseAutoencoder(SAEConfig(8, 16, "standard")).save(folder / "SAE")
    bert = BertConfig(vocab_size=4096, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    BertForMaskedLM(bert).save_pretrained(folder / "BERT")
    PreTrainedTokenizerFast.from_pretrained(EMBEDDED).save_pretrained(folder / "BERT")
    x = torch.randn(1000, 8)
    x[5] = torch.nan
    with pytest.MonkeyPatch.context() as patch:  # as somebody else's program might write it
        patch.setattr("saekit.activations.cache.check_finite", lambda *_: None)
        ActivationCache.from_tensor(folder / "NAN", x)
    return folder


@pytest.fixture
def place(made, tmp_path):
    """A copy of it, that a command runs in."""
    return Path(shutil.copytree(made, tmp_path / "place"))


def held(folder):
    """Each file's bytes, and the folders."""
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake, made, place, saekit_main, saekit_command):
    arguments, message = MISTAKES[mistake]
    run = saekit_command if mistake in PROVED_FOR_REAL else saekit_main
    done = run(*arguments.split(), cwd=place)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("saekit: ")
    assert re.search(message, lines[0]), lines[0]
    assert held(place) == held(made), "nothing is written, changed or removed"


def test_debug_shows_where(place, saekit_command):
    done = saekit_command("--debug", "train", "--variant", "mutual", cwd=place)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
