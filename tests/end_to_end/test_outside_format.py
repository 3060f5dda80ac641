"""A package outside saekit adds a format by one file: it is loaded, written, named, helped with and completed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import outside_format
import pytest
import torch

import saekit
from saekit import SAEConfig, SaekitError, SparseAutoencoder
from saekit.formats import FORMATS, format_of, save

HERE = Path(__file__).parent
TOPK = HERE.parent / "data/saelens_topk"
COMPLETE = """
import sys
from saekit.cli import main
try:
    main()
finally:
    assert not {"torch", "outside_format"} & sys.modules.keys()
"""


@pytest.fixture
def environment(tmp_path):
    """Of a process in which the package is installed, beside one that is broken."""
    site = tmp_path / "site"
    about = site / "outside-1.0.dist-info"
    about.mkdir(parents=True)
    shutil.copy(HERE / "outside_format.py", site)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    points = "[saekit.formats]\none_file = outside_format:FORMAT\nbroken = none:FORMAT\n"
    (about / "entry_points.txt").write_text(points)
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "400"}


@torch.no_grad()
def test_the_commands_know_a_format_of_another_package(environment, saekit_command, tmp_path):
    written = saekit_command("convert", TOPK, tmp_path / "theirs", "--to", "one_file", env=environment)
    assert written.returncode == 0, written.stderr
    assert [file.name for file in (tmp_path / "theirs").iterdir()] == ["one_file.safetensors"]
    assert "the format 'broken' cannot be loaded: No module named 'none'" in written.stderr

    told = saekit_command("info", tmp_path / "theirs", env=environment)
    assert json.loads(told.stdout)["format"] == "one_file", told.stderr
    back = saekit_command("convert", tmp_path / "theirs", tmp_path / "back", env=environment)
    assert back.returncode == 0, back.stderr
    first, again = saekit.load(TOPK), saekit.load(tmp_path / "back")
    assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))
    assert again.cfg.k == first.cfg.k

    refused = saekit_command(
        "convert", TOPK.parent / "saelens_jumprelu", tmp_path / "x", "--to", "one_file", env=environment
    )
    assert "has another rule than topk, which the format of one_file cannot hold; --lossy writes topk" in refused.stderr
    assert refused.returncode == 2
    refused = saekit_command("convert", TOPK, tmp_path / "theirs", "--overwrite", env=environment)
    assert "holds a dictionary of another format (one_file.safetensors)" in refused.stderr
    assert (
        "did you mean 'one_file'"
        in saekit_command("convert", TOPK, tmp_path / "x", "--to", "onefile", env=environment).stderr
    )


def test_help_and_completion_name_it_and_import_nothing(environment, saekit_command):
    page = saekit_command("convert", "--help", env=environment)
    assert "saelens, dictionary_learning, sparsify, one_file" in page.stdout
    line = {"_SAEKIT_COMPLETE": "complete_bash", "COMP_WORDS": "saekit convert a b --to o", "COMP_CWORD": "5"}
    done = subprocess.run(
        [sys.executable, "-c", COMPLETE], env={**environment, **line}, capture_output=True, text=True, timeout=600
    )
    assert (done.stdout.split(), done.stderr) == (["one_file"], "")


@torch.no_grad()
def test_a_format_is_registered_by_an_assignment(monkeypatch, tmp_path):
    sae = SparseAutoencoder(SAEConfig(6, 16, "topk", 2))
    with pytest.raises(SaekitError, match="unknown format 'one_file'"):
        save(sae, tmp_path / "x", "one_file")
    monkeypatch.setitem(FORMATS, "one_file", outside_format.FORMAT)
    assert FORMATS.writable()[-1] == "one_file"
    save(sae, tmp_path / "run/sae", "one_file")
    assert format_of(tmp_path / "run") == ("one_file", tmp_path / "run/sae/one_file.safetensors")
    assert saekit.load(tmp_path / "run/sae/one_file.safetensors").cfg == sae.cfg
    with pytest.raises(SaekitError, match="the format 'gemma_scope' is read, not written; choose from saelens, "):
        save(sae, tmp_path / "x", "gemma_scope")
