"""The report as a browser shows it, and when the commands write it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

import saekit
from saekit import SAEConfig, SparseAutoencoder
from saekit.activations import ActivationCache
from saekit.evals import evaluate, features, html
from saekit.evals.html import Subject, overview, write_report
from saekit.evals.html.page import page
from saekit.files import WriteError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = '</script><img src=x onerror="window.hacked=1"><script>window.hacked=1</script>&lt;b&gt;'


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def shown(browser):
    """Open a file; at the end nothing but it was asked for, and nothing was said on the console."""
    said, asked, contexts = [], [], []

    def show(path: Path, at: str = "", **settings):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **settings})
        context.set_default_timeout(600_000)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("dialog", lambda dialog: (said.append("dialog"), dialog.dismiss()))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(f"{path.as_uri()}{at}")
        return tab

    yield show
    for context in contexts:
        context.close()
    assert not said
    assert {url.partition("#")[0].rpartition("/")[2] for url in asked} <= {"report.html"}


@pytest.fixture(scope="module")
def study(source, contexts):
    """Of a random dictionary of 4,096 features on a few thousand tokens."""
    torch.manual_seed(0)
    sae = SparseAutoencoder(SAEConfig(256, 4096, "topk", k=32)).requires_grad_(False).eval()
    sae.W_enc.normal_()
    sae.W_dec.normal_()
    sae.b_enc[100] = -1e6  # never fires
    sae.with_metadata(model_name="embedded", hook_name=source.hook, dataset_path="python")
    return features.study_features(sae, source.model, contexts.rows(0, 12))


@pytest.fixture(scope="module")
def wide(study, tmp_path_factory):
    path = tmp_path_factory.mktemp("wide") / "report.html"
    assert write_report(path, [Subject("wide", study.sae)], study) == path.stat().st_size < 12 << 20
    return path


def rows(tab):
    return [line.split("\n")[0] for line in tab.locator(".rows .row").all_inner_texts()]


class TestInTheBrowser:
    def test_a_run_s_figures_curves_and_tables(self, trained_run, shown):
        tab = shown(trained_run / "report.html")
        report = json.loads((trained_run / "eval.json").read_text())
        said = dict(zip(tab.locator("dt").all_inner_texts(), tab.locator("dd.value").all_inner_texts(), strict=True))
        assert [*said] == ["FVU", "L0", "Recovered", "Dead"]
        assert said["FVU"] == f"{report['reconstruction']['fvu']:.4f}"
        assert said["Recovered"] == f"{report['downstream']['recovered_share']:.4f}"
        assert tab.locator("h1").inner_text() == "1,024 features · mutual choice · k = 16"
        assert f"{report['sparsity']['tokens']:,} held-out tokens" in tab.locator(".lead").first.inner_text()
        titles = tab.locator("#overview .chart .title").all_inner_texts()
        assert titles == ["FVU", "L0", "Dead", "Density by rank", "L0 of a token"]
        assert tab.locator("#overview svg path.line").count() == 4
        assert tab.locator("#overview svg path.dash").count() == 1  # the fitted law
        assert {*tab.locator("caption").all_inner_texts()} == {"Sparsity", "Reconstruction", "Downstream"}
        assert f"{report['downstream']['kl']:.4f}" in tab.locator(".figures").nth(2).inner_text()

    def test_4096_features_open_at_once(self, wide, shown):
        tab = shown(wide, "#features")
        tab.locator(".rows .row").first.wait_for()
        took = tab.evaluate("performance.now()")
        assert took < 2000
        assert tab.locator(".count").inner_text() == "4,096 features"
        assert tab.locator(".rows .row").count() < 100  # only those that are seen

    def test_sorted_by_each_column(self, wide, study, shown):
        tab = shown(wide, "#features")
        densest = study.density.sort(descending=True).values
        first = rows(tab)[:10]
        assert [study.fired(int(j)) for j in first] == [round(float(d) * study.tokens) for d in densest[:10]]
        tab.get_by_role("button", name="sort by density").click()  # again: the other way round
        assert study.fired(int(rows(tab)[0])) == 0
        tab.get_by_role("button", name="sort by peak").click()
        assert study.peak(int(rows(tab)[0])) == max(study.peak(j) for j in range(4096))
        tab.get_by_role("button", name="sort by feature").click()
        assert rows(tab)[:3] == ["0", "1", "2"]

    def test_found_by_number(self, wide, shown):
        tab = shown(wide)
        tab.keyboard.press("/")  # from anywhere
        tab.keyboard.type("409")
        tab.get_by_text("7 of 4,096", exact=True).wait_for()
        assert {*rows(tab)} == {"409", *map(str, range(4090, 4096))}

    def test_text_of_passages_and_logits_is_searched(self, wide, study, shown):
        def holds(j: int, text: str) -> bool:
            passages = ["".join(study.pieces(example.tokens)) for example in study.examples(j)]
            raised, lowered = logits[j]
            return any(text in each.lower() for each in [*passages, *(name for name, _ in raised + lowered)])

        logits = study.logits_of(range(4096))
        word = "".join(study.pieces(study.examples(7)[0].tokens[:4])).lower().strip()
        expected = [j for j in range(4096) if holds(j, word)]
        tab = shown(wide, "#features")
        tab.locator("#search").fill(word.upper())
        tab.get_by_text(f"{len(expected):,} of 4,096", exact=True).wait_for()
        assert {int(j) for j in rows(tab)} <= {*expected}
        tab.keyboard.press("Enter")
        assert int(tab.locator(".feature h2 b").inner_text()) in expected

    def test_a_feature(self, wide, study, shown):
        tab = shown(wide, "#feature-7")
        assert tab.locator(".feature h2").inner_text() == "Feature 7"
        lead = tab.locator(".feature .lead").inner_text()
        assert f"({study.fired(7):,} of {study.tokens:,})" in lead
        examples = study.examples(7)
        passages = tab.locator(".passage")
        assert passages.count() == len(examples)
        for i, example in enumerate(examples):
            text = re.sub(" {3,}", "  ", "§".join(study.pieces(example.tokens)))
            pieces = [re.sub(" {3,}", "  ", piece) for piece in study.pieces(example.tokens)]
            assert passages.nth(i).evaluate("node => node.textContent") == "".join(pieces), text
            fires = [piece for piece, value in zip(pieces, example.values, strict=True) if value > 0]
            marked = passages.nth(i).locator("mark").evaluate_all("all => all.map(mark => mark.textContent)")
            assert [piece.strip() for piece in fires] == [piece.strip() for piece in marked]
            chosen = passages.nth(i).locator("mark.chosen").evaluate("node => node.textContent")
            assert chosen.strip() == pieces[example.at].strip()
        raised, lowered = study.logits(7)
        for side, expected in (("raised", raised), ("lowered", lowered)):
            words = tab.locator(f".{side} code").all_inner_texts()
            assert words == [name.replace(" ", "·") for name, _ in expected]
        assert tab.locator(".nearest b").all_inner_texts() == [str(j) for j, _ in study.neighbours(7)]
        bars = tab.locator(".panels svg rect")
        assert bars.count() > 3
        tab.locator(".nearest a").first.click()
        assert tab.locator(".feature h2 b").inner_text() == str(study.neighbours(7)[0][0])

    def test_a_dead_feature_and_one_that_is_not_there(self, wide, study, shown):
        tab = shown(wide, "#feature-100")
        assert tab.locator(".feature .lead").inner_text() == f"Never fired on these {study.tokens:,} tokens."
        tab.evaluate("location.hash = '#feature-4096'")
        assert "has no page" in tab.locator(".feature .notice").inner_text()

    def test_keys(self, wide, shown):
        tab = shown(wide, "#features")
        order = rows(tab)
        opened = tab.locator(".feature h2 b")
        for press, place in (("ArrowDown", 0), ("ArrowDown", 1), ("j", 2), ("ArrowUp", 1), ("k", 0), ("ArrowUp", 0)):
            tab.keyboard.press(press)
            assert opened.inner_text() == order[place]
        assert tab.locator(".rows .row[aria-selected=true]").count() == 1
        tab.locator(".passage").first.focus()
        tab.keyboard.press("Enter")
        assert tab.locator(".passage.open").count() == 1
        tab.keyboard.press("Escape")
        assert tab.evaluate("location.hash") == "#features"

    def test_on_a_phone(self, wide, shown, trained_run):
        phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
        for path, at in ((trained_run / "report.html", ""), (wide, "#features"), (wide, "#feature-7")):
            tab = shown(path, at, **phone)
            assert tab.evaluate("document.documentElement.scrollWidth") <= 360
        assert not tab.locator(".list").is_visible()
        tab.get_by_text("all features").tap()
        tab.locator(".rows .row").nth(3).tap()
        assert tab.locator(".passage").first.is_visible()

    def test_dark_and_light(self, wide, shown):
        for scheme, least, most in (("light", 200, 255), ("dark", 0, 60)):
            tab = shown(wide, "#feature-7", color_scheme=scheme)
            paper, ink = (
                [int(part) for part in re.findall(r"\d+", tab.evaluate(f"getComputedStyle(document.body).{name}"))[:3]]
                for name in ("backgroundColor", "color")
            )
            assert all(least <= part <= most for part in paper)
            assert abs(sum(paper) - sum(ink)) > 500

    def test_strings_of_others_stay_text(self, study, shown, tmp_path, monkeypatch):
        """Metadata, names and tokens that try to be HTML or script."""
        monkeypatch.setattr(features, "pieces", lambda tokenizer, tokens: [f"{EVIL}{token}" for token in tokens])
        sae = SparseAutoencoder(study.sae.cfg).requires_grad_(False)
        sae.load_state_dict(study.sae.state_dict())
        names = dict.fromkeys(("model_name", "dataset_path", "hook_name"), EVIL)
        sae.with_metadata(**names, **{EVIL: EVIL}, saekit={"variant": EVIL, "k": EVIL, "training_tokens": EVIL})
        few = features.study_features(
            sae, study.model, study.contexts.rows(0, 2), hook="blocks.1.hook_resid_post", features=[5, 7, 9]
        )
        path = tmp_path / "report.html"
        about = {"dataset": EVIL, EVIL: [EVIL]}
        write_report(path, [Subject(EVIL, sae, about=about), Subject(EVIL, sae)], few, EVIL)
        for at in ("", "#features", "#feature-7"):
            tab = shown(path, at)
            assert tab.locator("img, b b").count() == 0
            assert tab.locator("script").count() == 3
            assert tab.evaluate("window.hacked") is None
            assert EVIL in tab.title()
        assert EVIL in tab.locator(".raised code").first.inner_text().replace("·", " ")
        assert EVIL in tab.locator(".passage").first.inner_text()
        tab.evaluate("location.hash = ''")
        tab.locator("summary").click()
        assert EVIL in tab.locator(".facts").inner_text()

    def test_no_other_script_runs(self, wide, browser):
        """The policy of the page allows the script and the style that it came with, and no request."""
        tab = browser.new_page()
        tab.goto(wide.as_uri())
        tab.evaluate(
            """() => { const script = document.createElement("script"); script.textContent = "window.hacked = 1";
            document.body.append(script); const image = new Image(); image.src = "http://127.0.0.1:9/x.png";
            document.body.setAttribute("onclick", "window.hacked = 1"); document.body.click(); }"""
        )
        assert tab.evaluate("window.hacked") is None
        tab.close()


class TestThePage:
    def test_it_is_the_same_each_time_and_names_no_other_place(self, study):
        one, again = (
            page(
                [Subject("a", study.sae)],
                features.study_features(study.sae, study.model, study.contexts.rows(0, 4), features=range(40)),
            )
            for _ in range(2)
        )
        assert one == again
        assert "http:" not in one.replace("http://www.w3.org/2000/svg", "")
        assert "https:" not in one

    def test_curves_take_numbers_only(self, tmp_path):
        line = {"tokens": 10, "loss": 0.5, "fvu": 0.4, "l0": 3, "dead_share": 0, "seconds": 1.5}
        lines = [{**line, "tokens": 10 * step} for step in range(1, 2002)]
        bad = ["", "[" * 5000, "null", '{"tokens": 1}', json.dumps({**line, "loss": EVIL}), '{"tokens": 1e999}']
        bad += [json.dumps({**line, "l0": float("nan")}), json.dumps({**line, "fvu": True})[:40]]
        (tmp_path / "metrics.jsonl").write_text("\n".join([*bad, *map(json.dumps, lines)]))
        found = overview.curves(tmp_path / "metrics.jsonl")
        assert set(found) == {"tokens", "loss", "fvu", "l0", "dead_share"}
        assert 300 < len(found["tokens"]) <= 400
        assert found["tokens"][-1] == 20_010
        assert {*found["loss"]} == {0.5}

    def test_figures_that_are_none(self, study):
        """What another's eval.json may hold in place of figures."""
        for junk in (
            EVIL,
            5,
            None,
            [],
            {"tokens": EVIL},
            {"density_by_rank": EVIL},
            {"l0_histogram": {"counts": EVIL}},
        ):
            for group in ("sparsity", "reconstruction", "downstream", "dark_matter"):
                found = overview.overview(Subject("a", study.sae, {group: junk}), None)
                assert (found["headline"], found["tables"], found["density"], found["l0"]) == ([], [], None, None)
        ranks = {"rank": [1, 9], "density": [0.5, 0.1]}
        names = ("exponent", "shift", "scale", "r2")
        for law in (None, {}, {"exponent": EVIL}, dict.fromkeys(names, EVIL), dict.fromkeys(names, -1e200)):
            assert overview._density({"density_by_rank": ranks, "zipf": law}, 10)["fitted"] is None
        assert overview._density({"density_by_rank": ranks, "zipf": dict.fromkeys(names, 1.0)}, 10)["fitted"] == [
            0.5,
            0.1,
        ]
        assert overview._density({"density_by_rank": {**ranks, "rank": [1, 10**12]}}, 10) is None

    def test_standard_errors_stand_beside_their_figures(self, study):
        """Reports of older versions have none, and those of others may have anything in their place."""
        groups = {"reconstruction": {"fvu": 0.125, "fvu_se": 0.0021}, "sparsity": {"l0": 8.0, "documents": 57}}
        found = overview.overview(Subject("a", study.sae, groups), None)
        assert ["FVU", "0.1250", "0.0021"] in [row[:3] for row in found["headline"]]
        assert found["errors"] == ["± standard error over 57 documents (jackknife)"]
        rows = overview.comparison([Subject("a", study.sae, groups), Subject("b", study.sae)])["rows"]
        assert ["0.1250", "0.0021"] in rows[0]
        assert ["", ""] in rows[1]
        for junk in (EVIL, None, [], {}, -1, float("nan"), 10**400):
            groups = {"reconstruction": {"fvu": 0.125, "fvu_se": junk}, "sparsity": {"documents": junk}}
            found = overview.overview(Subject("a", study.sae, groups), None)
            assert [row[:3] for row in found["headline"]] == [["FVU", "0.1250", ""]]
            assert found["errors"] == []

    def test_weak_passages_keep_their_strength(self, source, contexts, shown, tmp_path):
        """Colours are rounded to hundredths of the peak; the activation that a passage was chosen for is not."""
        torch.manual_seed(0)
        sae = SparseAutoencoder(SAEConfig(256, 128, "standard")).requires_grad_(False)
        sae.W_enc.normal_()
        sae.b_enc.fill_(-30)
        found = features.study_features(sae, source.model, contexts.rows(0, 12), hook=source.hook)
        weakest = [(j, example) for j in range(128) for example in found.examples(j) if example.band == 5]
        j, example = min(weakest, key=lambda each: each[1].values[each[1].at] / found.peak(each[0]))
        value = example.values[example.at]
        assert value < 0.005 * found.peak(j)
        write_report(tmp_path / "report.html", [Subject("weak", sae)], found)
        tab = shown(tmp_path / "report.html", f"#feature-{j}")
        strength = tab.locator(".strength").last.evaluate("node => node.firstChild.textContent")
        assert float(strength) == pytest.approx(value, rel=6e-3)

    def test_nothing_fires(self, source, contexts, shown, tmp_path):
        sae = SparseAutoencoder(SAEConfig(256, 16, "topk", k=2)).requires_grad_(False)
        sae.b_enc.fill_(-1)
        groups = evaluate(sae, source.model, contexts.rows(0, 2), hook=source.hook).groups
        write_report(tmp_path / "report.html", [Subject("dead", sae, groups)])
        tab = shown(tmp_path / "report.html")
        assert tab.locator("#overview .chart .title").all_inner_texts() == ["L0 of a token"]
        assert overview._density(groups["sparsity"], 16) is None

    def test_figures_that_hardly_differ(self, study, shown, tmp_path):
        """Ticks at steps that a number would not notice are none."""
        line = {"tokens": 10, "loss": 1.0, "fvu": 1.0, "l0": 3.0, "dead_share": 0}
        lines = [line, {**line, "tokens": 20, "loss": 1.0000000000000002, "fvu": 1.0000000000000002}]
        (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        write_report(tmp_path / "report.html", [Subject("a", study.sae, metrics=tmp_path / "metrics.jsonl")])
        tab = shown(tmp_path / "report.html")
        assert tab.locator("#overview path.line").count() == 3

    def test_features_of_another_space_have_no_logits(self, source, contexts, shown, tmp_path):
        sae = SparseAutoencoder(SAEConfig(256, 16, "topk", k=2)).requires_grad_(False)
        sae.W_enc.normal_()
        found = features.study_features(sae, source.model, contexts.rows(0, 2), hook="blocks.1.attn.hook_z")
        write_report(tmp_path / "report.html", [Subject("z", sae)], dataclasses.replace(found))
        tab = shown(tmp_path / "report.html", "#feature-3")
        assert "not in the space of the residual stream" in tab.locator(".panels .notice").inner_text()


class TestCommands:
    def test_a_report_that_is_missing_is_drawn_again_and_one_that_is_there_is_left(
        self, trained_run, saekit_main, tmp_path
    ):
        shutil.copytree(trained_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "report.html"))
        report, command = tmp_path / "run/report.html", ("train", "--out", "run", "--resume", "--quiet")
        done = saekit_main(*command, "--eval-tokens", 3000, "--features-shown", 50, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"report: {Path('run/report.html')} (" in done.stdout
        assert '"width":1024' in report.read_text()
        assert len(report.read_text().partition('id="lines">')[2].partition("</script>")[0].splitlines()) == 50
        before = os.stat(report)
        done = saekit_main(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert os.stat(report) == before

    def test_several_dictionaries(self, trained_run, saekit_main, tmp_path, shown):
        command = ("eval", trained_run, trained_run / "sae", "--tokens", 1000, "--quiet", "--html", "report.html")
        done = saekit_main(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        tab = shown(tmp_path / "report.html")
        assert tab.locator(".comparison tbody tr").count() == 2
        assert tab.locator(".comparison tbody th").first.inner_text() == str(trained_run)
        assert tab.locator("#overview path.line").count() == 4  # the run's curves too
        refused = saekit_main(*command, cwd=tmp_path)
        assert (refused.returncode, refused.stderr) == (
            2,
            "saekit: 'report.html' exists already; choose another --html\n",
        )
        refused = saekit_main(*command[:-1], "no/report.html", cwd=tmp_path)
        assert "there is no folder 'no'" in refused.stderr

    def test_a_cache_alone_and_no_evaluation_and_a_report_that_fails(self, saekit_main, tmp_path, shown, monkeypatch):
        torch.manual_seed(0)
        ActivationCache.from_tensor(tmp_path / "mine", torch.randn(4000, 16))
        run = ("train", "--cache", "mine", "--tokens", 20_000, "--batch-size", 200, "--width", 32, "--k", 4)
        run += ("--out", "run", "--quiet")
        done = saekit_main(*run, "--eval-tokens", 0, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        tab = shown(tmp_path / "run/report.html")
        assert "Not judged" in tab.locator("#overview .notice").inner_text()
        assert tab.locator("#overview path.line").count() == 3
        again = ("train", "--out", "run", "--resume", "--quiet")

        def fails(*arguments):
            raise WriteError("cannot write 'run/report.html': No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(html, "write_report", fails)
            done = saekit_main(*again, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (
            2,
            "saekit: cannot write 'run/report.html': No space left on device\n",
        )
        assert json.loads((tmp_path / "run/eval.json").read_text())["sparsity"]["features"] == 32
        assert saekit.load(tmp_path / "run").cfg.d_sae == 32
        (tmp_path / "run/report.html").unlink()
        done = saekit_main(*again, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        tab = shown(tmp_path / "run/report.html", "#features")
        assert "activations and no text" in tab.locator("#features .notice").inner_text()
