"""The report as a browser shows it."""

from __future__ import annotations

import json
import re

from saekit import SparseAutoencoder
from saekit.evals import features
from saekit.evals.html import Subject, write_report

EVIL = '</script><img src=x onerror="window.hacked=1"><script>window.hacked=1</script>&lt;b&gt;'


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
