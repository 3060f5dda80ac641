"""Activations, metadata and configs that are not as they should be, and machines with less than usual on them."""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from made import dictionary

import saekit
from saekit import SAEConfig, SaekitError
from saekit.formats import FORMATS

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "standard"])
def test_numbers_that_are_not_finite_have_no_code(architecture, value):
    sae = dictionary(architecture)
    x = X.clone()
    x[1, 3, 2] = x[1, 4, 0] = value
    for method in (sae.encode, sae.encode_sparse, sae, sae.forward):
        with pytest.raises(
            SaekitError, match=r"NaN or infinite numbers, in float32.* first of 2 such tokens is at \[1, 3\]"
        ):
            method(x)
        with pytest.raises(SaekitError, match=r"first of 1 such tokens is at \[\]"):
            method(x[1, 3])
        method(x[0])


def test_numbers_too_large_for_the_dictionarys_dtype_are_told(generator):
    sae = dictionary("topk", dtype=torch.float16)
    with pytest.raises(SaekitError, match=r"in float16.* at \[0, 1\]"):
        sae.encode(torch.ones(1, 2, 8) * torch.tensor([1.0, 1e6])[:, None])
    large = dictionary("topk", dtype=torch.float32)
    large.encode(torch.full((4, 8), 3e38)), "a sum that overflows is no number that is infinite"


@torch.no_grad()
def test_finite_activations_are_encoded_as_ever():
    """Leading dimensions, none of them, no tokens, and other dtypes."""
    sae = dictionary("topk")
    whole = sae.encode(X)
    assert torch.equal(sae.encode(X[1, 3]), sae.encode(X[1, 3][None])[0])
    assert sae.encode(X[:0]).shape == (0, 5, 32)
    assert torch.equal(sae.encode_sparse(X).to_dense().reshape(whole.shape), whole)
    assert sae.encode(X.double()).dtype == torch.float32
    assert sae.encode(torch.ones(3, 8, dtype=torch.int64)).shape == (3, 32)


@pytest.mark.parametrize("x", [[1.0] * 8, np.ones((2, 8)), None, torch.tensor(1.0), torch.ones(3, 7)])
def test_what_is_no_activations_is_named(x):
    with pytest.raises(SaekitError, match="not of type|of width [07] do not fit a dictionary of d_in = 8"):
        dictionary("topk").encode_sparse(x)


