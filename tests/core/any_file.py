"""Files with anything in them, made from good ones, and the check of what reading them takes."""

from __future__ import annotations

import copy
import json
import math
import resource
import sys
from contextlib import contextmanager, suppress

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saekit import SaekitError

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
