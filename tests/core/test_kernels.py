"""Sparse gradients against dense autograd, in float64 and float32."""

from __future__ import annotations

import pytest
import torch

from saekit.allocation import mutual_choice, token_choice
from saekit.code import SparseCode
from saekit.kernels.affinities import affinities, affinities_reference
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
def test_sparse_gradients_equal_dense_autograd(rule, dtype, tolerance):
    x, W_enc, b_enc, b_dec, W_dec = problem(dtype)
    parameters = (x, W_enc, b_enc, b_dec, W_dec)
    weights = torch.linspace(-1, 2, x.numel(), dtype=dtype).view_as(x)
    code = RULES[rule](((x - b_dec) @ W_enc + b_enc).detach())

    values = affinities(x, W_enc, b_enc, b_dec, code)
    x_hat = decode(code.with_values(values), W_dec, b_dec)
    ((x - x_hat).square() * weights).sum().backward()
    sparse = [p.grad.clone() for p in parameters]

    for p in parameters:
        p.grad = None
    # the dense twin shares no code with the kernels: a mask on the dense pre-activations
    mask = torch.zeros(code.shape, dtype=dtype)
    mask[code.tokens, code.features] = 1
    dense_hat = (torch.relu((x - b_dec) @ W_enc + b_enc) * mask) @ W_dec + b_dec
    ((x - dense_hat).square() * weights).sum().backward()

    torch.testing.assert_close(x_hat, dense_hat, rtol=tolerance, atol=tolerance)
    for name, got, p in zip(("x", "W_enc", "b_enc", "b_dec", "W_dec"), sparse, parameters, strict=True):
        error = (got - p.grad).norm() / p.grad.norm()
        assert error < tolerance, (name, float(error))


def test_references_equal_kernels():
    x, W_enc, b_enc, b_dec, W_dec = problem(torch.float64, seed=3)
    code = token_choice(((x - b_dec) @ W_enc + b_enc).detach(), 5)
    torch.testing.assert_close(
        affinities(x, W_enc, b_enc, b_dec, code), affinities_reference(x, W_enc, b_enc, b_dec, code)
    )
    torch.testing.assert_close(decode(code, W_dec, b_dec), decode_reference(code, W_dec, b_dec))


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
