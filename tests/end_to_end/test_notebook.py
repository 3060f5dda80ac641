"""The notebook runs on a small run, what it shows is true, and what is committed names no machine."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "scripts" / "explore.ipynb"
ASK = """
import json
print(json.dumps({
    "features": sae.cfg.d_sae, "words": words, "feature": feature, "f": f[:, feature].tolist(),
    "density": float(found.density[feature]), "fvu": report["reconstruction"]["fvu"],
    "loss": {name: float(nats) for name, nats in loss.items()}, "change": change.tolist(),
    "written": list(written.values()), "log_p": float(log_p), "effects": effects,
    "cosine": float(similar.first.cosines[here]), "cosines": similar.first.cosines.tolist(),
    "hooks": [name for name in model.hook_dict if "hook_features" in name],
}))
"""


def outputs(notebook):
    """All that cells show: HTML where there is some, else text."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            found.append(data.get("text/html") or data.get("text/plain") or output.get("text", ""))
    return found


@pytest.fixture(scope="module")
def executed(trained_run, tmp_path_factory):
    """The notebook's outputs, and the values behind them."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(ASK))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAEKIT_RUN", str(trained_run))
        patch.setenv("SAEKIT_TOKENS", "4000")
        patch.setenv("IPYTHONDIR", str(tmp_path_factory.mktemp("ipython")))
        NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(folder)}}).execute()
    assert not list(folder.iterdir()), "it leaves nothing behind"
    return notebook, json.loads(notebook.cells[-1].outputs[0].text)


def test_what_it_finds_is_true(executed, trained_run):
    _, found = executed
    evaluated = json.loads((trained_run / "eval.json").read_text())
    assert found["features"] == 1024
    assert found["fvu"] == pytest.approx(evaluated["reconstruction"]["fvu"], rel=0.2)
    assert 0 < found["density"] < 0.02
    assert max(found["f"]) > 0
    assert len(found["f"]) == len(found["words"]) == len(found["change"]) + 1

    loss = found["loss"]
    assert loss["with x̂"] > loss["the model"] + 0.01
    assert loss["with x̂ + error"] == pytest.approx(loss["the model"], abs=1e-4)
    first = next(t for t, value in enumerate(found["f"]) if value)
    assert not any(abs(nats) > 1e-3 for nats in found["change"][: first - 1]), (
        "before the feature fires, nothing changes"
    )
    assert max(map(abs, found["change"])) > 0.01

    assert all(text.removeprefix("<|bos|>").startswith("def main():") for text in found["written"])
    assert found["written"][0] != found["written"][-1]
    estimated, real = zip(*found["effects"], strict=True)
    assert len(real) == 8
    agree = sum(e * r for e, r in found["effects"]) / (sum(e * e for e in estimated) * sum(r * r for r in real)) ** 0.5
    assert agree > 0.7, "gradients predict what ablation does"
    assert found["cosine"] == pytest.approx(max(found["cosines"]))
    assert found["hooks"] == [], "splices are gone"


def test_what_it_shows_is_readable(executed):
    notebook, found = executed
    shown = outputs(notebook)
    whole = "\n".join(shown)
    assert not re.search(r"<(script|style)", whole)
    assert "warning:" not in whole.lower()
    assert not [o for cell in notebook.cells for o in cell.get("outputs", []) if o.get("name") == "stderr"]
    assert "<b>SparseAutoencoder</b>" in shown[0]
    assert "fraction of the activations&#x27; variance unexplained" in whole
    mine = next(html for html in shown if html.startswith("<div") and html.count("<span") == sum(map(bool, found["f"])))
    assert f'title="{max(found["f"]):.4g}"' in mine
    assert any("gradient × f" in html and html.count("<tr>") == 9 for html in shown)
    assert sum(html.startswith("<div") for html in shown) >= 10


def test_the_committed_outputs_are_those_of_every_cell_and_of_no_machine():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum(bool(cell.outputs) for cell in code) >= 12
    whole = "\n".join(outputs(notebook))
    assert not re.search(r"/(home|root|tmp|usr|work|Users|opt)/", whole)
    assert "Traceback" not in whole
    assert NOTEBOOK.stat().st_size < 120_000
