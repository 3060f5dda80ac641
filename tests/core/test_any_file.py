"""Whatever stands in a file, it is read or refused by a SaekitError: no other error, no hang, no memory it asks for.

The slow test goes through 11,000 generated configs, manifests, ``cfg.json`` and headers; every run through 1,650.
"""

from __future__ import annotations

import json
import math
from contextlib import suppress

import numpy as np
import pytest
import torch
from any_file import (
    any_json,
    any_yaml,
    as_json,
    edited,
    every,
    little_work,
    mixed,
    mutated,
    number_of_examples,
    strange,
    texts,
)
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import saekit
from saekit import SAEConfig, SaekitError, SparseAutoencoder
from saekit.activations import ActivationCache
from saekit.activations.manifest import Manifest
from saekit.activations.shards import _header
from saekit.formats import FORMATS
from saekit.reading import parse_json, read_yaml
from saekit.seal import BLANK, stamp
from saekit.trainers import TrainConfig


@number_of_examples("configs")
def test_configs(tmp_path, examples):
    path, again = tmp_path / "config.yaml", tmp_path / "again.yaml"
    documents = [
        TrainConfig().to_dict(),
        TrainConfig(cache="c", width=64, aux="aux_k", k_aux=3, lr=1e-3, hook="h").to_dict(),
        {"variant": "topk", "tokens": 100_000, "k": 8},
    ]

    def check(content):
        path.write_bytes(content)
        config = TrainConfig.from_yaml(path)
        assert config.steps >= 1
        assert 0 < config.peak_lr < math.inf
        assert config.width is None or config.k <= config.width
        assert config.warmup + config.decay <= 1
        again.write_text(config.to_yaml())
        assert TrainConfig.from_yaml(again) == config
        assert isinstance(config.out / "sae", type(tmp_path))

    every(examples, any_yaml(documents), check)


@number_of_examples("manifests")
def test_manifests(tmp_path, monkeypatch, examples):
    monkeypatch.setattr("saekit.activations.cache.SHARD_ROWS", 40)
    provenance = {"model": "m", "hook": "blocks.1.hook_resid_post", "dataset": "d", "context_length": 64, "more": [1]}
    cache = ActivationCache.from_tensor(tmp_path / "c", torch.randn(100, 3), provenance=provenance)
    path = cache.path / "manifest.json"
    new = {**json.loads(path.read_text()), "seal": BLANK}
    old = {("passport" if key == "provenance" else key): value for key, value in new.items() if key != "skipped"}

    def sealed(content):
        return stamp(content) if BLANK.encode() in content[:4096] else content

    texts = any_json([new, new, old])
    original = path.read_bytes()

    def check(content):
        path.write_bytes(content)
        cache = ActivationCache.open(tmp_path / "c")
        assert len(cache) == sum(shard["rows"] for shard in cache.shards)
        assert len(cache.fingerprint) == 32
        json.dumps(cache.provenance)  # as `saekit info` prints it
        assert Manifest.read(cache.path).d_in == cache.d_in
        batch = cache.read(0, min(3, len(cache)))
        assert batch.x.shape == (min(3, len(cache)), cache.d_in)
        assert str(batch.x.dtype) == f"torch.{cache.dtype}"

    check(original)
    every(examples, mixed(*[texts.map(sealed)] * 7, texts, edited(texts.map(sealed))), check)


DICTIONARIES = {
    "topk": SAEConfig(4, 9, "topk", k=2, metadata={"model_name": "m", "saekit": {"provenance": {"hook": "h"}}}),
    "jumprelu": SAEConfig(4, 9, "jumprelu", apply_b_dec_to_input=False),
    "standard": SAEConfig(4, 9, "standard"),
    "token_norm": SAEConfig(4, 9, "jumprelu", affinity_scale="token_norm"),
}


FOREIGN = {"dictionary_learning": "config.json", "sparsify": "cfg.json"}


@pytest.fixture
def dictionaries(tmp_path):
    """The folder of a dictionary of each kind."""
    for name, config in DICTIONARIES.items():
        sae = SparseAutoencoder(config)
        for tensor in sae.state_dict().values():
            torch.nn.init.uniform_(tensor)
        sae.save(tmp_path / name)
    for name in FOREIGN:
        config = SAEConfig(4, 9, "topk", k=2, metadata={"model_name": "m"})
        FORMATS[name].write(SparseAutoencoder(config), tmp_path / name)
    return tmp_path


def check_dictionary(folder):
    """Load it; the weights are what its config says."""
    sae = saekit.load(folder)
    config = sae.cfg
    shapes = {name: list(tensor.shape) for name, tensor in sae.state_dict().items()}
    d_in, d_sae = config.d_in, config.d_sae
    expected = {"W_enc": [d_in, d_sae], "b_enc": [d_sae], "W_dec": [d_sae, d_in], "b_dec": [d_in]}
    assert shapes == expected | ({"threshold": [d_sae]} if config.architecture == "jumprelu" else {})
    assert (config.k is not None) == (config.architecture == "topk")
    assert config.k is None or 1 <= config.k <= d_sae
    assert sae.encode(torch.ones(2, d_in)).shape == (2, d_sae)
    json.dumps(vars(config))  # as `saekit info` prints it
    return sae


