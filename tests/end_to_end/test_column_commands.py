"""Token ids and groups of a dataset's columns, from the flag to the report and the card."""

from __future__ import annotations

import gzip
import json
import typing
from pathlib import Path

import pytest
from repairs import assert_repaired

from saekit.activations import ActivationCache
from saekit.activations.boot import text_tokenizer
from saekit.card import card

_SHORT = ["--context-length", 64, "--quiet"]
_RUN = ["--tokens", 2560, "--batch-size", 256, "--width", 64, "--k", 4, "--calibration-tokens", 300]
_RUN += ["--eval-tokens", 300, "--features-shown", 0]


@pytest.fixture
def rows(tmp_path, source):
    """A compressed file of blocks of Python source: their texts, their token ids, and what they belong to."""
    lines = Path(typing.__file__).read_text().splitlines(keepends=True)
    texts = ["".join(lines[start : start + 6]) for start in range(0, len(lines), 6)]
    tokenizer = text_tokenizer(source.model)
    found = [
        {"text": text, "ids": tokenizer(text, add_special_tokens=False)["input_ids"], "file": i % 150}
        for i, text in enumerate(texts)
    ]
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in found)
    return path


def test_they_are_kept_with_caches_and_dictionaries(rows, saekit_main, tmp_path):
    columns = ["--dataset", rows, "--tokens-column", "ids", "--group-column", "file", *_SHORT]
    done = saekit_main("cache", *columns, "--tokens", 4000, "--out", tmp_path / "c")
    assert done.returncode == 0, done.stderr
    cache = ActivationCache.open(tmp_path / "c")
    assert (cache.provenance["tokens_column"], cache.provenance["group_column"]) == ("ids", "file")
    assert_repaired(saekit_main, tmp_path / "c")

    run = tmp_path / "run"
    done = saekit_main("train", *columns, *_RUN, "--out", run)
    assert done.returncode == 0, done.stderr
    first = json.loads((run / "eval.json").read_text())
    assert (first["about"]["tokens_column"], first["about"]["group_column"]) == ("ids", "file")
    told = card(run)
    assert "| token ids | the column `ids` |" in told
    assert "| text divided by | the column `file` |" in told
    done = saekit_main("eval", run, "--tokens", 300, "--out", tmp_path / "again.json", "--quiet")
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["reconstruction"] == first["reconstruction"], "by the same ids, held out by the same groups"
    done = saekit_main("train", "--out", run, "--resume", "--group-column", "text", "--quiet")
    assert "group_column = file, not text" in done.stderr
    done = saekit_main("eval", run, "--dataset", rows, "--tokens", 300, "--quiet")
    assert "was trained on text that its column 'file' divides" in done.stderr


def test_token_ids_train_as_their_text_does(rows, saekit_main, tmp_path):
    """Divided by the same column, ids and text are the same data."""
    for name, more in (("text", []), ("ids", ["--tokens-column", "ids"])):
        asked = ["--dataset", rows, "--group-column", "file", "--pool", 0, *more, *_SHORT]
        done = saekit_main("cache", *asked, "--tokens", 2000, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
    text, ids = (ActivationCache.open(tmp_path / name) for name in ("text", "ids"))
    assert text.read(0, 2000).tokens.equal(ids.read(0, 2000).tokens)
    assert text.read(0, 2000).x.equal(ids.read(0, 2000).x)


def test_ids_beyond_the_vocabulary_are_refused(tmp_path, saekit_main):
    path = tmp_path / "ids.jsonl"
    path.write_text("".join(json.dumps({"ids": [1, 2, 10**6 if i == 7 else 3]}) + "\n" for i in range(20)))
    done = saekit_main("train", "--dataset", path, "--tokens-column", "ids", *_RUN, *_SHORT, "--out", tmp_path / "r")
    assert done.returncode == 2
    assert "holds the token id 1000000 in row 7, which is none of 0 to" in done.stderr
