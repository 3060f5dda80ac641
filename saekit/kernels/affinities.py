"""Affinities at chosen pairs, with gradients: what the encoder learns from a sparse code, touching only its matches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from saekit.kernels.pairs import sum_by_feature, sum_by_token

if TYPE_CHECKING:
    from jaxtyping import Float

    from saekit.code import SparseCode


class _Affinities(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, code: SparseCode) -> Tensor:
        ctx.save_for_backward(x, W_enc, b_dec)
        ctx.code = code
        return code.values.detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor, None]:
        x, W_enc, b_dec = ctx.saved_tensors
        code: SparseCode = ctx.code
        grad_b_enc = grad.new_zeros(code.n_features).index_add_(0, code.features, grad)
        return (
            sum_by_token(W_enc.T, grad, code) if ctx.needs_input_grad[0] else None,
            sum_by_feature(x - b_dec, grad, code).T,
            grad_b_enc,
            -(W_enc @ grad_b_enc),  # b_dec enters every pair through x − b_dec: one product serves all of them
            None,
        )


def affinities(
    x: Float[Tensor, "n d"],
    W_enc: Float[Tensor, "d F"],
    b_enc: Float[Tensor, "F"],
    b_dec: Float[Tensor, "d"],
    code: SparseCode,
) -> Float[Tensor, "m"]:
    """relu((x − b_dec) W_enc + b_enc) at the matches of ``code``, as a differentiable function of all four.

    The forward values are ``code.values``, which the allocation rule has computed from the same parameters already; the
    backward pass touches the matches alone. relu has slope 1 there, since every match is positive.
    """
    result: Tensor = _Affinities.apply(x, W_enc, b_enc, b_dec, code)  # type: ignore[no-untyped-call]
    return result


def affinities_reference(
    x: Float[Tensor, "n d"],
    W_enc: Float[Tensor, "d F"],
    b_enc: Float[Tensor, "F"],
    b_dec: Float[Tensor, "d"],
    code: SparseCode,
) -> Float[Tensor, "m"]:
    """The same from the dense pre-activations."""
    return torch.relu((x - b_dec) @ W_enc + b_enc)[code.tokens, code.features]
