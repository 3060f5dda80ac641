"""What rows hold: texts or token ids, divided by themselves or by a column."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saekit.activations import open_text
from saekit.activations.columns import Columns, part_of
from saekit.activations.settings import SourceSettings
from saekit.activations.text import SPLITS
from saekit.activations.token_store import stored
from saekit.errors import SaekitError

_IDS = st.lists(st.integers(0, 99), max_size=8)


@given(st.lists(_IDS, min_size=1, max_size=20))
def test_token_ids_are_the_documents_and_divide_themselves(rows):
    columns = Columns(tokens="ids", vocabulary=100)
    found = list(columns.documents("d", [{"ids": ids} for ids in rows])())
    assert [each.document.tolist() for each in found] == [ids for ids in rows if ids]
    assert all(each.document.dtype == np.int64 and each.part == part_of(each.document) for each in found)


@given(st.lists(st.tuples(st.text(min_size=1), st.integers(0, 30)), max_size=60))
def test_documents_of_one_group_are_in_one_part(rows):
    columns = Columns(group="author")
    parts: dict[int, set[str]] = {}
    found = list(columns.documents("d", [{"text": text, "author": group} for text, group in rows])())
    assert [each.document for each in found] == [text for text, _ in rows]
    for (_, group), each in zip(rows, found, strict=True):
        parts.setdefault(group, set()).add(each.part)
    assert all(len(each) == 1 for each in parts.values())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "the column 'author' of 'd' holds nothing in row 1"),
        (float("nan"), "holds nothing in row 1"),
        ("", "holds nothing in row 1"),
        (["a"], "holds list in row 1, not one value"),
    ],
)
def test_a_group_that_is_missing_is_refused_by_its_row(value, message):
    rows = [{"text": "a", "author": "x"}, {"text": "b", "author": value}]
    with pytest.raises(SaekitError, match=message):
        list(Columns(group="author").documents("d", rows)())


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([3, 100], "the token id 100 in row 1, which is none of 0 to 99"),
        ([-1], "the token id -1 in row 1"),
        ([1, None], "a list with None in row 1"),
        ([1.5], "a list with 1.5 in row 1"),
        ([True], "a list with True in row 1"),
        ("text", "holds str in row 1, not lists of token ids"),
    ],
)
def test_what_is_no_token_of_the_model_is_refused_by_its_row(ids, message):
    with pytest.raises(SaekitError, match=message):
        list(Columns(tokens="ids", vocabulary=100).documents("d", [{"ids": [1]}, {"ids": ids}])())


def test_columns_of_what_has_none_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text\n" * 100)
    for dataset in ("python", str(tmp_path / "a.txt")):
        with pytest.raises(SaekitError, match="has no columns; leave --tokens-column ids away"):
            open_text(dataset, tokens_column="ids")
        with pytest.raises(SaekitError, match="has no columns; leave --group-column author away"):
            open_text(dataset, group_column="author")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x", "author": "y"}) + "\n")
    with pytest.raises(SaekitError, match="no column 'auther'; did you mean 'author'"):
        open_text(str(tmp_path / "a.jsonl"), group_column="auther")
    with pytest.raises(SaekitError, match="from one column, --column body or --tokens-column ids"):
        SourceSettings(column="body", tokens_column="ids")


def test_shuffled_groups_are_divided_alike(tmp_path):
    lines = [json.dumps({"text": f"document {i}", "author": i % 40}) for i in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source = open_text(str(tmp_path / "a.jsonl"), group_column="author")
    other = source.shuffled(3)
    found = {part: list(source.documents(part)) for part in SPLITS}
    assert sum(map(len, found.values())) == 400
    for part in SPLITS:
        assert sorted(other.documents(part)) == sorted(found[part])
    authors = [{int(text.split()[1]) % 40 for text in texts} for texts in found.values()]
    assert sum(map(len, authors)) == 40, "no author is on two sides"


def test_ids_that_are_kept_are_those_of_a_vocabulary(source, tmp_path, monkeypatch):
    """A smaller vocabulary reads none that were kept for a larger one."""
    monkeypatch.setenv("SAEKIT_TOKENS", str(tmp_path / "tokens"))
    tokenizer = source.model.tokenizer
    path = tmp_path / "ids.jsonl"
    path.write_text("".join(json.dumps({"ids": [1, 2, 90 + i]}) + "\n" for i in range(10)))

    def ids(vocabulary):
        documents = open_text(str(path), tokens_column="ids").bounded(vocabulary).documents
        return [each.tolist() for part in SPLITS for each in stored([*documents.key, part], documents(part), tokenizer)]

    assert sorted(ids(100)) == sorted(ids(100)) == [[1, 2, 90 + i] for i in range(10)]
    with pytest.raises(SaekitError, match="the token id 95 in row 5, which is none of 0 to 94"):
        ids(95)
