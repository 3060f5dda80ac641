"""A text is tokenised once; whatever is on the disk, the ids are the tokenizer's."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saekit.activations import ActivationSource, token_store
from saekit.activations.token_store import kept, stored, token_folder
from saekit.errors import SaekitError, SaekitWarning


class Counting:
    """Each character is a token; remembers how many texts it was given."""

    def __init__(self):
        self.texts = 0

    def __call__(self, texts, **_):
        self.texts += len([texts] if isinstance(texts, str) else texts)
        if isinstance(texts, str):
            return {"input_ids": [ord(c) for c in texts]}
        return {"input_ids": [[ord(c) for c in text] for text in texts]}

    def get_vocab(self):
        return {chr(i): i for i in range(97, 123)}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SAEKIT_TOKENS", str(tmp_path / "tokens"))
    monkeypatch.setattr(token_store, "_FIRST", 500)  # so that few documents make several files
    return tmp_path / "tokens"


def texts(n):
    return ["".join(chr(97 + (i * j) % 26) for j in range(i % 23)) for i in range(n)]


def read(n, key="text", until=None):
    """The ids as lists, and how many texts the tokenizer was given for them."""
    tokenizer, found = Counting(), []
    for ids in stored([key], iter(texts(n)), tokenizer):
        found.append(ids.tolist())
        if len(found) == until:
            break
    return found, tokenizer.texts - 1  # a probe tells tokenizers apart


def wanted(n):
    return [[ord(c) for c in text] for text in texts(n)]


def test_the_second_time_nothing_is_tokenised(home):
    assert read(400) == (wanted(400), 400)
    assert len(list(next(iter(kept(home))).glob("*.safetensors"))) > 3
    assert read(400) == (wanted(400), 0)
    assert read(400, "another text")[1] == 400


def test_the_documents_are_not_even_read():
    read(400)

    def unread():
        raise AssertionError
        yield ""

    tokenizer = Counting()
    ids = stored(["text"], unread(), tokenizer)
    assert [next(ids).tolist() for _ in range(400)] == wanted(400)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 400), max_size=4), st.integers(0, 400))
def test_stopped_anywhere_it_goes_on_from_there(stops, last):
    shutil.rmtree(token_folder(), ignore_errors=True)
    for stop in stops:
        assert read(400, until=stop)[0] == wanted(400)[:stop]
    found, count = read(400)
    assert found == wanted(400)
    assert count <= 400 - max([0, *(stop - 150 for stop in stops)]), "no more than a file or so is done again"


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "empty"])
def test_a_damaged_file_is_made_anew(home, damage):
    read(400)
    file = sorted(home.glob("*/*.safetensors"))[1]
    content = file.read_bytes()
    if damage == "flipped":
        content = b"\xff" + content[1:]
    file.write_bytes({"cut": content[: len(content) // 2], "foreign": b"{}", "empty": b""}.get(damage, content))
    assert read(400)[0] == wanted(400)
    assert read(400) == (wanted(400), 0)


def test_what_was_used_longest_ago_makes_room(home, monkeypatch):
    for number, key in enumerate("abc"):
        read(400, key)
        os.utime(max(kept(home), key=lambda each: each.stat().st_mtime_ns), (number, number))
    (first, second, _), size = kept(home), max(kept(home).values())
    monkeypatch.setenv("SAEKIT_TOKENS_GB", str(3.2 * size / 1e9))
    read(400, "a")  # used again
    assert read(400, "d") == (wanted(400), 400)
    assert first.is_dir()
    assert not second.is_dir()
    assert sum(kept(home).values()) <= 3.2 * size
    monkeypatch.setenv("SAEKIT_TOKENS_GB", "1e-7")
    assert read(400, "e") == (wanted(400), 400) == read(400, "e"), "too little for one: it is not kept"
    monkeypatch.setenv("SAEKIT_TOKENS_GB", "much")
    with pytest.raises(SaekitError, match="SAEKIT_TOKENS_GB = 'much' is no number"):
        read(400, "f")


def test_where_nothing_can_be_written_the_run_goes_on(home):
    home.parent.mkdir(exist_ok=True)
    home.write_text("a file stands where the folder would be")
    with pytest.warns(SaekitWarning, match="token ids are not kept"):
        assert read(400) == (wanted(400), 400)


def test_off(home, monkeypatch):
    monkeypatch.setenv("SAEKIT_TOKENS", "off")
    assert read(70)[0] == wanted(70)
    assert not home.exists()


def test_without_a_home_none_are_kept(monkeypatch):
    monkeypatch.delenv("SAEKIT_TOKENS")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", lambda self: (_ for _ in ()).throw(RuntimeError("no home")))
    assert token_folder() is None
    assert read(70)[0] == wanted(70)


def test_a_source_uses_it_and_one_with_other_documents_does_not(source, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"one two three {number}\n" for number in range(3000)))
    opened = ActivationSource.open(dataset=str(path), context_length=32, loaded=source.model)
    plain = [batch.tokens.numpy() for batch in opened.contexts("train")]
    assert len(kept(token_folder())) == 1
    again = [batch.tokens.numpy() for batch in opened.contexts("train")]
    assert all(np.array_equal(*pair) for pair in zip(plain, again, strict=True))
    path.write_text(path.read_text().replace("three", "seven"))
    changed = ActivationSource.open(dataset=str(path), context_length=32, loaded=source.model)
    other = [batch.tokens.numpy() for batch in changed.contexts("train")]
    assert not np.array_equal(other[0], plain[0])
    assert len(kept(token_folder())) == 2
