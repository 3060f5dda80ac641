"""Checkpoints: what goes in comes out, the newest two are kept, a damaged one gives way to the one before."""

from __future__ import annotations

import math

import pytest
import torch
from test_step import config

from saekit import SaekitError
from saekit.files import locked
from saekit.trainers import train
from saekit.trainers.checkpoint import checkpoints, load_checkpoints, save_checkpoint
from saekit.trainers.trainer import Trainer

CPU = torch.device("cpu")


def state(seed):
    torch.manual_seed(seed)
    return {
        "sae": {"W_enc": torch.randn(5, 3).T, "empty": torch.zeros(0, 3), "whole": torch.tensor([1, 2**40])},
        "moments": {"a": [torch.randn(2), torch.randn(2).double()]},
        "numbers": [0.1, 1e-300, math.inf, -math.inf, 2**60, None, True, "text", [], {}],
    }


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def test_what_goes_in_comes_out(tmp_path):
    save_checkpoint(tmp_path, 7, state(0))
    step, (found,) = load_checkpoints([tmp_path], CPU)
    assert step == 7
    assert equal(found, state(0))
    assert not equal(found, state(1))


def test_the_newest_two_are_kept(tmp_path):
    for step in (5, 10, 100, 20):
        save_checkpoint(tmp_path, step, state(step))
    assert list(checkpoints(tmp_path)) == [20, 100]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-100.safetensors", "step-20.safetensors"]


def test_a_damaged_one_gives_way_to_the_one_before(tmp_path, capsys):
    for step in (5, 10):
        save_checkpoint(tmp_path, step, state(step))
    newest = tmp_path / "step-10.safetensors"
    content = bytearray(newest.read_bytes())
    content[-3] ^= 1
    newest.write_bytes(content)
    (tmp_path / "step-15.safetensors.part").write_bytes(b"killed here")
    step, (found,) = load_checkpoints([tmp_path], CPU)
    assert step == 5
    assert equal(found, state(5))
    assert "step-10.safetensors' is damaged" in capsys.readouterr().err
    assert not (tmp_path / "step-15.safetensors.part").exists()
    (tmp_path / "step-5.safetensors").write_bytes(b"")
    with pytest.raises(SaekitError, match=r"every checkpoint is damaged \('.*step-10.*', '.*step-5"):
        load_checkpoints([tmp_path], CPU)
    assert load_checkpoints([tmp_path / "none"], CPU) is None


def test_several_folders_go_on_from_a_step_that_all_have(tmp_path, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    for step in (5, 10):
        save_checkpoint(a, step, state(step))
    save_checkpoint(b, 5, state(50))
    step, found = load_checkpoints([a, b], CPU)
    assert step == 5
    assert equal(found, [state(5), state(50)])
    save_checkpoint(b, 10, state(100))
    (a / "step-10.safetensors").write_bytes(b"damaged")
    step, found = load_checkpoints([a, b], CPU)
    assert step == 5
    assert equal(found, [state(5), state(50)])
    assert load_checkpoints([a, tmp_path / "none"], CPU) is None


@pytest.mark.parametrize("damage", ["newest", "both"])
def test_a_run_goes_on_from_a_whole_checkpoint_or_not_at_all(cache, tmp_path, monkeypatch, damage, capsys):
    whole = train(config(cache, tmp_path, out=tmp_path / "whole"), quiet=True)
    cfg = config(cache, tmp_path, checkpoint_every=20)
    monkeypatch.setattr(Trainer, "finish", lambda self: None)
    train(cfg, quiet=True)
    monkeypatch.undo()
    found = checkpoints(cfg.out / "checkpoints")
    assert list(found) == [40, 50]
    for step, path in found.items():
        if damage == "both" or step == 50:
            path.write_bytes(path.read_bytes()[:-1])
    if damage == "both":
        with pytest.raises(SaekitError, match="every checkpoint is damaged"):
            train(cfg, resume=True, quiet=True)
        return
    resumed = train(cfg, resume=True, quiet=True)
    assert "step-50.safetensors' is damaged" in capsys.readouterr().err
    for name, value in whole.sae.state_dict().items():
        assert torch.equal(value, resumed.sae.state_dict()[name]), name


def test_a_config_that_was_changed_by_hand_is_noticed(cache, tmp_path, monkeypatch):
    cfg = config(cache, tmp_path)
    monkeypatch.setattr(Trainer, "finish", lambda self: None)
    train(cfg, quiet=True)
    monkeypatch.undo()
    written = cfg.out / "config.yaml"
    written.write_text(written.read_text().replace("lr: 0.003", "lr: 0.004"))
    with pytest.raises(SaekitError, match="has another lr than the checkpoint, which has lr = 0.003"):
        train(cfg.replace(lr=0.004), resume=True, quiet=True)


def test_a_damaged_dictionary_of_a_finished_run_is_made_again(cache, tmp_path):
    cfg = config(cache, tmp_path)
    first = train(cfg, quiet=True)
    weights = cfg.out / "sae/sae_weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(SaekitError, match="its seal is broken; without the folder .*, --resume makes it again"):
        train(cfg, resume=True, quiet=True)
    for path in (cfg.out / "sae").iterdir():
        path.unlink()
    assert torch.equal(train(cfg, resume=True, quiet=True).sae.W_dec, first.sae.W_dec)


def test_a_run_that_another_process_holds_is_left_alone(cache, tmp_path, monkeypatch):
    cfg = config(cache, tmp_path)
    monkeypatch.setattr(Trainer, "finish", lambda self: None)
    train(cfg, quiet=True)
    monkeypatch.undo()
    with locked(cfg.out, "training"):
        for manner in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(SaekitError, match="another process is training"):
                train(cfg, **manner, quiet=True)
    assert list(checkpoints(cfg.out / "checkpoints")) == [50]
    assert train(cfg, resume=True, quiet=True).sae.cfg.d_sae == 64
