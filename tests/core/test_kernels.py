"""Sums over pairs against plain loops, and the decoder's gradients against dense autograd."""

from __future__ import annotations

import pytest
import torch

from saekit.allocation import mutual_choice, token_choice
from saekit.code import SparseCode
from saekit.kernels.decode import decode, decode_reference
from saekit.kernels.pairs import pair_products, sum_by_feature, sum_by_token


def problem(dtype, n=13, d=7, width=29, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    return draw(n, d), draw(d, width), draw(width), draw(d), draw(width, d)


RULES = {"token": lambda pre: token_choice(pre, 4), "mutual": lambda pre: mutual_choice(pre, 4 * len(pre))}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("rule", RULES)
def test_the_gradients_of_decoding_equal_dense_autograd(rule, dtype, tolerance):
    x, W_enc, b_enc, b_dec, W_dec = problem(dtype)
    code = RULES[rule](((x - b_dec) @ W_enc + b_enc).detach())
    values = code.values.clone().requires_grad_()
    weights = torch.linspace(-1, 2, x.numel(), dtype=dtype).view_as(x)
    parameters = (values, W_dec, b_dec)
    for decoder in (decode, decode_reference):
        x_hat = decoder(code.with_values(values), W_dec, b_dec)
        found = torch.autograd.grad(((x.detach() - x_hat).square() * weights).sum(), parameters)
        if decoder is decode:
            sparse, sparse_hat = found, x_hat
    torch.testing.assert_close(sparse_hat, x_hat, rtol=tolerance, atol=tolerance)
    for got, expected in zip(sparse, found, strict=True):
        assert (got - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("mkl", [True, False])
def test_sums_by_feature_into_a_buffer(mkl, monkeypatch):
    if not mkl:
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    x, W_enc, b_enc, *_ = problem(torch.float32, n=50)
    code = token_choice((x @ W_enc + b_enc).detach(), 3)
    buffer = torch.full((29, 7), torch.nan)
    found = sum_by_feature(x.detach(), code.values, code, out=buffer)
    assert found.data_ptr() == buffer.data_ptr()
    torch.testing.assert_close(buffer, code.to_dense().T @ x.detach(), rtol=1e-5, atol=1e-5)


def test_sums_and_products_over_pairs():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(6, 3, generator=generator), torch.randn(8, 3, generator=generator)
    tokens, features = torch.tensor([0, 0, 2, 5, 5, 5]), torch.tensor([7, 1, 1, 0, 4, 7])
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, 1.5])
    code = SparseCode(tokens, features, weights, 6, 8)
    by_token, by_feature = torch.zeros(6, 3), torch.zeros(8, 3)
    for i, j, w in zip(tokens.tolist(), features.tolist(), weights.tolist(), strict=True):
        by_token[i] += w * b[j]
        by_feature[j] += w * a[i]
    torch.testing.assert_close(sum_by_token(b, weights, code), by_token)
    torch.testing.assert_close(sum_by_feature(a, weights, code), by_feature)
    torch.testing.assert_close(pair_products(a, b, code), (a[tokens] * b[features]).sum(1))


def test_an_empty_code_decodes_to_the_bias():
    code = token_choice(torch.full((4, 6), -1.0), 2)
    W_dec, b_dec = torch.ones(6, 3), torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(decode(code, W_dec, b_dec), b_dec.expand(4, 3))
