"""Values of the wrong kind in files that are otherwise whole: one line, no traceback."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from hostile import RESUME, ends
from safetensors.torch import save_file

from saekit import SaekitError, activations
from saekit.evals import Evaluator
from saekit.seal import BLANK, stamp_file
from saekit.trainers.checkpoint import checkpoints, load_checkpoints, save_checkpoint


@pytest.mark.parametrize("odd", [5, True, "", "a", "\0", "\ud800", [1], ["a"], {"a": 1}], ids=repr)
def test_odd_metadata_of_a_dictionary(odd, place, source, monkeypatch):
    """It is of others; what it tells is not taken for what it should be."""
    monkeypatch.setattr("saekit.activations.source.load_model", lambda name, **_: load_model(name, source.model))
    monkeypatch.chdir(place)
    cfg = json.loads((place / "sae/cfg.json").read_text())
    known = {"model_name": "embedded", "hook_name": "hook_embed", "dataset_path": "text.txt"}
    unexpected = []
    for metadata in (
        {"saekit": odd},
        {"saekit": {"cache": odd}},
        {"saekit": {"provenance": odd}},
        {"saekit": {"cache": "cache", "provenance": odd}},
        {**known, "model_name": odd},
        {**known, "hook_name": odd},
        {**known, "dataset_path": odd} if odd else {"saekit": {"provenance": {"dataset": odd}}},
        {**known, "context_size": odd},
        {**known, "saekit": {"provenance": {"column": odd, "dataset_split": odd}}},
        {**known, "saekit": {"provenance": {"model_dtype": odd}}},
        odd,
    ):
        (place / "sae/cfg.json").write_text(json.dumps({**cfg, "metadata": metadata}))
        try:
            Evaluator(tokens=100)("sae")
        except SaekitError:
            continue
        except Exception as error:
            unexpected.append(f"{metadata}: {type(error).__name__} {error}")
    assert not unexpected


def load_model(name, embedded):
    """The model of a name; the embedded one is there already."""
    return embedded if name == "embedded" else activations.load_model(name)


PLANS = (
    "runs: 5",
    "runs: [a]",
    "runs: {}",
    "runs: {5: {}}",
    "runs: {a: 5}",
    "runs: {a: {5: 6}}",
    "runs: {../../x: {dataset: text.txt, context_length: 8}}",
    "runs: {/x: {dataset: text.txt, context_length: 8}}",
    "runs: {..: {dataset: text.txt, context_length: 8}}",
    "runs: {a: {out: elsewhere}}",
    "runs: {a: {tokens: -1}}",
    "runs: {a: {config: x}}",
    "runs: {a: {cache: cache}}",
    "more: {}",
)


@pytest.mark.parametrize("text", PLANS)
def test_odd_plans_of_several_runs(text, place, saekit_main):
    (place / "several/sweep.yaml").write_text(text + "\n")
    ends(saekit_main("train", "--resume", "--out", "several", "--quiet", cwd=place), 2)
    assert sorted(path.name for path in (place / "several").iterdir()) == ["sweep.yaml"]
    assert not (place / "elsewhere").exists()


def test_odd_states_in_a_checkpoint_with_a_good_seal(place, saekit_main):
    """Whoever can seal a checkpoint can write anything into it; the command ends in a line that is no traceback."""
    folder = place / "stopped/checkpoints"
    _, (good,) = load_checkpoints([folder], torch.device("cpu"))
    narrow = {name: tensor[..., :3] for name, tensor in good["sae"].items()}
    odd = [{**good, key: value} for key in good for value in (5, "a", [], torch.ones(2), {"a": 1})]
    odd += [{key: value for key, value in good.items() if key != left_out} for left_out in good]
    odd += [{"a": 1}, {**good, "sae": narrow}, {**good, "step": 10**9}, {**good, "step": -1}]
    odd += [{**good, "stream": {**good["stream"], "more": 1}}, {**good, "stream": {**good["stream"], "pieces": "a"}}]
    for state in odd:
        for path in checkpoints(folder).values():
            path.unlink()
        save_checkpoint(folder, 8, state)
        shutil.rmtree(place / "stopped/sae", ignore_errors=True)
        done = saekit_main(*RESUME.split(), cwd=place)
        assert "Traceback" not in done.stderr
        assert done.returncode == 0 or done.stderr.splitlines()[-1].startswith("saekit: ")


FACTS = (
    *(5, "a", None, [], {}, {"format": 3}, {"format": 3, "state": 5}, {"format": 3, "state": {}}, {"format": "3"}),
    *(
        {"format": 3, "state": {"tensor": "none"}},
        {"format": 3, "state": {"tensor": 5}},
        {"format": 3, "state": {"list": 5}},
    ),
    *(
        {"format": 3, "state": {"dict": [1]}},
        {"format": 3, "state": {"a": 1, "b": 2}},
        {"format": [3], "state": {"value": 1}},
    ),
    *({"format": 3, "state": {"value": 1}}, {"format": 3, "state": {"list": [{"value": 1}]}}, "deep", "digits"),
)


@pytest.mark.parametrize("facts", FACTS, ids=lambda facts: json.dumps(facts)[:40])
def test_odd_facts_in_a_checkpoint_with_a_good_seal(facts, place, saekit_main):
    text = json.dumps({"seal": BLANK, **facts}) if isinstance(facts, dict) else json.dumps([BLANK, facts])
    if facts in ("deep", "digits"):
        value = "[" * 100_000 if facts == "deep" else "9" * 100_000
        text = f'{{"seal": "{BLANK}", "format": 3, "state": {{"value": {value}'
    for path in checkpoints(place / "stopped/checkpoints").values():
        save_file({"a": torch.ones(2)}, path, {"saekit": text})
        stamp_file(path)
    ends(saekit_main(*RESUME.split(), cwd=place), 2)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "k: 0x" + "f" * 5000,
            "k: 0b" + "1" * 60000,
            "k: 1" + ":1" * 3000,
            "0x" + "f" * 5000 + ": 1",
            "k: {0x" + "f" * 5000 + ": 1}",
        ),
        *('variant: "\\ud800"', '"\\ud800": 1', "out: ~nobody-of-this-name/x", "cache: ~nobody-of-this-name/x"),
        *(
            'dataset: "a\\0b*"',
            'model: "a\\0b"',
            'out: "a\\0b"',
            'hook: "\\ud800"',
            'device: "cpu:\\0"',
        ),
    ],
    ids=lambda text: text[:30],
)
def test_values_that_only_yaml_has(text, place, saekit_main):
    settings = "dataset: text.txt\nout: new\n"
    key = text.split(":")[0]
    lines = [line for line in settings.splitlines() if not line.startswith(f"{key}:")]
    (place / "new.yaml").write_text("\n".join([*lines, text]) + "\n")
    ends(saekit_main("train", "--config", "new.yaml", "--quiet", cwd=place), 2)
    assert not (place / "new").exists()


@pytest.mark.parametrize(
    "command",
    [
        "info {}",
        "eval {}",
        "train --cache {}",
        "train --out {}",
        "train --model {}",
        "cache --out {}",
        "cache verify {}",
        "cache repair {}",
        "convert sae {}",
        "cache --dataset {} --out new",
    ],
)
def test_the_home_of_nobody(command, place, saekit_main):
    ends(saekit_main(*command.format("~nobody-of-this-name/x").split(), cwd=place), 2)
