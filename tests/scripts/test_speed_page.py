"""Results of benchmarks: each kept under its own date, machine and commit, and the page is what they say."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "scripts/bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    for name in ("common", "page"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import common
    import page

    yield common, page
    for name in ("common", "page"):
        sys.modules.pop(name, None)


def test_results_lie_where_they_belong(bench):
    common, page = bench
    paths = sorted(common.RESULTS.rglob("*.json"))
    assert paths
    for path in paths:
        assert path.parent.name in page.HEADLINES
        assert path.name == common.file_name(json.loads(path.read_text()))


def test_the_page_is_what_the_results_say(bench):
    assert (ROOT / "docs/speed.md").read_text() == bench[1].page(), "run scripts/bench/page.py"


def test_a_new_result_leaves_the_old_ones_and_is_the_one_shown(bench, tmp_path, monkeypatch):
    common, page = bench
    old = common.history("growth")[-1]
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    common.save("growth", old, None)
    for date, peak in (("2030-02-01 09:00", 3), ("2030-01-01 09:00", 2)):
        new = copy.deepcopy(old)
        new["machine"]["date"] = date
        new["sizes"]["B"]["bf16_select"]["peak_bytes"] = peak * page.GIB
        common.save("growth", new, None)
    assert len(list((tmp_path / "growth").iterdir())) == 3
    (shown,) = page.latest("growth").values()
    assert shown["machine"]["date"] == "2030-02-01 09:00"
    short = [line for line in page.history_section()[-1].splitlines() if "GiB" in line]
    assert [("peak 3.00 GiB" in line, "peak 2.00 GiB" in line) for line in short[:2]] == [(True, False), (False, True)]


def test_an_accelerator_has_sections_of_its_own(bench, tmp_path, monkeypatch):
    common, page = bench
    old = common.history("step")[-1]
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    common.save("step", old, None)
    new = {**old, "device": "cuda", "machine": {**old["machine"], "accelerator": "Quick 9", "date": "2020-01-01 09:00"}}
    common.save("step", new, None)
    headings = [line for line in page.page().splitlines() if line.startswith("## ")]
    assert headings == ["## One step", "## One step: Quick 9", "## History"]
    assert "every other accelerator is unmeasured" not in page.page()
