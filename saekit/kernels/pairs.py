"""Sums and products over the pairs of a sparse code, without gradients and without a buffer of pairs × width."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from jaxtyping import Float

    from saekit.code import SparseCode

# torch says so once of every CSR tensor; sampled_addmm is tested against a plain reference here
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


def sum_by_token(table: Float[Tensor, "F d"], weights: Float[Tensor, "m"], code: SparseCode) -> Float[Tensor, "n d"]:
    """For each token, the sum of ``weights · table[feature]`` over its matches."""
    return F.embedding_bag(
        code.features, table, code.offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def sum_by_feature(table: Float[Tensor, "n d"], weights: Float[Tensor, "m"], code: SparseCode) -> Float[Tensor, "F d"]:
    """For each feature, the sum of ``weights · table[token]`` over its matches."""
    order, offsets = code.by_feature
    return F.embedding_bag(
        code.tokens[order], table, offsets, mode="sum", per_sample_weights=weights[order], include_last_offset=True
    )


def pair_products(a: Float[Tensor, "n d"], b: Float[Tensor, "F d"], code: SparseCode) -> Float[Tensor, "m"]:
    """⟨a[token], b[feature]⟩ for each match."""
    pattern = torch.sparse_csr_tensor(
        code.offsets, code.features, torch.zeros_like(code.values), code.shape, check_invariants=False
    )
    products: Tensor = torch.sparse.sampled_addmm(pattern, a, b.T, beta=0.0).values()
    return products
