"""The site: the checker of its links finds what is broken, and docstrings explain arguments that there are."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def checked(site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts/check_site.py", site]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_whole_site_passes(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "a b.png").touch()
    (tmp_path / "index.html").write_text(
        '<h1 id="top">x</h1><a href="below/page.html#here">y</a><img src="a%20b.png"><a href="#top">z</a>'
        '<a href="https://example.org/#nowhere">elsewhere, not asked</a><img src="data:image/gif;base64,R0lG">'
    )
    (tmp_path / "below/page.html").write_text('<p id="here"></p><a href="/index.html?q=1#top">up</a>')
    done = checked(tmp_path)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("markup", "told"),
    [
        ('<a href="gone.html">x</a>', "gone.html is not there"),
        ('<a href="#gone">x</a>', "#gone has no such anchor"),
        ('<img src="gone.png">', "gone.png is not there"),
        ('<script src="https://cdn.example.org/x.js"></script>', "loads https://cdn.example.org/x.js"),
        ('<link rel="stylesheet" href="//fonts.example.org/css">', "loads //fonts.example.org/css"),
    ],
)
def test_what_is_broken_is_named(tmp_path, markup, told):
    (tmp_path / "index.html").write_text(markup)
    done = checked(tmp_path)
    assert done.returncode == 1
    assert done.stdout.strip() == f"index.html: {told}"


def explained(docstring: str) -> Iterator[str]:
    """The names that the section ``Args`` of a docstring explains; one line may explain several."""
    _, _, arguments = docstring.partition("\nArgs:\n")
    for line in arguments.splitlines():
        if line and not line.startswith(" "):
            return
        if match := re.match(r"    (\*{0,2}\w+(?:, \*{0,2}\w+)*):", line):
            yield from (name.lstrip("*") for name in match[1].split(", "))


def test_docstrings_explain_arguments_that_there_are():
    wrong = []
    for path in (
        path for folder in ("saekit", "activations", "trainers", "evals") for path in (ROOT / folder).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                a = node.args
                there = {arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if arg}
                names = explained(inspect.cleandoc(ast.get_docstring(node) or ""))
                wrong += [f"{path.relative_to(ROOT)}: {node.name} has no {name}" for name in names if name not in there]
    assert not wrong
