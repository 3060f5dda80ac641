"""Sums and products over the pairs of a sparse code, without gradients and without a buffer of pairs × width."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from saekit.kernels.ops import ANY, operation

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from saekit.code import SparseCode

_PAIRS = 1 << 12  # gathered at a time, where there are no sparse products

# torch says so once of every CSR tensor; what is used of them is tested against the plain reference
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


@operation
def sum_by_token(table: Float[Tensor, "F d"], weights: Float[Tensor, "m"], code: SparseCode) -> Float[Tensor, "n d"]:
    """For each token, the sum of ``weights · table[feature]`` over its matches."""
    sums = table.new_zeros(code.n_tokens, table.shape[1])
    return sums.index_add_(0, code.tokens, weights[:, None] * table[code.features])


@sum_by_token.on(ANY)
def _bags(table: Tensor, weights: Tensor, code: SparseCode) -> Tensor:
    return F.embedding_bag(
        code.features, table, code.offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


@operation
def sum_by_feature(
    table: Float[Tensor, "n d"], weights: Float[Tensor, "m"], code: SparseCode, out: Float[Tensor, "F d"] | None = None
) -> Float[Tensor, "F d"]:
    """For each feature, the sum of ``weights · table[token]`` over its matches, into ``out`` where it is given."""
    sums = table.new_zeros(code.n_features, table.shape[1])
    sums.index_add_(0, code.features, weights[:, None] * table[code.tokens])
    return sums if out is None else out.copy_(sums)


@sum_by_feature.on(ANY)
def _bags_by_feature(table: Tensor, weights: Tensor, code: SparseCode, out: Tensor | None = None) -> Tensor:
    order, offsets, tokens = code.by_feature
    weights = weights[order]
    sums = F.embedding_bag(tokens, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)
    return sums if out is None else out.copy_(sums)


@sum_by_feature.on("cpu")
def _product_by_feature(table: Tensor, weights: Tensor, code: SparseCode, out: Tensor | None = None) -> Tensor:
    """Straight into the buffer, if there is one: a fresh result costs three times as much, in page faults."""
    if out is None or not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return _bags_by_feature(table, weights, code, out)
    order, offsets, tokens = code.by_feature
    pattern = torch.sparse_csr_tensor(offsets, tokens, weights[order], code.shape[::-1], check_invariants=False)
    return torch.addmm(out, pattern, table, beta=0.0, out=out)


@operation
def pair_products(a: Float[Tensor, "n d"], b: Float[Tensor, "F d"], code: SparseCode) -> Float[Tensor, "m"]:
    """⟨a[token], b[feature]⟩ for each match."""
    return (a[code.tokens] * b[code.features]).sum(1)


@pair_products.on(ANY)
def _gathered(a: Tensor, b: Tensor, code: SparseCode) -> Tensor:
    parts = zip(torch.split(code.tokens, _PAIRS), torch.split(code.features, _PAIRS), strict=True)
    products = [(a[tokens] * b[features]).sum(1) for tokens, features in parts]
    return torch.cat(products) if products else a.new_zeros(0)


@pair_products.on("cpu", "cuda")
def _sampled(a: Tensor, b: Tensor, code: SparseCode) -> Tensor:
    """Row by row of the larger table: then each of its rows is fetched once, while those of the other stay cached."""
    if len(a) > len(b):
        return _sampled_by_row(code.offsets, code.features, a, b)
    order, offsets, tokens = code.by_feature
    products = _sampled_by_row(offsets, tokens, b, a)
    return torch.empty_like(products).index_copy_(0, order, products)


def _sampled_by_row(
    offsets: Int[Tensor, "r+1"], columns: Int[Tensor, "m"], rows: Float[Tensor, "r d"], others: Float[Tensor, "c d"]
) -> Float[Tensor, "m"]:
    """⟨row, other⟩ for the columns of each row."""
    shape, zeros = (len(rows), len(others)), rows.new_zeros(len(columns))
    pattern = torch.sparse_csr_tensor(offsets, columns, zeros, shape, check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, rows, others.T, beta=0.0).values()  # type: ignore[no-any-return]
