"""What the command line says of itself, completes, and imports for that."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import saekit
from saekit.cli import app
from saekit.commands.flags import among
from saekit.commands.help import _EXAMPLES, _PANELS
from saekit.trainers.loggers import LOGGERS

COMMANDS = typer.main.get_command(app).commands  # as they are before anything is done to their texts
COMMANDS |= {
    f"{group} {name}": command for group in ("cache", "sweep") for name, command in COMMANDS[group].commands.items()
}


def words(text: str) -> str:
    """A help page without its boxes and line breaks."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # no text of a flag is broken, so that it can be looked for


@pytest.mark.parametrize("name", COMMANDS)
def test_a_page_shows_every_flag_and_all_of_its_text(name, wide, saekit_main, tmp_path):
    page = saekit_main(*name.split(), "--help", cwd=tmp_path)
    assert page.returncode == 0, page.stderr
    shown = words(page.stdout)
    for parameter in COMMANDS[name].params:
        for flag in (*parameter.opts, *parameter.secondary_opts):
            assert flag in shown
        if parameter.help:
            assert words(parameter.help) in shown, parameter.name  # with what stands in brackets
    for example in _EXAMPLES[name.split()[-1]]:
        assert example in shown
        assert example.startswith(f"saekit {name} ")
        flags = {flag for parameter in COMMANDS[name].params for flag in (*parameter.opts, *parameter.secondary_opts)}
        assert set(re.findall(r"--[a-z-]+", example)) <= flags


def test_the_first_page(wide, saekit_main, tmp_path):
    done = saekit_main("--help", cwd=tmp_path)
    for name in COMMANDS:
        assert name in done.stdout or " " in name
    assert all(example in done.stdout for example in _EXAMPLES["saekit"])
    assert saekit_main(cwd=tmp_path).stdout == done.stdout
    assert saekit_main("--version", cwd=tmp_path).stdout == f"saekit {saekit.__version__}\n"


def test_panels():
    for name, panels in _PANELS.items():
        shown = [parameter for names in panels.values() for parameter in names]
        known = {parameter.name for parameter in COMMANDS[name].params}
        assert len(shown) == len(set(shown))
        assert name == "eval" or set(shown) - known <= {"config"}, name
    panels = {parameter.rich_help_panel for parameter in COMMANDS["train"].params}
    assert panels == {"Data", "Dictionary", "Optimisation", "Run"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("saekit pu", ["push"]),
        ("saekit train --variant t", ["topk"]),
        ("saekit train --log ", [*LOGGERS, "none"]),
        ("saekit train --precision f", ["fp32"]),
        ("saekit eval --suite d", ["dark_matter"]),
        ("saekit eval --model-dtype b", ["bfloat16"]),
        ("saekit cache --dtype f", ["float32", "float16"]),
        ("saekit convert a b --to s", ["saelens", "sparsify"]),
    ],
)
def test_completion(line, expected, monkeypatch, saekit_main, tmp_path):
    done = line.split(" ")
    monkeypatch.setenv("_SAEKIT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(done) - 1))
    assert saekit_main(cwd=tmp_path).stdout.split() == expected


def test_what_is_completed_is_what_there_is():
    from saekit.formats import FORMATS

    (to,) = (parameter for parameter in COMMANDS["convert"].params if parameter.name == "to")
    context = typer.main.get_command(app).make_context("saekit", ["--help"], resilient_parsing=True)
    assert {item.value for item in to.shell_complete(context, "")} == {
        name for name in FORMATS if FORMATS[name].writable
    }
    assert among("ab", "ac", "b")("a") == ["ab", "ac"]


SCRIPT = """
import os, sys
from saekit import cli

def run(*arguments, **environment):
    os.environ.update(environment)
    sys.argv = ["saekit", *arguments]
    try:
        cli.main()
    except SystemExit as stop:
        assert not stop.code, stop.code

run("--help")
run("--version")
run("train", "--help")
run("eval", "--help")
run("cache", "verify", "--help")
run(_SAEKIT_COMPLETE="complete_bash", COMP_WORDS="saekit eval --suite d", COMP_CWORD="3")
run(_SAEKIT_COMPLETE="complete_bash", COMP_WORDS="saekit train --aux aux_z", COMP_CWORD="3")
heavy = {"torch", "numpy", "huggingface_hub", "yaml", "transformers", "datasets", "matplotlib"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()

import saekit
assert {"load", "splice", "SparseAutoencoder", "__version__"} <= set(dir(saekit))
assert "torch" not in sys.modules
from saekit.splicing import splice
assert saekit.splice is splice and "torch" in sys.modules
from saekit import *
assert load is saekit.load
try:
    saekit.nothing
except AttributeError as error:
    assert str(error) == "module 'saekit' has no attribute 'nothing'"
else:
    raise AssertionError
"""


def test_help_and_completion_import_no_torch():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("dark_matter\naux_zipf\n")


def test_the_readme_names_flags_that_there_are():
    text = (Path(__file__).parents[2] / "README.md").read_text()
    commands = re.findall(
        r"saekit (train|cache|eval|convert|push|info)\b(.*?)(?=\n\n|\n(?:saekit|torchrun)|`|#|\n```)", text, re.DOTALL
    )
    assert len(commands) > 8
    for name, rest in commands:
        flags = {flag for parameter in COMMANDS[name].params for flag in (*parameter.opts, *parameter.secondary_opts)}
        assert set(re.findall(r"--[a-z][a-z-]+", rest)) <= flags, rest
