"""Whatever stands in a file, it is read or refused by a SaekitError: no other error, no hang, no memory it asks for.

The slow test goes through 11,000 generated configs, manifests, ``cfg.json`` and headers; every run through 1,650.
"""

from __future__ import annotations

import copy
import json
import math
import resource
import sys
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
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

MEGABYTES = 300  # of memory, for all files of a test
# Work is counted, not timed: PyYAML, the most laborious, makes about 80 calls a byte of deep nesting, and a dictionary
# takes 22,000 to open. Other versions may take twice as many; what grows faster than the file passes any such bound.
CALLS_A_BYTE, CALLS_A_FILE = 200, 50_000
SLOW = {"configs": 3000, "manifests": 2500, "cfg": 2500, "weights": 1000, "shards": 1000, "archives": 1000}

anyone = st.sampled_from(
    [
        *(0, 1, 2, 3, -1, 8, 16, 100, 2**31 - 1, 2**31, 2**62, 2**63, -(2**63) - 1, 2**64, 10**39, 10**60),
        *(0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, math.inf, -math.inf, math.nan, 8.0, 1e10),
        *(None, True, False, [], {}, [[]], [None], [1, 2], {"a": 1}, [{}], ""),
        *("\0", "a\0b", "\ud800", "é", "~", "~nobody-of-this-name/x", "../..", "/etc/passwd", "x" * 5000, "1" * 5000),
        *("none", "topk", "jumprelu", "standard", "saekit_jumprelu_token_norm", "float32", "bfloat16", "float64"),
        *("cuda:99999999999999999999", "cuda:x", "cpu:-1", "mps", "zipf", "nan", "inf", "1e999", "0x10", "1_000"),
        *(
            "F32",
            "I32",
            "F16",
            "BF16",
            "I64",
            "U8",
            "BOOL",
            "F64",
            "F8_E4M3",
            "C64",
            "F4",
            "U32",
            "shard-00001.safetensors",
        ),
    ]
)
numbers = st.integers() | st.integers(-(10**50), 10**50) | st.floats()
texts = st.text(st.characters(), max_size=20)  # surrogates and NUL among them
leaves = anyone.map(copy.deepcopy) | numbers | texts | st.booleans()
strange = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=8
)


def mixed(*strategies):
    """One of them; those that are named more often are drawn more often."""
    return st.integers(0, len(strategies) - 1).flatmap(strategies.__getitem__)


