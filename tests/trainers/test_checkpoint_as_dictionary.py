"""Every checkpoint is a dictionary."""

from __future__ import annotations

import json

import pytest
import torch
from test_step import config

import saekit
from saekit import SaekitError
from saekit.activations import ActivationCache
from saekit.trainers import train
from saekit.trainers.checkpoint import save_checkpoint


@pytest.mark.parametrize("variant", ["topk", "relu", "jumprelu", "gated"])
def test_the_last_one_is_the_finished_dictionary(cache, tmp_path, variant):
    run = train(config(cache, tmp_path, variant=variant), quiet=True)
    last = saekit.load(run.path / "checkpoints")
    assert vars(last.cfg) == json.loads(json.dumps(vars(run.sae.cfg)))
    for name, value in run.sae.state_dict().items():
        torch.testing.assert_close(last.state_dict()[name], value, msg=name)


@pytest.mark.parametrize("affinity_scale", ["none", "token_norm"])
def test_mutual_choice_has_the_threshold_of_its_training(cache, tmp_path, affinity_scale):
    cfg = config(cache, tmp_path, variant="mutual_choice", affinity_scale=affinity_scale, tokens=128 * 400)
    run = train(cfg, quiet=True)  # in far shorter ones the threshold falls faster than its running mean follows
    x = ActivationCache.open(cache).read(0, 6000).x
    assert saekit.load(run.path / "checkpoints").encode_sparse(x).l0 == pytest.approx(cfg.k, rel=0.05)


@pytest.mark.parametrize("variant", ["feature_choice", "frequency_control"])
def test_thresholds_of_each_feature(cache, tmp_path, variant):
    run = train(config(cache, tmp_path, variant=variant), quiet=True)
    last = saekit.load(run.path / "checkpoints")
    assert last.threshold.unique().numel() > 1
    assert torch.equal(last.W_dec, run.sae.W_dec)


def test_one_that_tells_nothing_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, 5, {"sae": {"W_enc": torch.zeros(3, 5)}})
    with pytest.raises(SaekitError, match="does not tell how to read it as a dictionary"):
        saekit.load(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SaekitError, match="damaged"):
        saekit.load(path)
