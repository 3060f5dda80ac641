"""Pickles and scripts offered under every name that is read: nothing in them runs."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import EMBEDDED, LIVE, RESUME, RESUME_CACHE, ends, payloads, read_all, vouch_for
from safetensors.torch import load_file

from saekit.activations import open_text
from saekit.activations.repair import verify
from saekit.errors import SaekitError
from saekit.trainers.checkpoint import checkpoints


def test_the_pickles_would_work(tmp_path):
    for number, (kind, content) in enumerate(payloads(tmp_path / "made").items()):
        stream = io.BytesIO(content)
        if "torch" in kind:
            torch.load(stream, weights_only=False)
        elif "numpy" in kind:
            np.load(stream, allow_pickle=True)
        else:
            pickle.load(stream)
        (tmp_path / "made").rename(tmp_path / f"made by {number}")


PICKLES = {  # name of the file, the command that comes upon it, and the exit code: 0 where it is not read at all
    "sae/cfg.json": ("info sae", 2),
    "sae/sae_weights.safetensors": ("convert sae new", 2),
    "dictionary_learning/config.json": ("info dictionary_learning", 2),
    "dictionary_learning/ae.pt": ("info dictionary_learning", 2),
    "sparsify/sae.safetensors": ("convert sparsify new", 2),
    "params.npz": ("info params.npz", 2),
    "params.safetensors": ("info params.safetensors", 2),
    "any.pt": ("convert any.pt new", 2),
    "finished/sae/sae_weights.safetensors": ("eval finished --cache cache", 2),
    "finished/sae/cfg.json": ("train --resume --out finished", 2),
    "finished/eval.json": ("train --resume --out finished --quiet", 2),
    "finished/statistics.safetensors": ("train --resume --out finished --eval-tokens 0", 0),
    "cache/manifest.json": ("train --cache cache --out new", 2),
    "cache/shard-00000.safetensors": ("cache verify cache --quiet", 2),
    "begun.part/harvest.jsonl": (RESUME_CACHE, 2),
    "begun.part/manifest.json": (RESUME_CACHE, 2),
    "stopped/checkpoints/step-8.safetensors": (RESUME, 0),
    "stopped/checkpoints/step-10.safetensors": (RESUME, 0),
    "stopped/checkpoints/step-10.pt": (RESUME, 2),
    "stopped/config.yaml": (RESUME, 2),
    "stopped/metrics.jsonl": (RESUME, 0),
    "stopped/statistics.safetensors": (RESUME, 0),
    "stopped/eval.json": (RESUME, 2),
    "several/sweep.yaml": ("train --resume --out several", 2),
    "new.yaml": ("train --config new.yaml", 2),
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_in_place_of_a_file(name, place, marker, saekit_main):
    command, code = PICKLES[name]
    for kind, content in payloads(marker).items():
        again = Path(shutil.copytree(place, place.with_name(kind)))
        (again / name).write_bytes(content)
        ends(saekit_main(*command.split(), cwd=again), code)
        assert not marker.exists(), kind


def test_a_pickle_as_each_checkpoint(place, marker, saekit_main):
    for content in payloads(marker).values():
        for path in checkpoints(place / "stopped/checkpoints").values():
            path.write_bytes(content)
        done = saekit_main(*RESUME.split(), cwd=place)
        ends(done, 2)
        assert "every checkpoint is damaged" in done.stderr


def test_a_pickle_as_a_shard_that_the_manifest_vouches_for(place, marker, saekit_main):
    path = place / "cache/shard-00002.safetensors"
    size = path.stat().st_size
    for content in payloads(marker).values():
        path.write_bytes(content.ljust(size, b"\0"))
        vouch_for(place / "cache", 2)
        assert verify(place / "cache") == []
        for command in ("train --out new --tokens 640 --batch-size 64 --width 16 --k 2", "eval sae"):
            done = saekit_main(*f"{command} --quiet --cache cache".split(), cwd=place)
            ends(done, 2)
            assert "shard-00002.safetensors" in done.stderr


MODEL_FILES = {  # the exit codes; versions of transformers differ in whether they look at some of the files
    "model.safetensors": (2,),
    "pytorch_model.bin": (2,),
    "config.json": (2,),
    "tokenizer.json": (2,),
    "tokenizer_config.json": (2,),
    "generation_config.json": (0, 2),
    "special_tokens_map.json": (0, 2),
    "added_tokens.json": (0, 2),
    "chat_template.jinja": (0, 2),
    "adapter_model.bin": (0, 2),
}


@pytest.fixture
def model(place):
    """The model in that copy, whole, beside text for it."""
    shutil.copy(EMBEDDED / "model.safetensors", place / "model")
    return place / "model"


@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_pickle_in_a_model(name, model, marker, saekit_main):
    if name == "pytorch_model.bin":
        (model / "model.safetensors").unlink()
    for kind, content in payloads(marker).items():
        if kind == "zip of torch" or MODEL_FILES[name] == (2,):
            (model / name).write_bytes(content)
            ends(saekit_main(*LIVE.split(), "--overwrite", cwd=model.parent), *MODEL_FILES[name])
            assert not marker.exists()


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("part", ["pytorch_model-00001.bin", "model-00001.safetensors", "../evil.bin"])
def test_a_pickle_that_an_index_names(index, part, model, marker, saekit_main):
    names = list(load_file(model / "model.safetensors"))
    (model / "model.safetensors").unlink()
    (model / index).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, part)}))
    (model / part).write_bytes(payloads(marker)["zip of torch"])
    ends(saekit_main(*LIVE.split(), cwd=model.parent), 2)


def with_code(model, marker, kind):
    """Give a model code of its own, as a file that its configuration names."""
    code = f"import os\nos.path.isdir({str(marker)!r}) or os.mkdir({str(marker)!r})\n"
    config = json.loads((model / "config.json").read_text())
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    if kind == "tokenizer":
        code += "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast): pass\n"
        tokenizer |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    else:
        config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
        code += (
            "from transformers import LlamaConfig, LlamaForCausalLM\n"
            f"class OwnConfig(LlamaConfig): model_type = {'llama' if kind == 'known model' else 'own'!r}\n"
            "class Own(LlamaForCausalLM): config_class = OwnConfig\n"
        )
        if kind == "unknown model":
            config["model_type"] = "own"
    (model / "own.py").write_text(code)
    (model / "config.json").write_text(json.dumps(config))
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize("kind", ["known model", "unknown model", "tokenizer"])
def test_the_code_of_a_model_runs_only_where_it_is_trusted(kind, model, tmp_path, monkeypatch, saekit_main):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    marker = tmp_path / "EXECUTED"
    with_code(model, marker, kind)
    done = saekit_main(*LIVE.split(), cwd=model.parent)
    assert not marker.exists()
    ends(done, 0, 2)  # an architecture that transformers has itself needs no code
    if kind == "unknown model":
        assert "--trust-remote-code" in done.stderr
    saekit_main(*LIVE.split(), "--overwrite", "--trust-remote-code", cwd=model.parent)
    assert marker.is_dir(), "it was asked for"


YAML_TAGS = (
    "!!python/object/apply:os.mkdir [{marker}]",
    "!!python/object/apply:os.system ['mkdir {marker}']",
    "!!python/object/new:os.mkdir [{marker}]",
    "!!python/object/apply:subprocess.call [[mkdir, {marker}]]",
    "!!python/object/new:type {{args: [x, !!python/tuple [], {{extend: !!python/name:os.mkdir }}], state: {marker}}}",
    "!!python/object:pathlib.Path {{_raw_paths: [{marker}]}}",
    "!!python/name:os.mkdir",
    "!!python/module:os",
    "!!python/tuple [1]",
    "!<tag:yaml.org,2002:python/object/apply:os.mkdir> [{marker}]",
)


@pytest.mark.parametrize("tag", YAML_TAGS)
def test_tags_of_yaml(tag, place, marker, saekit_main):
    tagged = tag.format(marker=marker)
    for text in (
        tagged,
        f"k: {tagged}",
        f"out: {tagged}",
        f"? {tagged}\n: 3",
        f"%TAG ! tag:yaml.org,2002:\n---\nk: {tagged[1:]}",
    ):
        (place / "new.yaml").write_text(text + "\n")
        ends(saekit_main("train", "--config", "new.yaml", cwd=place), 2)
    (place / "stopped/config.yaml").write_text(f"k: {tagged}\n")
    ends(saekit_main(*RESUME.split(), cwd=place), 2)
    for text in (
        tagged,
        f"runs: {tagged}",
        f"runs: {{a: {tagged}}}",
        f"runs: {{a: {{k: {tagged}}}}}",
    ):
        (place / "several/sweep.yaml").write_text(text + "\n")
        ends(saekit_main("train", "--resume", "--out", "several", cwd=place), 2)


@pytest.mark.parametrize(
    "suffix", [".txt", ".md", ".json", ".jsonl", ".parquet", ".pkl", ".pt", ".arrow", ".csv", ".py", ""]
)
def test_a_pickle_as_text(suffix, tmp_path, marker):
    for kind, content in payloads(marker).items():
        path = tmp_path / f"text{suffix}"
        path.write_bytes(content)
        found = read_all(path)
        assert not marker.exists(), kind
        assert found is None or suffix in (".txt", ".md"), "text is what can be read as UTF-8"
        folder = tmp_path / f"folder{kind}"
        folder.mkdir()
        shutil.copy(path, folder / f"train{suffix}")
        read_all(folder)
        assert not marker.exists(), kind


@pytest.mark.parametrize(
    "name",
    [
        *("saved/state.json", "saved/dataset_info.json", "saved/data-00000-of-00001.arrow", "splits/dataset_dict.json"),
        *("splits/train/state.json", "splits/train/dataset_info.json", "splits/train/data-00000-of-00001.arrow"),
    ],
)
def test_a_pickle_in_a_saved_dataset(name, saved, marker):
    for content in payloads(marker).values():
        (saved / name).write_bytes(content)
        assert read_all(saved / name.split("/")[0]) is None


def test_a_pickle_in_the_schema_of_a_table(saved, marker):
    """Versions of pyarrow before 15 unpickled types of extensions that they came upon."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    mark = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": payloads(marker)["pickle"]}
    field = pa.field("text", pa.string(), metadata=mark)
    table = pa.Table.from_arrays([pa.array([f"document {i}" for i in range(50)])], schema=pa.schema([field]))
    with (
        pa.OSFile(str(saved / "saved/data-00000-of-00001.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as out,
    ):
        out.write_table(table)
    read_all(saved / "saved")
    pq.write_table(table, saved / "x.parquet")
    read_all(saved / "x.parquet")
    shutil.copy(saved / "saved/data-00000-of-00001.arrow", saved / "splits/train.arrow")


def dataset_folders(home, marker):
    """Folders whose files the datasets library might unpickle or run."""
    content, code = payloads(marker)["pickle"], f"import os; os.mkdir({str(marker)!r})\n"

    def folder(name, **files):
        (home / name).mkdir()
        for file, data in files.items():
            (home / name / file.replace("__", ".")).write_bytes(data if isinstance(data, bytes) else data.encode())
        return home / name

    card = "---\nconfigs:\n- config_name: default\n  data_files: {}\n---\n"
    yield folder("pickles", train__pkl=content)
    yield folder("script", script__py=code)
    yield folder("script_and_text", script_and_text__py=code, train__txt="some text\n" * 100)
    yield folder("named", README__md=card.format("x.pkl"), x__pkl=content)
    yield folder("named_py", README__md=card.format("x.py"), x__py=code)
    yield folder("builder", README__md="---\nbuilder_name: pandas\n---\n", train__pkl=content)
    yield folder("module", README__md=card.format("x.txt"), x__txt=content, pandas__py=code, text__py=code)
    yield folder("joblib", train__joblib=content, train__pickle=content, train__pt=content, train__npy=content)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name in ("0.pkl", "0.pyd", "0.pickle", "0.pth", "0.npy", "0.txt"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    yield folder("webdataset", train__tar=stream.getvalue())


def test_datasets_of_pickles_and_scripts(tmp_path, marker, saekit_main):
    for path in dataset_folders(tmp_path, marker):
        found = read_all(path)
        assert not marker.exists(), path.name
        assert found is None or path.name == "script_and_text", path.name
    with pytest.raises(SaekitError, match="of the kind 'webdataset'; saekit reads"):
        open_text(str(tmp_path / "webdataset"))
    for name in ("pickles", "webdataset", "script"):
        done = saekit_main("cache", "--dataset", tmp_path / name, "--out", "new", cwd=tmp_path)
        ends(done, 2)
    for name in ("pandas", "webdataset", "pickle", "cache"):  # kinds that the datasets library knows by name
        done = saekit_main("cache", "--dataset", name, "--out", "new", cwd=tmp_path / "pickles")
        ends(done, 2)
