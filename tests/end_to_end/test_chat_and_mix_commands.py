"""Conversations and a mix of datasets, from the flags to cache, dictionary, report and card."""

from __future__ import annotations

import json
import shutil
import typing
from pathlib import Path

import pytest
import yaml
from repairs import assert_repaired

from saekit import embedded
from saekit.activations import ActivationCache, ActivationSource
from saekit.card import card

_SHORT = ["--context-length", 64, "--quiet"]
_RUN = ["--tokens", 2560, "--batch-size", 256, "--width", 64, "--k", 4, "--calibration-tokens", 300]
_RUN += ["--eval-tokens", 300, "--features-shown", 0]
_TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """The embedded model with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(Path(embedded.__file__).parent, folder)
    (folder / "chat_template.jinja").write_text(_TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """Conversations whose questions are numbers, and whose answers are blocks of Python source."""
    lines = Path(typing.__file__).read_text().splitlines(keepends=True)
    answers = ["".join(lines[start : start + 6]) for start in range(0, len(lines), 6)]
    path = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    with path.open("w") as file:
        for number, answer in enumerate(answers):
            messages = [{"role": "user", "content": f"{number} ?" * 4}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def test_conversations_are_trained_on_by_role(chat_model, talks, saekit_main, tmp_path):
    flags = ["--model", chat_model, "--dataset", talks, "--messages-column", "messages", "--train-on", "assistant"]
    done = saekit_main("cache", *flags, *_SHORT, "--tokens", 3000, "--out", tmp_path / "c")
    assert done.returncode == 0, done.stderr
    cache = ActivationCache.open(tmp_path / "c")
    facts = cache.provenance
    assert (facts["messages_column"], facts["train_on"], len(facts["chat_template"])) == ("messages", "assistant", 32)
    source = ActivationSource.open(str(chat_model), dataset=str(talks), messages_column="messages", context_length=64)
    text = source.model.tokenizer.decode(cache.read(0, 3000).tokens)
    assert "<|" not in text
    assert "def " in text
    everything = source.model.tokenizer.decode(next(source.contexts("train")).tokens.flatten())
    assert "<|user|>" in everything
    assert "<|end|>" in everything
    assert_repaired(saekit_main, tmp_path / "c")

    run = tmp_path / "run"
    done = saekit_main("train", *flags, *_SHORT, *_RUN, "--out", run)
    assert done.returncode == 0, done.stderr
    first = json.loads((run / "eval.json").read_text())
    assert first["about"]["train_on"] == "assistant"
    told = card(run)
    assert "| conversations | the column `messages` |" in told
    assert "| messages trained on | those of `assistant` |" in told
    done = saekit_main("eval", run, "--tokens", 300, "--out", tmp_path / "again.json", "--quiet")
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["reconstruction"] == first["reconstruction"], "by the same tokens, held out as they were"
    assert "changed since" not in done.stderr
    judged = shutil.copytree(run, tmp_path / "judged")
    (chat_model / "chat_template.jinja").write_text("Now: " + _TEMPLATE)
    try:
        shutil.rmtree(run / "sae")
        done = saekit_main("train", "--out", run, "--resume", "--quiet")
        assert "chat_template" in done.stderr
        done = saekit_main("eval", judged, "--tokens", 300, "--quiet")
        assert done.returncode == 0, done.stderr
        assert "the chat template changed since" in done.stderr
    finally:
        (chat_model / "chat_template.jinja").write_text(_TEMPLATE)


def test_what_conversations_need_is_told_before_training(talks, saekit_main, tmp_path):
    flags = ["--dataset", talks, "--messages-column", "messages", *_SHORT, *_RUN, "--out", tmp_path / "r"]
    done = saekit_main("train", *flags)
    assert done.returncode == 2
    assert "the tokenizer of 'embedded' has no chat template, which --messages-column needs" in done.stderr
    assert "--messages-column messages" in saekit_main("train", "--dataset", talks, "--out", tmp_path / "r").stderr
    assert not (tmp_path / "r").exists()


def test_conversations_without_messages_that_count_end(chat_model, saekit_main, tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = (
        {"messages": [{"role": "user", "content": f"{i} is the number of this question, is it not?"}]}
        for i in range(900)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", chat_model, "--dataset", path, "--messages-column", "messages", "--train-on", "assistant"]
    done = saekit_main("cache", *flags, *_SHORT, "--tokens", 500, "--out", tmp_path / "c")
    assert done.returncode == 2, done.stdout
    assert "counts" in done.stderr
    done = saekit_main("train", *flags, *_SHORT, *_RUN, "--out", tmp_path / "r")
    assert done.returncode == 2, done.stdout
    assert "counts" in done.stderr


def test_a_mix_is_told_everywhere(saekit_main, tmp_path):
    lines = Path(typing.__file__).read_text().splitlines()
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": " ".join(lines[i : i + 5])}) + "\n" for i in range(0, len(lines), 5)))
    run = tmp_path / "run"
    done = saekit_main("train", "--dataset", "python=3", "--dataset", f"{other}=1", *_SHORT, *_RUN, "--out", run)
    assert done.returncode == 0, done.stderr
    mix = f"python=3 + {other}=1"
    assert yaml.safe_load((run / "config.yaml").read_text())["dataset"] == mix
    about = json.loads((run / "eval.json").read_text())["about"]
    assert about["dataset"] == mix
    assert "tokens of 'python'" in about["shares"]
    told = card(run)
    assert "(75%) and `other.jsonl` (a local one) (25%)" in told
    assert str(tmp_path) not in told.split("## Use")[0]
    assert str(tmp_path) not in about["shares"]
    again = tmp_path / "again"
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"dataset": {"python": 3, str(other): 1}}, sort_keys=False))
    done = saekit_main("train", "--config", config, *_SHORT, *_RUN, "--out", again)
    assert done.returncode == 0, done.stderr
    file = "sae/sae_weights.safetensors"
    assert (run / file).read_bytes() == (again / file).read_bytes()
    done = saekit_main("eval", run, "--dataset", "python=1", "--tokens", 300, "--quiet")
    assert done.returncode == 2
    assert "a mix has two datasets or more" in done.stderr
    done = saekit_main("eval", run, "--tokens", 300, "--quiet", "--out", tmp_path / "e.json")
    assert json.loads((tmp_path / "e.json").read_text())["about"]["shares"] == about["shares"]