@number_of_examples("cfg")
def test_cfg_json(dictionaries, examples):
    files = {**dict.fromkeys(DICTIONARIES, "cfg.json"), **FOREIGN}
    documents = {name: json.loads((dictionaries / name / file).read_text()) for name, file in files.items()}
    each = st.one_of([st.tuples(st.just(name), any_json([document])) for name, document in documents.items()])

    def check(example):
        name, content = example
        (dictionaries / name / files[name]).write_bytes(content)
        check_dictionary(dictionaries / name)

    every(examples, each, check)


@number_of_examples("archives")
def test_archives_of_tensors(dictionaries, examples):
    """Of torch and of numpy, with any bytes changed."""
    torch_file, numpy_file = dictionaries / "dictionary_learning/ae.pt", dictionaries / "numpy/params.npz"
    numpy_file.parent.mkdir()
    tensors = saekit.load(dictionaries / "jumprelu").state_dict()
    np.savez(numpy_file, **{name: tensor.numpy() for name, tensor in tensors.items()})
    files = [(path, path.read_bytes()) for path in (torch_file, numpy_file)]
    each = st.one_of([st.tuples(st.just(path), edited(st.just(content))) for path, content in files])

    def check(example):
        path, content = example
        path.write_bytes(content)
        check_dictionary(path)

    every(examples, each, check)


def parts(content):
    """Header and data of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@st.composite
def any_header(draw, contents):
    """A safetensors file whose header was changed, by value or by byte; or whose length, or any other byte was."""
    content = draw(st.sampled_from(contents))
    header, data = parts(content)
    how = draw(st.sampled_from(("values", "values", "dtype", "metadata", "bytes", "length", "anywhere", "foreign")))
    if how == "length":
        return draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little") + content[8:]
    if how == "anywhere":
        return draw(edited(st.just(content)))
    dtypes = st.sampled_from(("F32", "I32", "U32", "F16", "BF16", "I16", "F64", "I64", "C64", "F8_E4M3", "F4", "BOOL"))
    if how == "dtype":
        header[draw(st.sampled_from([name for name in header if name != "__metadata__"]))]["dtype"] = draw(dtypes)
    text = {
        "dtype": st.just(as_json(header)),
        "metadata": st.dictionaries(texts, texts).map(lambda facts: as_json({**header, "__metadata__": facts})),
        "values": mutated([header]).map(as_json),
        "bytes": edited(st.just(as_json(header))),
        "foreign": strange.map(as_json) | st.binary(max_size=100),
    }[how]
    changed = draw(text)
    return len(changed).to_bytes(8, "little") + changed + data


@number_of_examples("weights")
def test_headers_of_weights(dictionaries, examples):
    """Of our own files, which are sealed, and of those that others wrote, which are not."""
    place = dictionaries / "jumprelu"
    path = place / "sae_weights.safetensors"
    header, data = parts(path.read_bytes())
    del header["__metadata__"]
    bare = as_json(header)
    unsealed = len(bare).to_bytes(8, "little") + bare + data

    def check(content):
        path.write_bytes(content)
        sae = check_dictionary(place)
        kinds = {entry["dtype"] for name, entry in parts(content)[0].items() if name != "__metadata__"}
        assert kinds <= {"F64", "F32", "F16", "BF16"}, "weights are numbers with a point"
        assert sae.W_dec.dtype == torch.float32

    every(examples, any_header([path.read_bytes(), unsealed, unsealed]), check)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_weights_that_are_no_numbers_with_a_point(dtype, dictionaries):
    """In a file of others, which has no seal, one changed letter (F32, I32) makes such weights of good ones."""
    path = dictionaries / "jumprelu/sae_weights.safetensors"
    tensors = load_file(path)
    for kind in (torch.float64, torch.float16, torch.bfloat16):
        save_file({name: tensor.to(kind) for name, tensor in tensors.items()}, path)
        check_dictionary(path.parent)
    for name in tensors:
        save_file({**tensors, name: tensors[name].to(dtype)}, path)
        with pytest.raises(SaekitError, match="sae_weights.safetensors"):
            saekit.load(path.parent)


@number_of_examples("shards")
def test_headers_of_shards(tmp_path, monkeypatch, examples):
    """What is read of a shard is what was written, or nothing."""
    monkeypatch.setattr("saekit.activations.shards._ROWS", 16)
    x, gradients = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0))
    cache = ActivationCache.from_tensor(tmp_path / "c", x, gradients=gradients)
    right = cache.read(10, 40, gradients=True)
    path = cache.path / cache.shards[0]["file"]

    def check(content):
        path.write_bytes(content)
        _header.cache_clear()  # headers are remembered by the time of the change, which is coarse
        found = cache.read(10, 40, gradients=True)
        for column, as_written in zip(found, right, strict=True):
            assert column.dtype == as_written.dtype
            assert torch.equal(column, as_written)

    whole = path.read_bytes()
    every(examples, mixed(*[any_header([whole])] * 9, st.just(whole)), check)


@pytest.mark.parametrize("depth", [10, 200, 5000])
def test_depth(tmp_path, depth):
    """Deep nesting is refused or read, in JSON and YAML, by itself and inside of a good document."""
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        text = opening * depth + "1" + closing * depth
        for read in (
            lambda text: parse_json(text, "x.json"),
            lambda text: read_yaml(written(tmp_path / "x.yaml", text)),
            lambda text: TrainConfig.from_yaml(written(tmp_path / "x.yaml", f"k: {text}")),
        ):
            for whole in (text, text[: len(opening) * depth]):
                with suppress(SaekitError), little_work(whole):
                    read(whole)


def written(path, text):
    path.write_text(text)
    return path
