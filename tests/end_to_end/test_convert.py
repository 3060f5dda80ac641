"""From format to format by the real commands, and foreign dictionaries judged like our own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import saekit
from saekit import SAEConfig, SparseAutoencoder
from saekit.activations import ActivationCache
from saekit.formats import FORMATS

DATA = Path(__file__).parents[1] / "data"
HOOK = ("--model", "embedded", "--hook", "blocks.1.hook_resid_post")
TOPK = "dictionary_learning_AutoEncoderTopK"


def done(result):
    assert result.returncode == 0, result.stderr
    return result.stdout


def told(result, message):
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def fvus(printed):
    """What --lossy prints: the figures before and after."""
    return [float(line.split("FVU ")[1].split()[0]) for line in printed.splitlines() if "FVU" in line]


@torch.no_grad()
def test_round_the_formats(saekit_main, tmp_path):
    """From a package's own file through each format that can hold it, and back."""
    first, x = saekit.load(DATA / TOPK), torch.randn(50, 8)
    source = DATA / TOPK / "ae.pt"
    for to in ("sparsify", "saelens", "dictionary_learning", "sparsify"):
        target = tmp_path / f"{source.name} as {to}"
        assert str(target) in done(saekit_main("convert", source, target, "--to", to, cwd=tmp_path))
        again = saekit.load(target)
        torch.testing.assert_close(again(x), first(x), rtol=1e-5, atol=1e-5)
        assert again.cfg.metadata["model_name"] == "EleutherAI/pythia-70m-deduped"
        source = target
    told(saekit_main("convert", source, target, "--to", "sparsify", cwd=tmp_path), "holds something already")
    other = saekit_main("convert", source, target, "--to", "saelens", "--overwrite", cwd=tmp_path)
    told(other, "holds a dictionary of another format (sae.safetensors); choose another folder")
    told(saekit_main("convert", source, tmp_path / "x", "--to", "opneai", cwd=tmp_path), "unknown format 'opneai'")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A cache of sparse sums of directions, and a JumpReLU dictionary of them."""
    home = tmp_path_factory.mktemp("planted")
    torch.manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(64, 24), dim=1)
    x = torch.relu(torch.randn(20_000, 64) - 1) @ rows + 0.3
    ActivationCache.from_tensor(home / "cache", x)
    sae = SparseAutoencoder(SAEConfig(24, 64, "jumprelu"))
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.T)
        sae.b_dec.fill_(0.3)
        sae.threshold.fill_(0.9)
    sae.save(home / "jumprelu")
    sae.cfg = SAEConfig(24, 64, "jumprelu", input_normalization="layer_norm")
    sae.save(home / "layer_norm")
    dead = SparseAutoencoder(SAEConfig(24, 64, "standard"))
    dead.load_state_dict({name: value for name, value in sae.state_dict().items() if name != "threshold"})
    with torch.no_grad():
        dead.W_dec[:3] = 0
    dead.save(home / "dead rows")
    return home


@torch.no_grad()
def test_the_nearest_topk(planted, saekit_main, tmp_path):
    """k is the mean L0 of text that the figures are not of; both figures are those of a direct computation."""
    command = ("convert", planted / "jumprelu", tmp_path / "topk", "--to", "sparsify")
    told(
        saekit_main(*command, cwd=tmp_path),
        "has another rule than topk, which the format of sparsify cannot hold; --lossy writes topk at the mean L0",
    )
    assert not (tmp_path / "topk").exists()
    printed = done(saekit_main(*command, "--lossy", "--cache", planted / "cache", cwd=tmp_path))
    before, after = saekit.load(planted / "jumprelu"), saekit.load(tmp_path / "topk")
    cache = ActivationCache.open(planted / "cache")
    parts = {part: torch.cat([b.x for b in cache.batches(part, 4096)]) for part in ("calibration", "heldout")}
    assert after.cfg.k == round(before.encode_sparse(parts["calibration"]).l0)
    assert torch.equal(after.W_enc, before.W_enc)
    x = parts["heldout"]
    variance = (x - x.mean(0)).square().sum()
    expected = [float((x - sae(x)).square().sum() / variance) for sae in (before, after)]
    assert fvus(printed) == pytest.approx(expected, abs=1e-4)
    assert expected[0] != pytest.approx(expected[1], abs=1e-3)


@torch.no_grad()
def test_what_has_no_nearest_and_what_costs_nothing(planted, saekit_main, tmp_path):
    for to in ("sparsify", "dictionary_learning"):
        refused = saekit_main("convert", planted / "layer_norm", tmp_path / "x", "--to", to, "--lossy", cwd=tmp_path)
        told(refused, f"has the layer norm of the input, which the format of {to} cannot hold, nor anything near it")
    command = ("convert", planted / "dead rows", tmp_path / "dead", "--to", "dictionary_learning")
    told(saekit_main(*command, cwd=tmp_path), "has features whose decoder row is zero")
    assert "3 features whose decoder row is zero are silenced" in done(saekit_main(*command, "--lossy", cwd=tmp_path))
    before, after, x = saekit.load(planted / "dead rows"), saekit.load(tmp_path / "dead"), torch.randn(100, 24)
    torch.testing.assert_close(after(x), before(x), rtol=1e-5, atol=1e-5)
    assert (after.encode(x)[:, :3] == 0).all()
    torch.testing.assert_close(after.W_dec.norm(dim=1), torch.ones(64))
    done(saekit_main("convert", planted / "layer_norm", tmp_path / "native", cwd=tmp_path))
    assert json.loads((tmp_path / "native/cfg.json").read_text())["normalize_activations"] == "layer_norm"


@torch.no_grad()
def test_a_dictionary_behind_a_layer_norm_is_judged(planted, saekit_main, tmp_path):
    flags = (planted / "layer_norm", "--cache", planted / "cache", "--quiet", "--tokens", 1000)
    done(saekit_main("eval", *flags, "--out", "report.json", cwd=tmp_path))
    sae = saekit.load(planted / "layer_norm")
    x = torch.cat([b.x for b in ActivationCache.open(planted / "cache").batches("heldout", 1024)])
    fvu = float((x - sae.decode(sae.encode(x), x)).square().sum() / (x - x.mean(0)).square().sum())
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["reconstruction"]["fvu"] == pytest.approx(fvu, rel=1e-4)
    done(saekit_main("eval", "--suite", "dark_matter", "--pursuit", *flags, "--out", "dark.json", cwd=tmp_path))
    found = json.loads((tmp_path / "dark.json").read_text())["dark_matter"]
    assert found["random"]["fvu"] == pytest.approx(fvu, rel=0.1)  # of the half to test on
    assert found["pursuit"]["fvu"] < 0.1 * fvu


@pytest.fixture(scope="module")
def foreign(trained_run, tmp_path_factory):
    """The trained run as others would have written it, with plain thresholds and with TopK; and each here."""
    from saekit.commands.nearest import _top_k, nearest
    from saekit.evals import Evaluator

    home = tmp_path_factory.mktemp("foreign")
    sae = saekit.load(trained_run)
    thresholds = nearest(sae, "token_norm", str(trained_run), Evaluator(tokens=4096))
    for name, to, each in (
        ("thresholds", "dictionary_learning", thresholds),
        ("topk", "sparsify", _top_k(saekit.load(trained_run), 16)),
    ):
        each.save(home / name)
        folder = FORMATS[to].write(each, home / to)
        for config in (*folder.glob("c*.json"),):
            facts = json.loads(config.read_text())
            del facts["saekit"]
            config.write_text(json.dumps(facts))
    return home


def test_a_dictionary_of_dictionary_learning_is_judged_like_our_own(foreign, saekit_main, tmp_path):
    (foreign / "dictionary_learning/config.json").write_text(
        (foreign / "dictionary_learning/config.json").read_text().replace('"embedded"', "null")
    )
    command = ("eval", foreign / "dictionary_learning", "--tokens", 2000, "--quiet")
    told(saekit_main(*command, cwd=tmp_path), "does not say which model it belongs to; give --model and --hook")
    done(saekit_main(*command, *HOOK, "--out", "theirs.json", cwd=tmp_path))
    done(saekit_main("eval", foreign / "thresholds", "--tokens", 2000, "--quiet", "--out", "ours.json", cwd=tmp_path))
    theirs, ours = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("theirs", "ours"))
    for group, figure in (
        ("sparsity", "l0"), ("reconstruction", "fvu"), ("downstream", "ce_reconstructed"), ("downstream", "kl"),
    ):  # fmt: skip
        assert theirs[group][figure] == pytest.approx(ours[group][figure], rel=1e-4)
    assert theirs["reconstruction"]["fvu"] < 0.5


def test_the_dark_matter_of_a_dictionary_of_sparsify(foreign, saekit_main, tmp_path):
    for name, flags in (("sparsify", HOOK), ("topk", ())):
        command = ("eval", "--suite", "dark_matter", foreign / name, *flags, "--tokens", 3000, "--ce-tokens", 0)
        done(saekit_main(*command, "--quiet", "--out", f"{name}.json", cwd=tmp_path))
    theirs, ours = (json.loads((tmp_path / f"{name}.json").read_text())["dark_matter"] for name in ("sparsify", "topk"))
    for key in ("r2", "fvu_nonlinear"):
        assert theirs["document"]["plain"][key] == pytest.approx(ours["document"]["plain"][key], rel=1e-4)
