"""Text sources: parts that never overlap, local files of each kind, and mistakes that are named."""

from __future__ import annotations

import json

import pytest

from saekit import SaekitError
from saekit.activations import open_text, python_source
from saekit.activations.text import SPLITS, part_of


def test_the_parts_of_the_python_source_share_no_file_and_no_content():
    seen_names, seen_texts, sizes = set(), set(), {}
    for part in SPLITS:
        names, texts = zip(*python_source.documents(part), strict=True)
        assert seen_names.isdisjoint(names)
        assert seen_texts.isdisjoint(map(hash, texts))
        seen_names.update(names)
        seen_texts.update(map(hash, texts))
        sizes[part] = sum(map(len, texts))
    total = sum(sizes.values())
    assert total > 60e6, "the corpus should hold about 100 MB of source"
    assert sizes["heldout"] / total == pytest.approx(python_source.HELDOUT_SHARE, rel=0.25)
    assert not any("/tests/" in name or "encodings/" in name or "_vendor/" in name for name in seen_names)


def test_the_part_of_a_file_depends_on_its_name_alone():
    # frozen: the embedded model was trained on this division
    expected = {"stdlib/ast.py": "heldout", "stdlib/json/decoder.py": "train", "torch/nn/modules/linear.py": "train"}
    assert {name: python_source.split_of(name) for name in expected} == expected
    parts = [python_source.split_of(f"x{i}.py") for i in range(5000)]
    assert 300 < parts.count("heldout") < 500
    assert 60 < parts.count("calibration") < 140


def texts(n):
    return [f"Document number {i} says something about {i * i}.\nAnd more." for i in range(n)]


def rejoined(source):
    found = {part: list(source.documents(part)) for part in SPLITS}
    return found, [text for part in SPLITS for text in found[part]]


def test_jsonl_and_parquet(tmp_path):
    documents = texts(300)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": t, "n": 1}) + "\n" for t in documents))
    import pandas as pd

    pd.DataFrame({"body": documents}).to_parquet(tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        source = open_text(str(tmp_path / name), column="body")
        found, everything = rejoined(source)
        assert sorted(everything) == sorted(documents)
        assert all(part_of(text) == part for part, items in found.items() for text in items)
        assert found["heldout"]
        assert list(source.documents("train")) == found["train"], "the order is the same each time"


def test_folders_that_datasets_saved_or_reads(tmp_path):
    from datasets import Dataset, DatasetDict

    documents = texts(200)
    rows = Dataset.from_dict({"text": documents})
    rows.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": rows, "test": rows.select(range(5))}).save_to_disk(str(tmp_path / "dict"))
    (tmp_path / "plain").mkdir()
    rows.to_json(str(tmp_path / "plain/a.jsonl"))
    for name, options in (("one", {}), ("dict", {}), ("plain", {}), ("plain", {"streaming": False})):
        _, everything = rejoined(open_text(str(tmp_path / name), **options))
        assert sorted(everything) == sorted(documents), name
    assert len(rejoined(open_text(str(tmp_path / "dict"), split="test"))[1]) == 5


@pytest.fixture
def of_languages(tmp_path):
    """A folder with two configurations, which its card names."""
    folder = tmp_path / "languages"
    folder.mkdir()
    head = "configs:\n"
    for name in ("english", "french"):
        rows = [{"text": f"{name} {text}"} for text in texts(100)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        head += f"- config_name: {name}\n  data_files: {name}.jsonl\n"
    (folder / "README.md").write_text(f"---\n{head}---\n")
    return folder


def test_a_dataset_with_several_configurations(of_languages):
    named = {}
    for name in ("english", "french"):
        for streaming in (True, False):
            source = open_text(str(of_languages), dataset_config=name, streaming=streaming)
            _, everything = rejoined(source)
            assert sorted(everything) == sorted(f"{name} {text}" for text in texts(100))
        named[name] = source.fingerprint
    assert len(set(named.values())) == 2
    with pytest.raises(SaekitError, match="several configurations: --dataset-config NAME; it has english, french$"):
        open_text(str(of_languages))
    with pytest.raises(SaekitError, match="has no configuration 'frensh'; did you mean 'french'?"):
        open_text(str(of_languages), dataset_config="frensh")


def test_only_datasets_have_configurations(tmp_path):
    from datasets import Dataset

    (tmp_path / "a.txt").write_text("".join(texts(50)))
    Dataset.from_dict({"text": texts(9)}).save_to_disk(str(tmp_path / "saved"))
    for dataset in ("python", str(tmp_path / "a.txt"), str(tmp_path / "saved")):
        with pytest.raises(SaekitError, match=f"'{dataset}' has no configurations; leave --dataset-config x away"):
            open_text(dataset, dataset_config="x")


def test_lines_longer_than_a_block_are_cut(tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(f"word{i:05d}" for i in range(10_000)))
    found, everything = rejoined(open_text(str(tmp_path / "a.txt")))
    assert all(found.values())
    assert sum(map(len, everything)) == 10_000 * 10 - 1


def test_plain_text_is_cut_at_line_ends_and_nothing_is_lost(tmp_path):
    content = "\n".join(f"line {i} of a plain text file" for i in range(4000))
    (tmp_path / "a.txt").write_text(content)
    source = open_text(str(tmp_path / "a.txt"))
    found, everything = rejoined(source)
    assert all(found.values())
    assert sum(map(len, everything)) == len(content)
    assert all(block.startswith("line ") for block in everything)
    other = tmp_path / "b.txt"
    other.write_text(content + "!")
    assert open_text(str(other)).fingerprint != source.fingerprint


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("a.jsonl", '{"txet": "x"}\n', "text", "no column 'text'; did you mean 'txet'"),
        ("a.jsonl", '{"text": 3}\n', "text", "holds int in row 0, not text"),
        ("a.jsonl", "", "text", "empty|cannot open"),
        ("a.xlsx", "text\nx\n", "text", "not of one known kind"),
    ],
)
def test_mistakes_in_files_are_named(tmp_path, name, content, column, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(SaekitError, match=message):
        open_text(str(tmp_path / name), column=column)


def test_missing_text_is_named(tmp_path):
    with pytest.raises(SaekitError, match="no text file matches"):
        open_text(str(tmp_path / "nothing.txt"))
    with pytest.raises(SaekitError, match="cannot open the dataset 'pythn'.*did you mean 'python'"):
        open_text("pythn")


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(SaekitError, match="not UTF-8"):
        list(open_text(str(tmp_path / "a.txt")).documents("train"))
