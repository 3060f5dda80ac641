"""Runs that start from a dictionary: they begin where it ended, whatever the units, and tell of it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import saekit
from saekit import SAEConfig, SaekitError, SparseAutoencoder
from saekit.card import card
from saekit.trainers import TrainConfig, train
from saekit.trainers.dictionary import Units
from saekit.trainers.initial import start_from, with_initial_width

pytestmark = pytest.mark.usefixtures("text")
WEIGHTS = "sae/sae_weights.safetensors"
UNITS = Units(torch.linspace(-3, 2, 12), 1.7)


def first_fvu(run):
    with (run.path / "metrics.jsonl").open() as lines:
        return json.loads(next(lines))["fvu"]


@pytest.fixture(scope="module")
def before(live, tmp_path_factory):
    return train(live(tmp_path_factory.mktemp("init") / "before", k=16, width=300, variant="topk"), quiet=True)


def test_a_run_begins_where_the_dictionary_ended(live, before, tmp_path):
    ended = [json.loads(line)["fvu"] for line in (before.path / "metrics.jsonl").open()][-1]
    again = {"k": 16, "width": 300, "variant": "topk", "log_every": 1, "tokens": 1024}
    fresh = train(live(tmp_path / "fresh", **again), quiet=True)
    warm = train(live(tmp_path / "warm", **again, init=str(before.path)), quiet=True)
    assert with_initial_width(TrainConfig(init=str(before.path), out=tmp_path)).width == 300
    assert first_fvu(warm) < ended + 0.05 < first_fvu(fresh) - 0.2
    other = {**again, "hook": "blocks.0.hook_resid_post", "variant": "mutual_choice"}
    layer = train(live(tmp_path / "layer", **other, init=str(before.path)), quiet=True)
    assert layer.sae.cfg.d_sae == 300
    told = warm.sae.cfg.metadata["saekit"]["init"]
    assert told["path"] == str(before.path)
    assert f"| started from | `{before.path.name}`" in card(warm.path)


def test_a_run_goes_on_without_the_dictionary_that_it_started_from(live, before, tmp_path):
    place = shutil.copytree(before.path / "sae", tmp_path / "initial")
    cell = {"k": 8, "variant": "topk", "width": 300, "init": str(place), "checkpoint_every": 4}
    whole = train(live(tmp_path / "whole", **cell), quiet=True)
    half = train(live(tmp_path / "half", **cell), quiet=True)
    shutil.rmtree(half.path / "sae")
    for file in sorted((half.path / "checkpoints").iterdir(), key=lambda file: int(file.stem.split("-")[1]))[1:]:
        file.unlink()
    shutil.rmtree(place)
    on = train(live(tmp_path / "half", **cell), quiet=True, resume=True)
    assert all(
        torch.equal(a, b) for a, b in zip(on.sae.state_dict().values(), whole.sae.state_dict().values(), strict=True)
    )
    assert on.sae.cfg.metadata["saekit"]["init"] == whole.sae.cfg.metadata["saekit"]["init"]
    with pytest.raises(SaekitError, match="there is no dictionary at"):
        train(live(tmp_path / "new", **cell), quiet=True)


def made(architecture="standard", *, norms=1.0, d_sae=20, **more):
    """A dictionary of random weights whose decoder rows have these norms, one feature of zeros."""
    torch.manual_seed(0)
    sae = SparseAutoencoder(SAEConfig(12, d_sae, architecture, **more))
    with torch.no_grad():
        for weight in sae.state_dict().values():
            weight.copy_(torch.randn_like(weight))
        sae.W_dec.mul_(norms / sae.W_dec.norm(dim=1, keepdim=True))
        if sae.threshold is not None:
            sae.threshold.abs_()
    return sae


@pytest.mark.parametrize(
    ("architecture", "more"),
    [
        ("standard", {"norms": 1.0}),
        ("standard", {"norms": 2.5, "apply_b_dec_to_input": False}),
        ("jumprelu", {"norms": 0.3, "apply_b_dec_to_input": False}),
        ("jumprelu", {"norms": 1.0}),
        ("topk", {"k": 5, "apply_b_dec_to_input": False}),
    ],
)
def test_what_is_trained_reconstructs_what_the_dictionary_does(architecture, more, tmp_path):
    other = made(architecture, **more)
    other.save(tmp_path / "other")
    own = SparseAutoencoder(SAEConfig(12, 20, architecture, k=more.get("k")))
    start_from(str(tmp_path / "other"), own, UNITS)
    x = 3 * torch.randn(50, 12)
    torch.testing.assert_close(own(UNITS(x.clone())) / UNITS.scale + UNITS.centre, other(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own.W_dec.norm(dim=1), torch.ones(20))


def test_what_cannot_be_started_from_is_named(tmp_path):
    own = SparseAutoencoder(SAEConfig(12, 20, "topk", k=4))
    for name, other, told in (
        ("narrow", made("topk", k=4, d_sae=19), "the run has d_sae = 20, the dictionary '.*narrow' 19"),
        ("norms", made("topk", k=4, norms=2.0), "have norms of 2 to 2"),
        ("layer", made(input_normalization="layer_norm"), "normalises its input"),
    ):
        other.save(tmp_path / name)
        with pytest.raises(SaekitError, match=told):
            start_from(str(tmp_path / name), own, UNITS)


def test_a_silent_row_stays_as_it_has_begun(tmp_path):
    other = made()
    with torch.no_grad():
        other.W_dec[3] = 0
    other.save(tmp_path / "other")
    own = made(architecture="standard")
    row = own.W_dec[3].clone()
    start_from(str(tmp_path / "other"), own, UNITS)
    assert torch.equal(own.W_dec[3], row)
    assert saekit.load(tmp_path / "other").W_dec[3].norm() == 0
