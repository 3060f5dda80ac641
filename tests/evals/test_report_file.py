"""A report's file: what is joined into it, and what is not taken for one."""

from __future__ import annotations

import json

import pytest

from saekit import SaekitError
from saekit.evals import Report
from saekit.evals.report import groups_in


@pytest.mark.parametrize("content", ["", "x", "[1, 2]", "{}", '{"about": []}', '{"about": null}', '{"about": "me"}'])
def test_what_is_no_report_is_left_as_it_is(content, tmp_path):
    path = tmp_path / "eval.json"
    path.write_text(content)
    for use in (groups_in, Report({"sparsity": {"l0": 1.0}}).join):
        with pytest.raises(SaekitError, match=r"eval.json' is no report of an evaluation; move it away"):
            use(path)
    assert path.read_text() == content


def test_groups_join_those_that_are_there(tmp_path):
    path = tmp_path / "eval.json"
    assert groups_in(path) == {}
    Report({"sparsity": {"l0": 1.0}}, {"d_in": 8}).join(path)
    Report({"dark_matter": {"l0": float("nan")}}, {"d_in": 8, "tokens": 5}).join(path)
    assert json.loads(path.read_text()) == groups_in(path)
    assert groups_in(path) == {
        "about": {"d_in": 8},
        "sparsity": {"l0": 1.0},
        "dark_matter": {"about": {"d_in": 8, "tokens": 5}, "l0": None},
    }
