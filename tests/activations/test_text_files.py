"""Local files of every kind, compressed or not, hold the same text."""

from __future__ import annotations

import csv
import gzip
import json

import pytest
import zstandard

from saekit.activations import open_text
from saekit.activations.text import SPLITS
from saekit.errors import SaekitError

TEXTS = [f'line {i}, "quoted"\nand\ta second' for i in range(200)] + ["123", "NA", "null", "01"]


def _table(path, opener, delimiter):
    with opener(path, "wt", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([["number", "text"], *([str(i), text] for i, text in enumerate(TEXTS))])


def _lines(path, opener):
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS)


@pytest.mark.parametrize(
    "name", ["a.csv", "a.csv.gz", "a.tsv", "a.tsv.gz", "a.tsv.zst", "a.jsonl", "a.jsonl.gz", "a.JSON.GZ", "a.jsonl.zst"]
)
def test_tables_and_compressed_files_hold_their_texts_as_they_are(tmp_path, name):
    opener = {"gz": gzip.open, "zst": zstandard.open}.get(name.lower().rsplit(".", 1)[1], open)
    if "sv" in name:
        _table(tmp_path / name, opener, "\t" if "tsv" in name else ",")
    else:
        _lines(tmp_path / name, opener)
    source = open_text(str(tmp_path / name))
    assert sorted(text for part in SPLITS for text in source.documents(part)) == sorted(TEXTS)


def test_compressed_plain_text_has_the_same_blocks(tmp_path):
    text = "".join(f"line number {i} of a text\n" for i in range(3000))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(text.encode()))
    plain, *packed = (open_text(str(tmp_path / name)) for name in ("a.txt", "a.txt.gz", "a.txt.zst"))
    for each in packed:
        assert plain.fingerprint != each.fingerprint, "of the bytes"
        for part in SPLITS:
            assert list(plain.documents(part)) == list(each.documents(part)) != []


def test_compressed_files_that_are_cut_short_are_named(tmp_path):
    whole = gzip.compress("".join(f"line {i * i}\n" for i in range(3000)).encode())
    (tmp_path / "a.txt.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SaekitError, match="cannot read '.*a.txt.gz': Compressed file ended"):
        list(open_text(str(tmp_path / "a.txt.gz")).documents("train"))
    noise = "".join(f"{i * i * 7919 % 10007}\n" for i in range(90_000)).encode()
    whole = zstandard.compress(noise) + zstandard.compress(b"a second frame\n")
    for cut in (len(whole) // 3, len(whole) - 3):
        (tmp_path / "a.txt.zst").write_bytes(whole[:cut])
        with pytest.raises(SaekitError, match="cannot read '.*a.txt.zst': .* cut short"):
            open_text(str(tmp_path / "a.txt.zst"))
    (tmp_path / "a.txt.zst").write_bytes(whole)
    assert any(
        "a second frame" in text for part in SPLITS for text in open_text(str(tmp_path / "a.txt.zst")).documents(part)
    )
    for name in ("b.jsonl.gz", "b.jsonl.zst", "c.txt.zst"):
        (tmp_path / name).write_bytes(b"no such thing")
        with pytest.raises(SaekitError, match=name):
            list(open_text(str(tmp_path / name)).documents("train"))


def test_zstandard_is_asked_for_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("saekit.activations.text_files.find_spec", lambda name: None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    with pytest.raises(SaekitError, match="needs the package zstandard, which is not there: pip install zstandard"):
        open_text(str(tmp_path / "a.jsonl.zst"))
    (tmp_path / "a.parquet.gz").write_bytes(b"x")
    with pytest.raises(SaekitError, match="not of one known kind"):
        open_text(str(tmp_path / "a.parquet.gz"))
