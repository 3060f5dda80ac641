"""Sparse decoding with gradients: x̂ = Z W_dec + b_dec, touching only the rows of matched features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from saekit.kernels.ops import ANY, operation
from saekit.kernels.pairs import pair_products, sum_by_feature, sum_by_token

if TYPE_CHECKING:
    from jaxtyping import Float

    from saekit.code import SparseCode


class _Decode(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, b_dec: Tensor, code: SparseCode) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.code = code
        return sum_by_token(W_dec, values, code) + b_dec

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        values, W_dec = ctx.saved_tensors
        grad = grad.contiguous()
        return (
            pair_products(grad, W_dec, ctx.code) if ctx.needs_input_grad[0] else None,
            sum_by_feature(grad, values, ctx.code) if ctx.needs_input_grad[1] else None,
            grad.sum(0) if ctx.needs_input_grad[2] else None,
            None,
        )


@operation
def decode(code: SparseCode, W_dec: Float[Tensor, "F d"], b_dec: Float[Tensor, "d"]) -> Float[Tensor, "n d"]:
    """Reconstructions [n, d] of a sparse code; gradients reach ``code.values``, ``W_dec`` and ``b_dec``."""
    return code.to_dense() @ W_dec + b_dec


@decode.on(ANY)
def _sparse(code: SparseCode, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    result: Tensor = _Decode.apply(code.values, W_dec, b_dec, code)  # type: ignore[no-untyped-call]
    return result