BAD = {
    "tensor": (torch.ones(2), "a is of type Tensor"),
    "path": (Path("x"), "a is of type PosixPath"),
    "set": ({1}, "a is of type set"),
    "nan": (math.nan, "a = nan"),
    "inside": ({"b": [1, {"c": math.inf}]}, r"a\.b\[1\]\.c = inf"),
    "key": ({1: 2}, "a has the key 1"),
    "numpy": (np.float32(1), "a is of type float32"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("name", FORMATS.writable())
def test_metadata_that_is_no_json_is_refused_by_its_name(tmp_path, name, case):
    value, told = BAD[case]
    sae = dictionary("topk", metadata={"model_name": "m"})
    with pytest.raises(SaekitError, match=rf"metadata\.{told}"):
        sae.with_metadata(a=value)
    assert sae.cfg.metadata == {"model_name": "m"}
    with pytest.raises(SaekitError, match=rf"metadata\.{told}"):
        SAEConfig(8, 32, "standard", metadata={"a": value})
    sae.cfg.metadata["a"] = value
    with pytest.raises(SaekitError, match=rf"metadata\.{told}"):
        FORMATS[name].write(sae, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_metadata_of_others_with_nan_is_read_and_written(tmp_path):
    """Python writes NaN, as SAELens does for figures of its training."""
    dictionary("topk").save(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    cfg["metadata"]["l0"] = math.nan
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    sae = saekit.load(tmp_path)
    assert sae.cfg.metadata["l0"] is None
    assert saekit.load(sae.save(tmp_path / "again")).cfg.metadata["l0"] is None


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_dtypes_are_spelled_as_saelens_takes_them(tmp_path, dtype):
    dictionary("topk").save(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    for spelled in (dtype, f"torch.{dtype}"):
        (tmp_path / "cfg.json").write_text(json.dumps({**cfg, "dtype": spelled}))
        assert saekit.load(tmp_path).dtype == getattr(torch, dtype)
    for other in ("float31", "torch.torch.float32", None, 32):
        (tmp_path / "cfg.json").write_text(json.dumps({**cfg, "dtype": other}))
        with pytest.raises(SaekitError, match="cfg.json"):
            saekit.load(tmp_path)


PROGRAM = """
import sys, warnings
blocked = set(sys.argv[2].split(","))
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Nothing())
import torch
import saekit
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("default")
    sae = saekit.load(sys.argv[1])
    saekit.load(sys.argv[1])
x = torch.ones(3, sae.cfg.d_in)
assert sae.decode(sae.encode_sparse(x)).shape == sae(x).shape == x.shape
assert sae.encode(x).shape == (3, sae.cfg.d_sae)
print([str(w.message) for w in told if w.category.__name__ == "SaekitWarning"])
try:
    "numpy" in blocked or sae.save(sys.argv[1] + "-again")  # safetensors writes with it
except saekit.SaekitError as error:
    print(error)
"""


def needed(*names: str) -> set[str]:
    """The packages that these need, those among them."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name not in found:
            found.add(name)
            try:
                requires = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:
                continue
            waiting += [re.match(r"[\w-]+", line)[0] for line in requires if "extra ==" not in line]
    return found


@pytest.mark.parametrize("others", [False, True])
def test_torch_and_safetensors_are_enough_to_load(tmp_path, others):
    """Without xxhash the seal is not compared, which is told once; without anything else too."""
    dictionary("topk").save(tmp_path / "x")
    kept = {name.replace("-", "_") for name in needed("torch", "safetensors")}
    modules = importlib.metadata.packages_distributions()
    all_others = {
        module
        for module, homes in modules.items()
        if module != "saekit" and not any(home.lower().replace("-", "_") in kept for home in homes)
    }
    assert {"xxhash", "numpy", "pydantic", "yaml", "jaxtyping", "transformers"} <= all_others
    blocked = all_others if others else {"xxhash"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "x"), ",".join(blocked)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    loaded, *saved = done.stdout.splitlines()
    assert loaded.count("without comparing their seals") == 1
    assert "pip install xxhash" in loaded
    assert others or "pip install xxhash" in saved[0]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"d_in": 8.0}, "d_in = 8.0 is no whole number"),
        ({"d_sae": "32"}, "d_sae = '32' is no whole number"),
        ({"k": 4.0}, "k = 4.0 is no whole number"),
        ({"d_in": None}, "d_in = None is no whole number"),
        ({"architecture": "jumprelu"}, "k = 4 means nothing for 'jumprelu'"),
        ({"architecture": "standard"}, "k = 4 means nothing for 'standard'"),
        ({"metadata": None}, "metadata are a dict of facts, not of type NoneType"),
        ({"metadata": [1]}, "metadata are a dict of facts, not of type list"),
    ],
)
def test_configs_that_would_do_something_else_are_refused(settings, told):
    with pytest.raises(SaekitError, match=told):
        SAEConfig(**{"d_in": 8, "d_sae": 32, "architecture": "topk", "k": 4, **settings})


def test_sizes_may_be_whole_numbers_of_numpy(tmp_path):
    cfg = SAEConfig(np.int64(8), np.int32(32), "topk", np.int64(4))
    again = saekit.load(saekit.SparseAutoencoder(cfg).save(tmp_path)).cfg
    assert (again.d_in, again.d_sae, again.k) == (8, 32, 4)


@torch.no_grad()
def test_codes_of_other_dtypes_are_decoded_and_others_named():
    sae = dictionary("topk")
    f = (sae.encode(X) * 4).round() / 4
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert torch.equal(sae.decode(f.to(dtype)), sae.decode(f.to(dtype).float()))
    assert torch.equal(sae.decode(torch.ones(2, 32, dtype=torch.long)), sae.decode(torch.ones(2, 32)))
    for code, told in (
        ([1.0] * 32, "not list"),
        (np.ones((2, 32)), "not ndarray"),
        (torch.tensor(1.0), "a code of 0 features"),
    ):
        with pytest.raises(SaekitError, match=told):
            sae.decode(code)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_there_is_named(tmp_path, device):
    dictionary("topk").save(tmp_path)
    with pytest.raises(SaekitError, match=f"there is no device '{device}'"):
        saekit.load(tmp_path, device)
