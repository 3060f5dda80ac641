"""The table and the page of several runs: seeds together, the front marked."""

import json
import re

import pytest
import yaml

from saekit import SaekitError
from saekit.evals.sweep import page, points, rows_of


def made(home, name, settings, l0, fvu, ce, se=0.01):
    run = home / name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"out": str(run), "width": 64, **settings}, sort_keys=False))
    groups = {"about": {}, "sparsity": {"l0": l0, "l0_se": 0.1, "dead_share": 0.0}}
    groups |= {"reconstruction": {"fvu": fvu, "fvu_se": se}, "downstream": {"ce_increase": ce, "kl": 0.1}}
    (run / "eval.json").write_text(json.dumps(groups))


@pytest.fixture
def home(tmp_path):
    for k, fvu in ((16, 0.2), (32, 0.1)):
        for seed, more in ((0, -0.01), (1, 0.01)):
            made(tmp_path, f"m{k}{seed}", {"variant": "mutual_choice", "k": k, "seed": seed}, k, fvu + more, fvu / 2)
    made(tmp_path, "t16", {"variant": "topk", "k": 16, "seed": 0, "own": 3}, 16, 0.25, 0.05)
    made(tmp_path, "t32", {"variant": "topk", "k": 32, "seed": 0, "own": 4}, 33, 0.12, 0.2)
    return tmp_path


def test_seeds_are_one_point_with_their_spread(home):
    found = {(p.settings["variant"], p.settings["k"]): p for p in points(home)}
    assert list(found) == [("mutual_choice", 16), ("mutual_choice", 32), ("topk", 16), ("topk", 32)]
    both = found["mutual_choice", 16]
    assert len(both.runs) == 2
    assert both.figures["reconstruction.fvu"] == pytest.approx((0.2, 0.01))  # sd 0.0141 over √2
    assert found["topk", 16].figures["reconstruction.fvu"] == (0.25, 0.01), "of one run, over documents"
    assert set(both.settings) == {"variant", "k"}, "what only some have, and seeds, are no columns"


def test_the_front_is_what_nothing_beats(home):
    best = {(p.settings["variant"], p.settings["k"]): p.best for p in points(home)}
    assert best["mutual_choice", 16] == {"reconstruction.fvu"}
    assert best["mutual_choice", 32] == {"reconstruction.fvu"}
    assert best["topk", 16] == {"downstream.ce_increase"}
    assert best["topk", 32] == frozenset()


def test_what_is_shown(home):
    found = points(home)
    heads, rows = rows_of(found)
    assert heads == ["variant", "k", "runs", "L0", "FVU", "CE increase", "KL", "dead"]
    assert rows[0] == ["mutual_choice", "16", "2", "16.0 ± 0.0", "0.2000 ± 0.0100 *", "0.1000 ± 0.0000", *rows[0][6:]]
    text = page(found, "a <b>")
    assert "<h1>a &lt;b&gt;</h1>" in text
    assert text.count("<tr>") == 5
    assert len(re.findall("<svg", text)) == 1


def test_what_cannot_be_shown_is_said(tmp_path, home, saekit_main):
    (home / "empty").mkdir()
    with pytest.raises(SaekitError, match="no evaluated run below"):
        points(home / "empty")
    done = saekit_main("sweep", "show", home)
    assert done.returncode == 0, done.stderr
    assert "0.2000" in done.stdout
    assert (home / "sweep.html").is_file()
    taken = home / "mine.html"
    taken.write_text("mine")
    refused = saekit_main("sweep", "show", home, "--html", taken)
    assert (refused.returncode, taken.read_text()) == (2, "mine")
    assert "exists already; choose another --html" in refused.stderr
    (home / "t16/eval.json").write_text("[]")
    wrong = saekit_main("sweep", "show", home)
    assert wrong.returncode == 2
    assert "is no report" in wrong.stderr
