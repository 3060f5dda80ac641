"""Every implementation of every operation against its reference, on every device that is here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saekit import SaekitError
from saekit.allocation import mutual_choice, token_choice
from saekit.code import SparseCode
from saekit.kernels.adam import adam_update
from saekit.kernels.decode import decode
from saekit.kernels.ops import ANY, OPERATIONS, VARIABLE, load_backends
from saekit.kernels.pairs import pair_products, sum_by_feature, sum_by_token

load_backends()
HERE = [
    "cpu",
    *(["cuda"] if torch.cuda.is_available() else []),
    *(["mps"] if torch.backends.mps.is_available() else []),
]


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def codes(n=13, width=29):
    """Token choice, a code with features and tokens that match nothing, one match, none."""
    pre = numbers(n, width, seed=7)
    some = token_choice(pre, 4)
    few = some.where((some.tokens != 3) & (some.features > 5))
    one = some.where(torch.arange(len(some.tokens)) == 9)
    return [some, few, one, some.where(torch.zeros_like(some.tokens, dtype=torch.bool))]


def of_pairs(**tables):
    return [[*(numbers(*shape, seed=i) for i, shape in enumerate(tables.values())), code] for code in codes()]


def weighted(rows):
    return [[numbers(rows, 7), numbers(len(code.tokens), seed=3), code] for code in codes()]


def ties(*shape):
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(1)).double()


def moments(scale):
    W, grad, first = (numbers(5, 7, seed=seed) for seed in range(3))
    return [W, grad, first, numbers(5, 7, seed=3).abs(), 4, 0.01, scale]


# arguments of each operation: every implementation must give on them what the reference gives
CASES = {
    "sum_by_token": weighted(29),
    "sum_by_feature": weighted(13),
    "pair_products": [*of_pairs(a=(13, 7), b=(29, 7)), [numbers(13, 1), numbers(29, 1), codes()[0]]],
    "decode": [[code, numbers(29, 7), numbers(7)] for code in codes()],
    "largest_in_rows": [[m, k] for m in (numbers(6, 64), ties(6, 64), ties(1, 5)) for k in (1, 3, m.shape[1])],
    "largest_in_columns": [
        [m, torch.arange(m.shape[1]) % (len(m) + 1)] for m in (numbers(64, 6), ties(64, 6), ties(1, 5))
    ],
    "largest_in_all": [[m, total] for m in (numbers(6, 64), ties(6, 64), ties(1, 5)) for total in (1, 5, m.numel())],
    "largest_among": [[m, total] for m in (numbers(64), ties(64), ties(1)) for total in (1, 20, 64)],
    "adam_update": [moments(None), moments(torch.tensor(2.5))],
}


def moved(arguments, device):
    return [_to(each, device) for each in arguments]


def _to(value, device):
    if isinstance(value, SparseCode):
        moved = (part.to(device) for part in (value.tokens, value.features, value.values))
        return SparseCode(*moved, value.n_tokens, value.n_features)
    return value.clone().to(device) if isinstance(value, torch.Tensor) else value


def meaning(name, arguments, result):
    """What must be alike: pairs in no order, entries that are not positive left out; what is changed in place."""
    if name == "largest_in_rows":
        chosen = torch.zeros_like(arguments[0], dtype=torch.bool).scatter_(1, result, True)
        return [chosen & (arguments[0] > 0)]
    if name == "largest_in_columns":
        chosen = torch.zeros_like(arguments[0], dtype=torch.bool)
        chosen[result] = True
        return [chosen & (arguments[0] > 0)]
    if name == "adam_update":
        return [arguments[0], *arguments[2:4]]  # the gradient may have been scaled in place
    return [result]


def test_every_operation_has_cases_and_implementations():
    assert OPERATIONS.keys() == CASES.keys()
    for name, operation in OPERATIONS.items():
        assert operation.implementations, name
        assert operation.__doc__, name


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, each in OPERATIONS.items() for kind in each.implementations]
)
def test_an_implementation_gives_what_its_reference_gives(name, kind, device):
    if kind not in (ANY, device):
        pytest.skip(f"this machine has no {kind}, or it is tested there")
    operation = OPERATIONS[name]
    for case in CASES[name]:
        ours, theirs = moved(case, device), moved(case, device)
        got = meaning(name, ours, operation.implementations[kind](*ours))
        expected = meaning(name, theirs, operation.reference(*theirs))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", sorted({kind for each in OPERATIONS.values() for kind in each.implementations}))
def test_a_slip_of_an_implementation_is_seen(kind):
    """That the comparison can fail: a neighbour's sum in place of its own."""
    for name in ("sum_by_token", "sum_by_feature", "decode"):
        implementation = OPERATIONS[name].implementations.get(kind)
        if implementation is None or kind == "cuda":
            continue
        result = implementation(*moved(CASES[name][0], "cpu")).roll(1, 0)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(result, OPERATIONS[name].reference(*CASES[name][0]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rule", ["token", "mutual"])
def test_the_gradients_of_decoding_equal_dense_autograd(rule, dtype):
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    x, pre = numbers(13, 7, dtype=dtype), numbers(13, 29, seed=1, dtype=dtype)
    code = token_choice(pre, 4) if rule == "token" else mutual_choice(pre, 52)
    parameters = [code.values.clone(), numbers(29, 7, seed=2, dtype=dtype), numbers(7, seed=3, dtype=dtype)]
    values, W_dec, b_dec = (each.requires_grad_() for each in parameters)
    weights = torch.linspace(-1, 2, x.numel(), dtype=dtype).view_as(x)
    gradients = []
    for decoder in (decode, decode.reference):
        x_hat = decoder(code.with_values(values), W_dec, b_dec)
        gradients.append(torch.autograd.grad(((x - x_hat).square() * weights).sum(), parameters))
    for got, expected in zip(*gradients, strict=True):
        assert (got - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("mkl", [True, False])
def test_sums_by_feature_into_a_buffer(mkl, monkeypatch):
    if not mkl:
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    table, weights, code = numbers(13, 7, dtype=torch.float32), numbers(52, seed=3, dtype=torch.float32), codes()[0]
    buffer = torch.full((29, 7), torch.nan)
    found = sum_by_feature(table, weights, code, out=buffer)
    assert found.data_ptr() == buffer.data_ptr()
    torch.testing.assert_close(buffer, code.with_values(weights).to_dense().T @ table, rtol=1e-5, atol=1e-5)


def test_references_are_sums_over_pairs():
    a, b = numbers(6, 3), numbers(8, 3, seed=1)
    tokens, features = torch.tensor([0, 0, 2, 5, 5, 5]), torch.tensor([7, 1, 1, 0, 4, 7])
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, 1.5], dtype=torch.float64)
    code = SparseCode(tokens, features, weights, 6, 8)
    by_token, by_feature = torch.zeros_like(a), torch.zeros_like(b)
    for i, j, w in zip(tokens.tolist(), features.tolist(), weights.tolist(), strict=True):
        by_token[i] += w * b[j]
        by_feature[j] += w * a[i]
    torch.testing.assert_close(sum_by_token.reference(b, weights, code), by_token)
    torch.testing.assert_close(sum_by_feature.reference(a, weights, code), by_feature)
    products = [float(a[i] @ b[j]) for i, j in zip(tokens.tolist(), features.tolist(), strict=True)]
    torch.testing.assert_close(pair_products.reference(a, b, code), torch.tensor(products, dtype=torch.float64))


def test_an_empty_code_decodes_to_the_bias():
    code = token_choice(torch.full((4, 6), -1.0), 2)
    W_dec, b_dec = torch.ones(6, 3), torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(decode(code, W_dec, b_dec), b_dec.expand(4, 3))


def test_the_variable_decides(monkeypatch):
    assert adam_update.chosen("cpu") is adam_update.implementations["cpu"]
    assert adam_update.chosen("xpu") is adam_update.implementations[ANY]
    monkeypatch.setenv(VARIABLE, "reference")
    assert adam_update.chosen("cpu") is adam_update.reference
    monkeypatch.setenv(VARIABLE, "refrence")
    with pytest.raises(SaekitError, match="SAEKIT_KERNELS = 'refrence' is unknown; did you mean 'reference'"):
        sum_by_token(*CASES["sum_by_token"][0])


def test_a_run_by_the_references_learns_what_a_run_learns(tmp_path, monkeypatch):
    from saekit.activations import ActivationCache
    from saekit.trainers import TrainConfig, train

    ActivationCache.from_tensor(tmp_path / "cache", numbers(3000, 12, dtype=torch.float32))
    keys = {"cache": tmp_path / "cache", "width": 48, "k": 4, "batch_size": 256, "tokens": 2560, "precision": "fp32"}
    runs = []
    for value in ("auto", "reference"):
        monkeypatch.setenv(VARIABLE, value)
        runs.append(train(TrainConfig(**keys, device="cpu", aux="aux_k", out=tmp_path / value), quiet=True).sae)
    torch.testing.assert_close(runs[0].W_dec, runs[1].W_dec, rtol=1e-3, atol=1e-3)


def test_devices_are_told_apart_in_the_kernels_alone():
    root = Path(__file__).parents[2]
    sources = [
        path for folder in ("saekit", "activations", "trainers", "evals") for path in (root / folder).rglob("*.py")
    ]
    told = [path for path in sources if "device.type" in path.read_text() or "is_cuda" in path.read_text()]
    assert {path.parent for path in told} == {root / "saekit/kernels"}, told


def test_the_variable_is_no_secret():
    done = subprocess.run(
        [sys.executable, "-c", "from saekit.kernels.ops import load_backends; print(*load_backends())"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert set(done.stdout.split()) == CASES.keys()
