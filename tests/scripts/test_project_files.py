"""Files that only others' machinery reads: what it would refuse there fails here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import saekit

ROOT = Path(__file__).parents[2]
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


def read(name: str | Path) -> dict:
    return yaml.load((ROOT / name).read_text(), Loader=yaml.BaseLoader)  # every scalar as it is written, `on` too


@pytest.mark.parametrize("form", [form for form in FORMS if form.name != "config.yml"], ids=lambda form: form.stem)
def test_issue_forms_are_ones(form):
    fields = read(form)
    assert {"name", "description", "body"} <= set(fields) <= {"name", "description", "title", "labels", "body"}
    ids = [part["id"] for part in fields["body"]]
    labels = [part["attributes"]["label"] for part in fields["body"]]
    assert len(set(ids)) == len(ids)
    assert len(set(labels)) == len(labels)
    for part in fields["body"]:
        assert part["type"] in ("textarea", "input", "dropdown")
        assert set(part) <= {"type", "id", "attributes", "validations"}
        assert ("options" in part["attributes"]) == (part["type"] == "dropdown")
        assert re.fullmatch("[a-z_-]+", part["id"])


def test_citation_names_this_version_and_these_authors():
    citation = read("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == saekit.__version__
    assert f'version = "{saekit.__version__}"' in (ROOT / "pyproject.toml").read_text()
    (author,) = citation["authors"]
    assert author["name"] in (ROOT / "LICENSE").read_text()


def test_ruff_before_a_commit_is_the_ruff_of_the_tests():
    (repo,) = read(".pre-commit-config.yaml")["repos"]
    assert f"ruff=={repo['rev'].removeprefix('v')}\n" in (ROOT / "scripts/constraints.txt").read_text()


def test_release_publishes_what_was_checked_and_holds_no_secret():
    text = (ROOT / ".github/workflows/release.yml").read_text()
    workflow = read(".github/workflows/release.yml")
    assert workflow["on"] == {"push": {"tags": ["v*"]}}
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    assert publish["needs"] == "build"
    assert publish["permissions"] == {"id-token": "write"}
    assert workflow["permissions"] == {"contents": "read"}
    assert "secrets." not in text
    assert all(("uses" in step) != ("run" in step) for job in (build, publish) for step in job["steps"])
    assert any("twine check" in step.get("run", "") for step in build["steps"])
