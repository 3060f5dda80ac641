"""The dark matter suite by the command line and on the embedded model, and the study's script."""

from __future__ import annotations

import importlib
import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import saekit
from saekit import SaekitError
from saekit.activations import ActivationCache, ContextBatch, harvest_hooks
from saekit.evals import Evaluator, encode_by_pursuit, heldout_contexts, table
from saekit.evals.dark_matter import dark_matter, error_downstream, without_start
from saekit.evals.dark_matter.error_cost import only_tested
from saekit.evals.dark_matter.figures import draw
from saekit.evals.dark_matter.least_squares import LinearMap
from saekit.evals.dark_matter.saved import DarkMatterEvaluator

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def run(trained_run, tmp_path_factory):
    """A copy of the trained run, whose eval.json may change."""
    copy = tmp_path_factory.mktemp("copy") / "run"
    shutil.copytree(trained_run, copy)
    return copy


@pytest.fixture(scope="module")
def other(trained_run, tmp_path_factory):
    """The same dictionary, as if it were of an earlier part."""
    sae = saekit.load(trained_run).with_metadata(hook_name="blocks.1.hook_mlp_out")
    return sae.save(tmp_path_factory.mktemp("other") / "sae")


@pytest.fixture(scope="module")
def found(run, other, saekit_command, tmp_path_factory):
    """What the whole command says."""
    out = tmp_path_factory.mktemp("found")
    done = saekit_command(
        "eval", "--suite", "dark_matter", run, "--tokens", 12_000, "--ce-tokens", 1500, "--pursuit", "--earlier", other,
        "--figures", out / "figures", "--out", out / "found.json", "--quiet",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done, json.loads((out / "found.json").read_text()), out


def test_the_command_writes_everything(found, run, other):
    done, report, out = found
    group = report["dark_matter"]
    assert group["tokens"] >= 12_000
    assert group["document"]["tokens_fit"] + group["document"]["tokens_test"] == group["tokens"]
    assert report["about"]["mask"] == "text positions but the first 20% and the last"
    assert 0 < group["pursuit"]["fvu"] < group["document"]["fvu"], "pursuit finds better codes"
    assert group["pursuit"]["l0"] <= group["l0"]
    assert group["cost"]["tokens"] > 100
    assert set(group["earlier_parts"]) == {str(other)}
    assert set(group["earlier_parts"][str(other)]) == {"error", "linear", "nonlinear"}
    for part in group["document"]["norms"].values():
        assert all(value is not None and value <= 1 for value in part.values()), "the suite knows all baselines"
    assert "FVU nonlin" in done.stdout
    assert {p.name for p in (out / "figures").iterdir()} == {"dark_matter_r2.png", "dark_matter_shares.png"}
    joined = json.loads((run / "eval.json").read_text())
    assert joined["dark_matter"]["document"] == group["document"]
    assert {"sparsity", "reconstruction", "downstream"} <= set(joined), "what was there stays"


def test_the_command_equals_plain_tensors(found, run, source):
    """The same tokens by hand: a whole pass, positions cut, and the function for anybody's tensors."""
    sae = saekit.load(run)
    contexts = heldout_contexts(source, 12_000, without_start)
    length = contexts.tokens.shape[1]
    positions = torch.arange(length).expand(contexts.tokens.shape)[contexts.kept]
    assert positions.min() == 52, "a fifth of 256 is left out"
    assert positions.max() == length - 2
    parts = [ContextBatch(*(c[i : i + 16] for c in contexts)) for i in range(0, len(contexts.tokens), 16)]
    passes = list(harvest_hooks(source.model, [source.hook], parts, losses=True))
    batches = [found.batches[source.hook] for found in passes]
    x, documents, tokens = (torch.cat([b[i] for b in batches]) for i in (0, 2, 1))
    losses = torch.cat([found.losses for found in passes])
    with torch.no_grad():
        code = sae.encode_sparse(x)
        x_hat = sae.decode(code)
    again = dark_matter(x, x_hat, documents=documents, tokens=tokens, l0=code.matches_per_token(), losses=losses)
    group = found[1]["dark_matter"]
    for split in ("random", "document"):
        assert group[split]["fvu"] == pytest.approx(again[split]["fvu"], rel=1e-4)
        assert group[split]["plain"]["r2"] == pytest.approx(again[split]["plain"]["r2"], abs=1e-3)
        for part, row in again[split]["norms"].items():
            for key, value in row.items():
                assert group[split]["norms"][part][key] == pytest.approx(value, abs=2e-3), (part, key)
    with torch.no_grad():
        pursued = sae.decode(encode_by_pursuit(sae, x))
    fvu = dark_matter(x, pursued, documents=documents)["document"]["fvu"]
    assert group["pursuit"]["fvu"] == pytest.approx(fvu, rel=1e-3)


def test_costs_at_the_ends(source, contexts):
    """Where all of the error is linear, that part recovers all of the cost and the rest nothing; and the reverse."""
    few = ContextBatch(*(column[:4] for column in contexts))
    d = source.model.cfg.d_model
    nothing = LinearMap(torch.zeros(d, d).double(), torch.zeros(d).double(), d)
    found = error_downstream(source.model, source.hook, [few], lambda x: 0.5 * x, nothing)
    assert found["ce_linear"] == found["ce_reconstructed"] > found["ce_clean"] == found["ce_nonlinear"]
    assert (found["recovered_linear"], found["recovered_nonlinear"]) == (0, 1)
    half = LinearMap(0.5 * torch.eye(d).double(), torch.zeros(d).double(), d)
    found = error_downstream(source.model, source.hook, [few], lambda x: 0.5 * x, half)
    assert found["recovered_linear"] == pytest.approx(1, abs=1e-3)
    assert found["recovered_nonlinear"] == pytest.approx(0, abs=1e-3)
    tested = only_tested(contexts, seed=0)
    assert 0 < int(tested.kept.sum()) < int(contexts.kept.sum())
    left_out = contexts.kept & ~tested.kept
    assert not set(contexts.documents[tested.kept].tolist()) & set(contexts.documents[left_out].tolist())


def test_several_dictionaries(run, other, tmp_path):
    """Two widths of like L0 are compared; another hook is refused."""
    sae = saekit.load(run)
    narrow = saekit.SparseAutoencoder(saekit.SAEConfig(sae.cfg.d_in, 1000, "jumprelu", affinity_scale="token_norm"))
    with torch.no_grad():
        for name in ("W_enc", "W_dec", "b_enc", "threshold"):
            rows = getattr(sae, name)
            getattr(narrow, name).copy_(rows[:, :1000] if name == "W_enc" else rows[:1000])
        narrow.b_dec.copy_(sae.b_dec)
    narrow.with_metadata(**sae.cfg.metadata).save(tmp_path / "narrow")
    paths = [str(tmp_path / "narrow"), str(run)]
    reports, compared = DarkMatterEvaluator(Evaluator(tokens=6000), ce_tokens=0)(paths)
    l0 = [reports[path]["dark_matter"]["l0"] for path in paths]
    assert max(l0) < 1.25 * min(l0), l0
    (group,), (pair,) = compared["width"], compared["token"]
    assert group["total"]["widths"] == [1000, 1024]
    fvu = [reports[path]["dark_matter"]["document"]["fvu"] for path in paths]
    assert group["total"]["fvu"] == pytest.approx(fvu, rel=1e-6)
    assert (pair["small"], pair["large"]) == tuple(paths)
    assert pair["r2"] > 0.5
    drawn = draw({path: report["dark_matter"] for path, report in reports.items()}, compared, tmp_path / "figures")
    assert len(drawn) == 4
    shown = Console(width=120, file=io.StringIO())
    shown.print(table(reports))
    assert f"{fvu[0]:.4f}" in shown.file.getvalue()
    with pytest.raises(SaekitError, match="has hook 'blocks.1.hook_resid_post', .* has 'blocks.1.hook_mlp_out'"):
        DarkMatterEvaluator(Evaluator(tokens=6000))([run, other])


def test_activations_alone(tmp_path, saekit_main):
    """A cache of somebody's tensor needs no model; costs and losses are left out."""
    x = torch.randn(40_000, 16, generator=torch.Generator().manual_seed(0))
    ActivationCache.from_tensor(tmp_path / "cache", x)
    done = saekit_main(
        "train", "--cache", tmp_path / "cache", "--width", 64, "--k", 4, "--tokens", 20_000, "--batch-size", 500,
        "--out", tmp_path / "run", "--quiet",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = saekit_main("eval", "--suite", "dark_matter", tmp_path / "run", "--quiet")
    assert done.returncode == 0, done.stderr
    group = json.loads((tmp_path / "run/eval.json").read_text())["dark_matter"]
    assert group["tokens"] == ActivationCache.open(tmp_path / "cache").count("heldout")
    assert group["random"]["norms"]["error"]["from_loss"] is None
    assert "cost" not in group


MISTAKES = {
    "too few tokens": ("RUN --tokens 300", "too few to regress on activations of width 256; give at least 1,024"),
    "another hook": ("RUN --hook blocks.2.hook_resid_post", "is of hook 'blocks.1.hook_resid_post', not of"),
    "two hooks": ("RUN OTHER", "has hook 'blocks.1.hook_resid_post', .* has 'blocks.1.hook_mlp_out'"),
    "itself as an earlier part": ("RUN --earlier RUN --tokens 2000", "itself, not of an earlier part"),
    "earlier parts without a model": ("CACHED --earlier OTHER", "need a model and text"),
    "a later part": ("RUN --earlier LATER --tokens 2000", "comes after 'blocks.1.hook_resid_post'"),
    "named twice": ("RUN RUN", "is named twice"),
    "no report": ("RUN --tokens 2000", "is no report of an evaluation"),
    "no folder for figures": ("RUN --figures RUN/config.yaml", "is a file, not a folder"),
    "unknown suite": ("RUN --suite dark_mater", "unknown suite 'dark_mater'; did you mean 'dark_matter'"),
    "a flag of the other suite": ("RUN --suite standard --pursuit", "--pursuit goes with --suite dark_matter"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_bad_input(mistake, run, other, tmp_path, saekit_main):
    arguments, message = MISTAKES[mistake]
    if "CACHED" in arguments:
        ActivationCache.from_tensor(tmp_path / "c", torch.randn(3000, 8))
        sae = saekit.SparseAutoencoder(saekit.SAEConfig(8, 16, "topk", k=2))
        sae.with_metadata(saekit={"cache": str(tmp_path / "c")}).save(tmp_path / "sae")
        arguments = arguments.replace("CACHED", f"{tmp_path / 'sae'} --cache {tmp_path / 'c'}")
    if mistake == "a later part":
        later = saekit.load(run).with_metadata(hook_name="blocks.2.hook_resid_post").save(tmp_path / "later")
        arguments = arguments.replace("LATER", str(later))
    if mistake == "no report":
        run = Path(shutil.copytree(run, tmp_path / "run"))
        (run / "eval.json").write_text("[1, 2]")
    arguments = arguments.replace("RUN", str(run)).replace("OTHER", str(other))
    suite = [] if "--suite" in arguments else ["--suite", "dark_matter"]
    done = saekit_main("eval", *suite, *arguments.split(), "--quiet", cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert re.search(message, lines[0]), lines[0]


def interrupt(study, name):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_the_study_and_its_page(tmp_path, monkeypatch):
    """The script from end to end, small; interrupted after the harvest it goes on, and other settings are refused."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("dark_matter")
    settings = "--tokens 12000 --k 8 --expansion 2 4 16 --eval-tokens 6000 --ce-tokens 500 --pursuit-tokens 3000"
    places = ["--out", str(tmp_path / "out"), "--page", str(tmp_path / "page")]
    arguments = ["dark_matter", *places, *settings.split(" ")]
    monkeypatch.setattr(sys, "argv", arguments)
    with monkeypatch.context() as early:
        early.setattr(script.Study, "train", interrupt)
        with pytest.raises(SystemExit) as stop:
            script.main()
    assert stop.value.code == 130
    harvested = (tmp_path / "out/cache/manifest.json").stat().st_mtime_ns
    script.main()
    assert (tmp_path / "out/cache/manifest.json").stat().st_mtime_ns == harvested
    text = (tmp_path / "page/dark_matter.md").read_text()
    for words in ("## The norm test", "## Gradient pursuit", "## Planted errors", "k8-w4096", "holds"):
        assert words in text
    assert len(list((tmp_path / "page").glob("*.png"))) == 4
    script.main()
    assert (tmp_path / "page/dark_matter.md").read_text() == text, "nothing is done twice"
    monkeypatch.setattr(sys, "argv", [*arguments, "--tokens", "24000"])
    with pytest.raises(SystemExit) as refused:
        script.main()
    assert refused.value.code == 2
