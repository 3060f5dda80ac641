"""Settings belong to their part: routed by name, refused where the part is not chosen, brought by strangers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from saekit import SaekitError
from saekit.settings import Settings, choices, fact, partial, setting
from saekit.trainers import VARIANTS, TrainConfig, Variant, train
from saekit.trainers.config import PARTS, variants_with


class Tempered(Variant):
    """TopK of another package, whose temperature is a setting of its own."""

    class Config(Settings):
        k: int = setting(32, gt=0, lt=2**31, description="mean number of active features a token")
        temperature: float = setting(1.0, gt=0, description="of nothing in particular")

    architecture = "topk"

    def allocate(self, batch):
        return batch.select.token_choice(self.k)

    def facts(self):
        return {"temperature": self.config.temperature}


@pytest.fixture
def tempered(monkeypatch):
    monkeypatch.setitem(VARIANTS, "tempered", Tempered)


def test_a_key_goes_to_the_part_that_owns_it():
    config = TrainConfig(variant="feature_choice", zipf_shift=2.0, hook="h", width=64, k=3, lr=0.1, seed=4, buffer=9)
    assert config.variant_settings.model_dump()["zipf_shift"] == config.zipf_shift == 2.0
    assert (config.source.hook, config.dictionary.width, config.optimizer.lr) == ("h", 64, 0.1)
    assert (config.run.seed, config.data.buffer, config.variant_settings.k) == (4, 9, 3)
    assert config.given == {"variant", "zipf_shift", "hook", "width", "k", "lr", "seed", "buffer"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"variant": "topk", "zipf_shift": 3},
            "zipf_shift belongs to feature_choice, frequency_control; this run has variant topk",
        ),
        ({"variant": "mutual_choice", "beta": 1}, "beta belongs to gradient_topk; this run has variant mutual_choice"),
        ({"tau": 0.1}, "tau belongs to aux_zipf; this run has auxiliary loss none"),
        ({"aux": "aux_k", "tau": 0.1}, "tau belongs to aux_zipf; this run has auxiliary loss aux_k"),
        ({"k_aux": 4}, "k_aux belongs to aux_k, aux_zipf; this run has auxiliary loss none"),
        ({"variant": "topk", "affinity_scale": "none"}, "affinity_scale belongs to mutual_choice, feature_choice"),
        ({"zipf_shfit": 3}, "unknown setting 'zipf_shfit'; did you mean 'zipf_shift'"),
        ({"aux": "aux_zip"}, "unknown auxiliary loss 'aux_zip'; did you mean 'aux_zipf'"),
    ],
)
def test_a_key_of_a_part_that_is_not_chosen_is_refused_by_name(values, message):
    with pytest.raises(SaekitError, match=re.escape(message)):
        TrainConfig(**values)


def test_the_command_line_refuses_it_too(saekit_main, tmp_path):
    done = saekit_main("train", "--variant", "topk", "--feature-choice-fraction", "0.3", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "saekit: feature_choice_fraction belongs to feature_choice; this run has variant topk\n",
    )
    assert not list(tmp_path.iterdir())


def test_a_strangers_settings_are_keys_and_flags(tempered, cache, tmp_path):
    from saekit.commands.train import train_flags

    config = TrainConfig(
        variant="tempered", temperature=0.5, cache=cache, width=48, k=4, tokens=1024, batch_size=256, out=tmp_path / "r"
    )
    assert TrainConfig.from_yaml(
        tmp_path / "a.yaml" if (tmp_path / "a.yaml").write_text(config.to_yaml()) else None
    ) == (config)
    flag = next(each for each in train_flags() if each.name == "temperature")
    assert flag.annotation.__metadata__[0].help == "tempered: of nothing in particular [default: 1.0]"
    run = train(config, quiet=True)
    assert run.sae.cfg.metadata["saekit"]["temperature"] == 0.5
    with pytest.raises(SaekitError, match=re.escape("temperature = 0.5, not 0.7")):
        train(config.replace(temperature=0.7), resume=True)
    with pytest.raises(SaekitError, match="temperature belongs to tempered"):
        TrainConfig(temperature=1.0)


@pytest.mark.parametrize(
    ("key", "of"),
    [("lr", "the part optimizer"), ("hook", "the part source"), ("variant", "variant"), ("tau", "tempered")],
)
def test_keys_that_clash_are_refused(key, of, monkeypatch):
    class Clashing(Variant):
        Config = type("Config", (Settings,), {"__annotations__": {key: int}, key: setting(1, description="another")})

    monkeypatch.setitem(VARIANTS, "tempered", Clashing)
    with pytest.raises(SaekitError, match=re.escape(of)):
        variants_with()


def test_facts_of_fields():
    config = TrainConfig(aux="aux_k")
    assert config.keys_with("resumable") == {"skip_bad_tokens", "log"}
    assert config.keys_with("own") == {"hook", "out", "width", "init", "k_aux"}
    assert config.fields.keys() - config.keys_with("decides") == {
        "out",
        "cache",
        "device",
        "log_every",
        "checkpoint_every",
        "model_device",
        "model_device_map",
        "harvest_batch",
    }
    assert config.keys_with("within_width") == {"k", "k_aux"}
    for kind in PARTS.values():
        assert all(fact(field, "decides") is not None for field in kind.model_fields.values())


def test_partial_settings_are_none_until_they_are_given():
    kind = partial(PARTS["source"])
    assert not kind().model_dump(exclude_none=True)
    assert kind(skip_first=3).skip_first == 3
    assert choices(kind.model_fields["model_dtype"]) == ("auto", "float32", "bfloat16", "float16")
    with pytest.raises(SaekitError, match="skip_first = 0"):
        kind(skip_first=0)


# as every run wrote it before settings belonged to their part
BEFORE = """\
variant: topk
out: {out}
model: embedded
hook: null
dataset: python
column: text
split: train
dataset_config: null
streaming: true
context_length: null
skip_first: 1
max_norm: null
cache: {cache}
buffer: 131072
width: 48
expansion: 16.0
k: 4
affinity_scale: token_norm
feature_choice_fraction: 0.1
budgets: zipf
zipf_exponent: null
zipf_shift: null
beta: 1.0
aux: none
aux_alpha: 0.03125
k_aux: 6
tau: 0.1
tokens: 2048
batch_size: 256
lr: 0.004
warmup: 0.05
decay: 0.3
clip: 1.0
dead_after: 256
seed: 0
device: cpu
precision: fp32
dtype: float32
skip_bad_tokens: false
calibration_tokens: 262144
log_every: 1
checkpoint_every: 4
log: []
"""


def test_a_run_of_before_goes_on(cache, tmp_path, monkeypatch):
    from saekit.trainers import checkpoint

    keys = {"variant": "topk", "cache": cache, "width": 48, "k": 4, "tokens": 2048, "batch_size": 256, "log_every": 1}
    keys |= {"device": "cpu", "precision": "fp32", "lr": 0.004, "dead_after": 256, "checkpoint_every": 4}
    whole = train(TrainConfig(**keys, out=tmp_path / "whole"), quiet=True)
    old = tmp_path / "old"
    train(TrainConfig(**keys, out=old), quiet=True)
    for path in (old / "sae").iterdir():
        path.unlink()
    (old / "config.yaml").write_text(BEFORE.format(out=old, cache=cache))
    checkpoints = checkpoint.checkpoints(old / "checkpoints")
    checkpoints[8].unlink()
    _, (state,) = checkpoint.load_checkpoints([old / "checkpoints"], torch.device("cpu"))
    state.pop("learned")
    state["passport"] = state.pop("provenance")
    state["config"] = {
        **state["config"],
        "dtype": state["config"].pop("model_dtype"),
        "beta": 1.0,
        "tau": 0.1,
        "k_aux": 6,
    }
    for newer in ("prepend_bos", "pool", "data_seed"):
        state["config"].pop(newer)
    checkpoint.save_checkpoint(old / "checkpoints", 4, state)
    again = train(TrainConfig.from_yaml(old / "config.yaml", of_a_run=True), resume=True, quiet=True)
    name = Path("sae/sae_weights.safetensors")
    assert (again.path / name).read_bytes() == (whole.path / name).read_bytes()
    assert [json.loads(line)["step"] for line in (old / "metrics.jsonl").read_text().splitlines()] == [*range(1, 9)]
