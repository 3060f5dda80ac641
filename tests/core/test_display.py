"""What notebooks show: the figures and facts that are there, and nothing that others wrote as markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import torch

from saekit import SAEConfig, SaekitError, SparseAutoencoder
from saekit.display import coloured, table
from saekit.evals import Report

EVIL = '<script>alert("x")</script>&\'"'


class Page(HTMLParser):
    """Tags, attributes and text of a page, as a browser would see them; fails where tags do not close."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text, self.styles, self.titles = [], [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.tags.append(tag)
        self.styles.append(dict(attributes).get("style"))
        self.titles.append(dict(attributes).get("title"))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_a_dictionary_tells_what_it_is_and_where_it_comes_from():
    own = {"variant": "topk", "training_tokens": 1_999_872, "l0": 31.98, "fvu": 0.08112}
    facts = {"model_name": "embedded", "hook_name": EVIL, "context_size": 256, "saekit": own, "other": ["no"]}
    html = SparseAutoencoder(SAEConfig(8, 4096, "topk", k=4, metadata=facts))._repr_html_()
    page = Page(html)
    assert set(page.tags) == {"table", "caption", "b", "tbody", "tr", "td"}
    rows = dict(zip(page.text[1::2], page.text[2::2], strict=True))
    assert rows == {
        "features": "4,096",
        "inference": "topk, k = 4",
        "weights": "W_enc [8, 4096], W_dec [4096, 8], float32 on cpu",
        "model": "embedded",
        "hook point": EVIL,
        "context length": "256",
        "trained by": "topk",
        "training tokens": "1,999,872",
        "L0": "31.98",
        "FVU": "0.08112",
    }


@pytest.mark.parametrize("metadata", [{}, {"saekit": EVIL}, {"model_name": None, "hook_name": {"a": EVIL}}])
def test_metadata_of_others_may_say_anything(metadata):
    html = SparseAutoencoder(SAEConfig(8, 16, "standard", metadata=metadata))._repr_html_()
    assert Page(html).text[1::2] == ["features", "inference", "weights"]


def test_a_report_shows_the_figures_it_has_with_their_meanings():
    report = Report(
        {"sparsity": {"l0": 31.94, "dead": 1234, "tokens": 5000}, "reconstruction": {"fvu": float("nan")}},
        {"dictionary": EVIL, "hook": "blocks.1.hook_resid_post"},
    )
    page = Page(report._repr_html_())
    assert page.text[:4] == [EVIL, "figure", "value", "meaning"]
    rows = {page.text[i]: page.text[i + 1] for i in range(4, len(page.text), 3)}
    assert rows == {"L0": "31.9", "dead": "1,234", "FVU": "nan", "tokens": "5,000"}
    assert "active features a token" in page.text
    assert "script" not in page.tags
    name, *lines = repr(report).splitlines()
    assert name == EVIL
    assert [line.split()[:2] for line in lines] == [
        ["L0", "31.9"],
        ["dead", "1,234"],
        ["FVU", "nan"],
        ["tokens", "5,000"],
    ]
    assert repr(Report({})) == "Report"


def test_long_cells_are_cut():
    assert Page(table("", [["a" * 1000]])).text == ["a" * 199 + "…"]


def test_tokens_are_coloured_by_their_values():
    pieces = ["<BOS>", EVIL, " if", "↵↵  ", "x"]
    shown = coloured(pieces, torch.tensor([0.0, 1.0, 4.0, -2.0, float("nan")]), peak=4.0)
    page = Page(shown._repr_html_())
    assert page.tags == ["div", "span", "span", "span"]
    assert page.text == ["<BOS>", EVIL, " if", "↵↵\n  ", "x"]
    assert page.titles == [None, "1", "4", "-2"]
    depths = [re.findall(r"background:rgba\((.*),([\d.]+)\)", style) for style in page.styles[1:]]
    assert depths == [[("255,140,0", "0.20")], [("255,140,0", "0.80")], [("0,140,255", "0.40")]]
    assert "color:" not in shown._repr_html_().replace("background", ""), "the theme decides on the letters"
    assert repr(shown) == "5 tokens, coloured up to 4"
    assert coloured(["a"], [-3.0]).peak == 3
    odd = coloured(["a", "b", "c"], [float("nan"), 2.0, float("-inf")])
    assert odd.peak == 2, "NaN and infinite values set no scale"
    assert Page(odd._repr_html_()).titles == [None, "2", "-inf"]
    assert Page(coloured(["a", "b"], [0, 0])._repr_html_()).text == ["ab"]
    with pytest.raises(SaekitError, match="2 tokens cannot be coloured by 3 values"):
        coloured(["a", "b"], [1, 2, 3])
