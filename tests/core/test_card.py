"""Model cards say what a dictionary's own files say, and nothing in those can break them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hub_stand_in import make_run

from saekit import SAEConfig, SaekitError, SparseAutoencoder
from saekit.card import card
from saekit.hub import HubPath


def head_of(text: str) -> dict[str, object]:
    _, head, body = text.split("---\n", 2)
    assert body.startswith("\n#")
    return yaml.safe_load(head)


def test_a_card(tmp_path):
    run = make_run(tmp_path / "run")
    text = card(run, HubPath.parse("me/x/y"))
    assert head_of(text) == {"library_name": "saekit", "tags": ["sparse-autoencoder", "interpretability", "saelens"]}
    for words in (
        "| features | 20, of activations of width 6 |",
        "On 4,321 held-out tokens of the Python source on the machine",
        "| FVU | 0.2500 | fraction of the activations' variance unexplained |",
        'sae = saekit.load("hf://me/x/y")',
        'SAE.from_pretrained("me/x", "y")',
        "Its files do not say: the model; the hook point;",
    ):
        assert words in text
    assert "cosine" not in text
    assert 'SAE.load_from_disk(snapshot_download("me/x"))' in card(run, HubPath.parse("me/x"))


def test_a_card_shows_standard_errors(tmp_path):
    run = make_run(tmp_path / "run")
    report = json.loads((run / "eval.json").read_text())
    report["reconstruction"]["fvu_se"] = 0.0123
    report["sparsity"]["documents"] = 57
    (run / "eval.json").write_text(json.dumps(report))
    text = card(run)
    assert "| figure | value | ± | meaning |\n|---|---:|---:|---|" in text
    assert "| FVU | 0.2500 | 0.0123 | fraction of the activations' variance unexplained |" in text
    assert "± standard error over 57 documents (jackknife)." in text.splitlines()


@pytest.mark.parametrize("sparsity", [None, [], {}, {"tokens": "many"}, {"tokens": 1e999}, {"tokens": -1}])
def test_a_report_that_does_not_say_of_how_many_tokens(sparsity, tmp_path):
    run = make_run(tmp_path / "run")
    (run / "eval.json").write_text(json.dumps({"about": {}, "sparsity": sparsity}))
    with pytest.raises(SaekitError, match="is no report of an evaluation; move it away"):
        card(run)


def saved(folder: Path, **metadata: object) -> Path:
    sae = SparseAutoencoder(SAEConfig(4, 8, "jumprelu", affinity_scale="token_norm", metadata=metadata))
    return sae.save(folder)


def test_a_card_of_what_saekit_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = {"variant": "mutual_choice", "k": 3, "aux": "aux_k", "training_tokens": 1_000_000, "seed": 5}
    facts = {"model_name": "EleutherAI/pythia-70m", "hook_name": "blocks.3.hook_resid_post", "context_size": 128}
    folder = saved(tmp_path / "sae", **facts, dataset_path="monology/pile-uncopyrighted", saekit=own)
    text = card(folder, HubPath.parse("me/x/y"))
    assert head_of(text)["base_model"] == "EleutherAI/pythia-70m"
    assert head_of(text)["datasets"] == ["monology/pile-uncopyrighted"]
    assert "# Sparse autoencoder of `EleutherAI/pythia-70m` at `blocks.3.hook_resid_post`" in text
    assert "| trained on | 1,000,000 tokens of `monology/pile-uncopyrighted` |" in text
    assert "| trained by | `mutual_choice` with k = 3 and `aux_k` |" in text
    assert "SAELens cannot read" in text
    assert "from sae_lens" not in text
    assert "do not say: a licence." in text
    Path("EleutherAI/pythia-70m").mkdir(parents=True)  # then it is a folder, not what the hub calls so
    assert "base_model" not in head_of(card(folder))


@pytest.mark.parametrize("name", ["tiny.gguf", "models/tiny.gguf", "owner/repo/tiny.gguf", "/home/me/tiny.gguf"])
def test_a_gguf_file_is_no_model_of_the_hub(tmp_path, name):
    text = card(saved(tmp_path / "sae", model_name=name))
    assert "base_model" not in head_of(text)
    assert "| model | `tiny.gguf` (a GGUF file) |" in text


@pytest.mark.parametrize(
    "text",
    [
        "a\n---\nlicense: mit\n",
        "a: b",
        "`x` | y <script>",
        "&x *x",
        "!!python/object:os.system",
        "\ud800",
        "x" * 10_000,
        7,
        ["a"],
        {"a": 1},
        "/home/me/model",
        "../model",
        "C:\\model",
        "\u2028---",
        "",
    ],
)
def test_metadata_cannot_break_a_card(text, tmp_path):
    """Nothing of it gets into the head, and in the body it stays within its code."""
    facts = {"model_name": text, "dataset_path": text, "hook_name": "h" if text == "/home/me/model" else text}
    folder = saved(tmp_path / "sae", **facts, saekit={"variant": facts["hook_name"]})
    made = card(folder, HubPath.parse("me/x/y"))
    assert head_of(made) == {"library_name": "saekit", "tags": ["sparse-autoencoder", "interpretability"]}
    made.encode()
    body = made.split("---\n", 2)[2]
    assert "/home" not in body
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert all(row.count("|") == 3 and row.count("`") % 2 == 0 for row in rows[:8])
    assert max(map(len, body.splitlines())) < 600
    assert head_of(card(folder, HubPath.parse("me/x/y"), above=True))["library_name"] == "saekit"
