"""A browser, a dictionary's features, and their report."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from saekit import SAEConfig, SparseAutoencoder
from saekit.evals import features
from saekit.evals.html import Subject, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


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
