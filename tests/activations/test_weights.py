"""A mix of datasets: its name, and its tokens by weights."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saekit.activations import open_text
from saekit.activations.mixing import Source, by_weight
from saekit.activations.mixture import mix, mixture_of
from saekit.activations.settings import SourceSettings
from saekit.activations.text import SPLITS
from saekit.errors import SaekitError
from saekit.evals.heldout import draw

_LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=30)


@pytest.mark.parametrize(
    ("name", "mix"),
    [
        ("python", []),
        ("owner/name", []),
        ("data/year=2024/*.txt", []),
        ("a=7 + b=3", [("a", 0.7), ("b", 0.3)]),
        ("a=1e308 + b=1e308", [("a", 0.5), ("b", 0.5)]),
        ("p + q.jsonl=0.5 + b = 0.5", [("p + q.jsonl", 0.5), ("b", 0.5)]),
        ("a + b", []),
        ("x=1/a.txt=1 + y=3", [("x=1/a.txt", 0.25), ("y", 0.75)]),
    ],
)
def test_names_and_mixes_are_told_apart(name, mix):
    assert mixture_of(name) == [(each, pytest.approx(part)) for each, part in mix]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a=0.7", "'a=0.7' has a weight; a mix has two datasets or more"),
        ("a=0.7 + b", "'b' in a mix of datasets has no weight above 0"),
        ("a=1e-320 + b=1e300", "the weight of 'a' is next to nothing"),
        ("a=1 + b=-1", "'b=-1' in a mix"),
        ("a=1 + b=nan", "'b=nan' in a mix"),
        ("a=1 + b=1 + a=2", "the dataset 'a' is in the mix twice"),
    ],
)
def test_a_mix_that_is_none_is_refused(name, message):
    with pytest.raises(SaekitError, match=message.replace("+", r"\+")):
        mixture_of(name)


def test_a_file_that_is_named_like_a_mix_stays_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a=0.7", "a=0.7 + b=0.3"):
        (tmp_path / name).write_text("x")
        assert mixture_of(name) == []


def test_settings_take_a_mapping_as_yaml_has_it():
    assert SourceSettings(dataset={"wiki": 0.123456789, "code": "3"}).dataset == "wiki=0.123456789 + code=3"
    for value in ({}, {"a": None, "b": 1}, {"a": True, "b": 1}, {"a": "x", "b": 1}, {"a": [1], "b": 1}):
        with pytest.raises(SaekitError, match="NAME=WEIGHT|NAME: WEIGHT"):
            SourceSettings(dataset=value)


def test_several_datasets_need_weights():
    assert mix(["a b.txt=1", "c=2"]) == "a b.txt=1 + c=2"
    assert mix(["a*.txt"]) == "a*.txt"
    with pytest.raises(
        SaekitError, match="'a\\*.txt' in a mix of datasets has no weight above 0; it is written as NAME"
    ):
        mix(["a*.txt", "b=1"])


@given(st.lists(st.tuples(st.floats(0.05, 1), _LENGTHS), min_size=2, max_size=4))
def test_every_text_has_its_part_of_the_tokens_at_any_place(kinds):
    total = math.fsum(weight for weight, _ in kinds)
    parts = [weight / total for weight, _ in kinds]
    texts = [
        Source(str(number), part, lambda number=number, lengths=lengths: iter(np.full(n, number) for n in lengths))
        for number, (part, (_, lengths)) in enumerate(zip(parts, kinds, strict=True))
    ]
    taken = np.zeros(len(kinds))
    told = []
    for document in by_weight(texts, lambda name, tokens: told.append((int(name), tokens))):
        taken[document[0]] += len(document)
        # each is ahead by no more than a document
        assert (taken <= taken.sum() * np.array(parts) + 51 * len(kinds)).all()
    assert (taken >= [sum(lengths) for _, lengths in kinds]).all(), "each text is gone through"
    assert all(tokens == sum(kinds[number][1]) for number, tokens in told)


def test_tokens_that_do_not_count_are_not_of_the_weights():
    asked = np.array([5, -6, -6, -6])
    found = list(
        by_weight([Source("a", 0.5, lambda: iter([asked] * 40)), Source("b", 0.5, lambda: iter([asked[:1]] * 40))])
    )
    assert abs(sum(len(each) == 4 for each in found) - sum(len(each) == 1 for each in found)) <= 1


@pytest.mark.parametrize("documents", [[], [np.empty(0, np.int64)], [np.array([-3])]])
def test_a_text_without_tokens_is_named(documents):
    texts = [
        Source("full", 0.5, lambda: iter([np.ones(3, np.int64)] * 2)),
        Source("void", 0.5, lambda: iter(documents)),
    ]
    with pytest.raises(SaekitError, match="'void', 50% of the mix, has no token that counts"):
        list(by_weight(texts))


def _files(folder, words):
    paths = []
    for name, word in words.items():
        paths.append(folder / f"{name}.jsonl")
        lines = (json.dumps({"text": f"{word} {i} " * 60}) for i in range(600))
        paths[-1].write_text("\n".join(lines) + "\n")
    return paths


def test_a_mix_is_trained_on_and_judged_by_its_weights(source, tmp_path):
    one, other = _files(tmp_path, {"one": "def", "other": "class"})
    mix = f"{one}=3 + {other}=1"
    text = open_text(mix)
    assert [share.part for share in text.shares] == [0.75, 0.25]
    assert text.fingerprint != open_text(f"{one}=1 + {other}=1").fingerprint
    assert sorted(d for part in SPLITS for d in text.documents(part)) == sorted(
        d for path in (one, other) for part in SPLITS for d in open_text(str(path)).documents(part)
    )
    mixed = replace(source, text=text, pool=20_000, context_length=64)

    def with_def(contexts):
        texts = source.model.tokenizer.batch_decode(contexts.tokens)
        return torch.tensor([text.count("def") > text.count("class") for text in texts])

    batches = list(islice(mixed.mixed("train", 32), 20))
    again = list(islice(mixed.mixed("train", 32), 20))
    assert all((a.tokens == b.tokens).all() for a, b in zip(batches, again, strict=True))
    share = [float(with_def(batch).float().mean()) for batch in batches]
    assert np.mean(share) == pytest.approx(0.75, abs=0.05)
    drawn = draw(mixed, 4000)
    kinds = with_def(drawn.contexts)
    kept = drawn.contexts.kept.sum(1).float()
    assert float(kept[kinds].sum() / kept.sum()) == pytest.approx(0.75, abs=0.02)
    assert "tokens of 'one.jsonl', " in drawn.about()["shares"]
    few = draw(mixed, 10_000_000)  # more than are held out: the weights hold for those that there are
    kinds = with_def(few.contexts)
    kept = few.contexts.kept.sum(1).float()
    assert float(kept[kinds].sum() / kept.sum()) == pytest.approx(0.75, abs=0.02)
    assert few.tokens > drawn.tokens


def test_a_text_that_lacks_a_part_is_named_before_training(source, tmp_path):
    (one,) = _files(tmp_path, {"one": "def"})
    few = tmp_path / "few.jsonl"
    few.write_text(json.dumps({"text": "a word " * 300}) + "\n")
    for name in (f"{one}=1 + {few}=1", f"{few}=1 + {one}=1"):
        with pytest.raises(SaekitError, match="the (train|calibration|heldout) part of .*few"):
            replace(source, text=open_text(name), context_length=64).check_parts()
    (tmp_path / "void.jsonl").write_text("")
    with pytest.raises(SaekitError, match="the dataset '.*void.jsonl' is empty"):
        open_text(f"{one}=1 + {tmp_path / 'void.jsonl'}=1")


def test_columns_and_configurations_are_of_texts_that_can_have_them(tmp_path):
    (one,) = _files(tmp_path, {"one": "def"})
    text = open_text(f"{one}=1 + python=1", group_column="text")
    assert text.facts["group_column"] == "text"
    plain = tmp_path / "plain.txt"
    plain.write_text("line\n" * 100)
    with pytest.raises(SaekitError, match="has no columns; leave --group-column text away"):
        open_text(f"{plain}=1 + python=1", group_column="text")
    with pytest.raises(SaekitError, match="no text file matches 'none.txt'"):
        open_text(f"{plain}=1 + none.txt=1")
