"""Sums and products over the pairs of a sparse code, without gradients and without a buffer of pairs × width."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from saekit.code import SparseCode

_PAIRS = 1 << 12  # gathered at a time, where there are no sparse products

# torch says so once of every CSR tensor; what is used of them is tested against a plain reference here
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


def sum_by_token(table: Float[Tensor, "F d"], weights: Float[Tensor, "m"], code: SparseCode) -> Float[Tensor, "n d"]:
    """For each token, the sum of ``weights · table[feature]`` over its matches."""
    return F.embedding_bag(
        code.features, table, code.offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def sum_by_feature(
    table: Float[Tensor, "n d"], weights: Float[Tensor, "m"], code: SparseCode, out: Float[Tensor, "F d"] | None = None
) -> Float[Tensor, "F d"]:
    """For each feature, the sum of ``weights · table[token]`` over its matches, into ``out`` where it is given."""
    order, offsets, tokens = code.by_feature
    weights = weights[order]
    if out is not None and table.device.type == "cpu" and torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        # straight into the buffer: a fresh result costs three times as much, in page faults
        pattern = torch.sparse_csr_tensor(offsets, tokens, weights, code.shape[::-1], check_invariants=False)
        return torch.addmm(out, pattern, table, beta=0.0, out=out)
    sums = F.embedding_bag(tokens, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)
    return sums if out is None else out.copy_(sums)


def pair_products(a: Float[Tensor, "n d"], b: Float[Tensor, "F d"], code: SparseCode) -> Float[Tensor, "m"]:
    """⟨a[token], b[feature]⟩ for each match.

    Row by row of the larger table: then each of its rows is fetched once, while those of the other stay in the cache.
    """
    if len(a) > len(b):
        return _products(code.offsets, code.features, a, b)
    order, offsets, tokens = code.by_feature
    products = _products(offsets, tokens, b, a)
    return torch.empty_like(products).index_copy_(0, order, products)


def _products(
    offsets: Int[Tensor, "r+1"], columns: Int[Tensor, "m"], rows: Float[Tensor, "r d"], others: Float[Tensor, "c d"]
) -> Float[Tensor, "m"]:
    """⟨row, other⟩ for the columns of each row."""
    if rows.device.type not in ("cpu", "cuda"):  # no sparse products there
        of = torch.arange(len(rows), device=rows.device).repeat_interleave(offsets.diff())
        parts = zip(torch.split(of, _PAIRS), torch.split(columns, _PAIRS), strict=True)
        return torch.cat([(rows[row] * others[column]).sum(1) for row, column in parts])
    shape, zeros = (len(rows), len(others)), rows.new_zeros(len(columns))
    pattern = torch.sparse_csr_tensor(offsets, columns, zeros, shape, check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, rows, others.T, beta=0.0).values()  # type: ignore[no-any-return]