def alike(value):
    """Values of the same kind, so that the next check in line meets them."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        near = st.sampled_from([value, value + 1, value - 1, 1, 2, 40, 2**20, 2**30, 2**40])
        return mixed(near, near, near, st.integers())
    if isinstance(value, float):
        near = st.sampled_from([0.0, 1e-9, 0.5, 0.8, 1.0, 1.5, 100.0])
        return mixed(near, near, near, st.floats())
    return texts | anyone.filter(lambda other: isinstance(other, str)) if isinstance(value, str) else strange


@st.composite
def mutated(draw, documents):
    """A valid document with a few values replaced, keys dropped, added or renamed, at any depth."""
    document = copy.deepcopy(draw(st.sampled_from(documents)))
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        place = document
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], (dict, list)) and place[key] and draw(st.integers(0, 3)):
                place = place[key]
                continue
            how = draw(st.sampled_from((*["alike"] * 6, "replace", "replace", "drop", "add", "rename")))
            if how == "alike":
                place[key] = draw(alike(place[key]))
            elif how == "replace":
                place[key] = draw(strange)
            elif how == "drop":
                del place[key]
            elif isinstance(place, list):
                place.insert(key, draw(strange))
            else:
                place[draw(texts)] = place.pop(key) if how == "rename" else draw(strange)
            break
    return document


@st.composite
def edited(draw, content):
    """Bytes with a few places changed, left out, doubled or cut off."""
    content = bytearray(draw(content))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(len(content) - 1, 0)))
        stop = start + draw(st.integers(0, 20))
        how = draw(st.sampled_from(("set", "set", "leave out", "double", "cut", "insert")))
        if how == "set":
            content[start : start + 1] = bytes([draw(st.integers(0, 255))])
        elif how == "leave out":
            del content[start:stop]
        elif how == "double":
            content[start:start] = content[start:stop]
        elif how == "insert":
            content[start:start] = draw(
                st.sampled_from([b"9" * 50, b"[" * 40, b"{", b'"', b",", b"&a ", b"*a", b"- ", b"\0", b"\xff"])
            )
        else:
            del content[start:]
    return bytes(content)


def as_json(value):
    return json.dumps(value).encode()


def any_json(documents):
    """Text: documents changed by value, by byte, and what has nothing to do with them."""
    changed = mutated(documents).map(as_json)
    return mixed(*[changed] * 7, edited(changed), strange.map(as_json), st.binary(max_size=200))


def any_yaml(documents):
    """Text as for ``any_json``, in several styles, and lines of keys with values that only YAML has."""
    keys = st.sampled_from([*documents[0], "<<", "?", "!!str out", "~", "[a]", "&a b"])
    lines = st.lists(st.tuples(keys, only_yaml | texts), min_size=1, max_size=4)
    changed = mutated(documents).map(lambda value: yaml.safe_dump(value).encode())
    flow = mutated(documents).map(lambda value: yaml.safe_dump(value, default_flow_style=True).encode())
    by_line = lines.map(lambda pairs: "".join(f"{key}: {value}\n" for key, value in pairs).encode("utf-8", "replace"))
    return mixed(*[changed] * 5, flow, by_line, edited(changed), edited(by_line), any_json(documents))


YAML_VALUES = (
    *("0x" + "f" * 5000, "0b" + "1" * 20000, "1" + ":1" * 3000, "1" * 5000, "0o17", "1_000", "=", "~", "~nobody/x"),
    *("!!python/object/apply:os.getcwd []", "!!python/name:os.system", "!!python/tuple [1]", "!nothing x"),
    *("&a [*a]", "*a", "!!binary zz=", "!!int x", "!!float x", "!!bool x", "!!timestamp x", "2001-13-45", "!!null x"),
    *("!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "{a: 1}: 2", "{[1]: 2}", "[" * 300, "{" * 300, "- " * 300),
    *(".inf", "-.inf", ".nan", "|\n  a\n  b", "'a", '"\\ud800"', '"\\0"', "2001-01-01", "9" * 400 + ".5", "1e9999"),
)
only_yaml = st.integers(0, len(YAML_VALUES) - 1).map(YAML_VALUES.__getitem__)


def reset_peak():
    """The most memory of this process so far; on Linux, as of now."""
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return peak()


def peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


@contextmanager
def little_work(content):
    """See that reading some text or bytes makes no more calls, of Python and of C, than its length allows."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(None)
    assert calls < CALLS_A_BYTE * len(content) + CALLS_A_FILE


def every(examples, strategy, check):
    """Check what many files give. Nothing but a SaekitError may come of one, soon, and without much memory.

    Args:
        examples: how many files.
        strategy: makes their content, or a name and the content.
        check: reads it.
    """
    read = refused = 0
    before = reset_peak()

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def each(content):
        nonlocal read, refused
        try:
            with little_work(content[1] if isinstance(content, tuple) else content):
                check(content)
            read += 1
        except SaekitError as error:
            refused += 1
            message = str(error)
            assert message.strip()
            assert len(message) < 20_000

    each()
    grown = peak() - before
    print(f"\n{read} were read, {refused} refused; memory grew by {grown:.0f} MB")
    assert grown < MEGABYTES
    assert min(read, refused) > examples / 100, "some of both kinds"


def number_of_examples(what):
    """An argument of a test: few for every run, many for the slow one."""
    many = pytest.param(SLOW[what], marks=pytest.mark.slow)
    return pytest.mark.parametrize("examples", [SLOW[what] * 15 // 100, many])


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
