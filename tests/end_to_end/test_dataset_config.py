"""A dataset with several configurations, from the flag to whatever is made of it."""

from __future__ import annotations

import json
import typing
from pathlib import Path

import pytest
import yaml
from repairs import assert_repaired

from saekit.activations import ActivationCache


@pytest.fixture
def halves(tmp_path):
    """A folder of Python source in two configurations, which its card names."""
    lines = Path(typing.__file__).read_text().splitlines(keepends=True)
    blocks = ["".join(lines[start : start + 12]) for start in range(0, len(lines), 12)]
    (tmp_path / "halves").mkdir()
    head = []
    for number, name in enumerate(("first", "second")):
        rows = [{"text": block} for block in blocks[number::2]]
        (tmp_path / f"halves/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        head.append({"config_name": name, "data_files": f"{name}.jsonl"})
    (tmp_path / "halves/README.md").write_text(f"---\n{yaml.safe_dump({'configs': head})}---\n")
    return tmp_path / "halves"


def test_it_is_kept_with_caches_and_dictionaries(halves, saekit_main, tmp_path):
    text = ["--dataset", halves, "--context-length", 64, "--quiet"]
    done = saekit_main("cache", *text, "--tokens", 4000, "--out", tmp_path / "c")
    assert done.returncode == 2
    assert f"'{halves}' has several configurations: --dataset-config NAME; it has first, second" in done.stderr
    done = saekit_main("cache", *text, "--dataset-config", "secnd", "--tokens", 4000, "--out", tmp_path / "c")
    assert done.returncode == 2
    assert "has no configuration 'secnd'; did you mean 'second'?" in done.stderr

    chosen = [*text, "--dataset-config", "second"]
    done = saekit_main("cache", *chosen, "--tokens", 4000, "--out", tmp_path / "c")
    assert done.returncode == 0, done.stderr
    cache = ActivationCache.open(tmp_path / "c")
    assert cache.provenance["dataset_config"] == "second"
    assert_repaired(saekit_main, tmp_path / "c")

    run = tmp_path / "run"
    base = ["--tokens", 2560, "--batch-size", 256, "--width", 64, "--k", 4, "--calibration-tokens", 300]
    done = saekit_main("train", *chosen, *base, "--eval-tokens", 300, "--features-shown", 0, "--out", run)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "eval.json").read_text())["about"]["dataset_config"] == "second"
    done = saekit_main("train", "--out", run, "--resume", "--dataset-config", "first", "--quiet")
    assert "dataset_config = second, not first" in done.stderr
    done = saekit_main(
        "eval", run, "--dataset-config", "first", "--tokens", 300, "--out", tmp_path / "e.json", "--quiet"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "e.json").read_text())["about"]["dataset_config"] == "first"
    done = saekit_main("eval", run, "--dataset", "python", "--tokens", 300, "--quiet")
    assert done.returncode == 0, done.stderr
    done = saekit_main("convert", run, tmp_path / "s", "--lossy", "--dataset-config", "frst")
    assert "has no configuration 'frst'; did you mean 'first'?" in done.stderr
    done = saekit_main("convert", run, tmp_path / "s", "--lossy", "--tokens", 1024)
    assert done.returncode == 0, done.stderr
