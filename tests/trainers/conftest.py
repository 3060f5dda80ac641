"""Shared by the tests of training."""

from __future__ import annotations

import typing
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from saekit import SaekitError
from saekit.activations import ActivationCache
from saekit.trainers import TrainConfig
from saekit.trainers.loop import take_steps


@pytest.fixture
def cache(tmp_path):
    """Activations with structure: sparse sums of 40 directions in 12 dimensions, off centre and of odd scale."""
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(40, 12), dim=1)
    strengths = torch.relu(torch.randn(6000, 40) - 1.2)
    x = 7.3 * (strengths @ directions) + torch.linspace(-3, 8, 12)
    ActivationCache.from_tensor(tmp_path / "cache", x, gradients=torch.randn(6000, 12) * 1e-3)
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def lm_activations(source, tmp_path_factory):
    """A cache of 60,000 tokens of the embedded model."""
    path = tmp_path_factory.mktemp("lm") / "cache"
    ActivationCache.write(path, source.batches("train", 60_000), source.provenance("train"))
    return path


@pytest.fixture(scope="module")
def text(source, tmp_path_factory):
    """A small text; whoever loads a model gets the one that is loaded."""
    path = tmp_path_factory.mktemp("text") / "typing.txt"
    path.write_text(Path(typing.__file__).read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saekit.activations.source.load_model", lambda *_, **__: source.model)
        yield str(path)


@pytest.fixture(scope="module")
def live(text):
    """Configs of short runs on that text: of a folder, and of settings that differ."""

    def make(out, **changes):
        base = {"out": out, "dataset": text, "context_length": 64, "device": "cpu", "buffer": 2048, "expansion": 0.5}
        base |= {"k": 8, "batch_size": 256, "tokens": 256 * 24, "calibration_tokens": 1000}
        return TrainConfig(**{**base, "log_every": 4, "checkpoint_every": 8, **changes})

    return make


@pytest.fixture
def stopped_at(monkeypatch):
    """``with stopped_at(step):`` a run of one dictionary raises "stopped" there."""

    @contextmanager
    def context(step):
        def stops(lanes, quiet):
            ((trainer,),) = (lane.trainers for lane in lanes)
            advance = trainer.advance

            def until(rows):
                if trainer.step == step:
                    raise SaekitError("stopped")
                return advance(rows)

            trainer.advance = until
            return take_steps(lanes, quiet)

        with monkeypatch.context() as patch:
            patch.setattr("saekit.trainers.many.take_steps", stops)
            yield

    return context
