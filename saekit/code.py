"""The sparse code of a batch: which tokens match which features, and how strongly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class ByFeature(NamedTuple):
    """The pairs by feature: ``order`` [m] sorts them, ``offsets`` [F + 1] bounds each feature's ``tokens`` [m]."""

    order: Int[Tensor, "m"]
    offsets: Int[Tensor, "F+1"]
    tokens: Int[Tensor, "m"]


class TokenScale(NamedTuple):
    """What was taken out of each token before it was encoded: x = x' · ``scale`` + ``mean``; each [n, 1]."""

    mean: Float[Tensor, "n 1"]
    scale: Float[Tensor, "n 1"]


@dataclass(frozen=True)
class SparseCode:
    """The m matches between the n tokens of a batch and F features.

    Every allocation rule returns one, so decoding, losses, statistics and evaluations are written once.

    Attributes:
        tokens: [m] index of the token of each match, ascending.
        features: [m] index of its feature.
        values: [m] its activation, positive; may carry gradients.
        n_tokens: n, the number of tokens in the batch, those without a match too.
        n_features: F, the width of the dictionary.
        token_scale: what decoding puts back into each token, for dictionaries that normalise their input.
    """

    tokens: Int[Tensor, "m"]
    features: Int[Tensor, "m"]
    values: Float[Tensor, "m"]
    n_tokens: int
    n_features: int
    token_scale: TokenScale | None = None

    def __repr__(self) -> str:
        return (
            f"SparseCode({self.tokens.numel():,} matches of {self.n_tokens:,} tokens and {self.n_features:,} features)"
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(n, F), the shape of the dense code."""
        return self.n_tokens, self.n_features

    @property
    def device(self) -> torch.device:
        """Where the matches are."""
        return self.values.device

    @property
    def l0(self) -> float:
        """Mean number of matches a token."""
        return self.tokens.numel() / max(self.n_tokens, 1)

    @cached_property
    def offsets(self) -> Int[Tensor, "n+1"]:
        """Where each token's matches begin; the last entry is m."""
        return torch.searchsorted(self.tokens, torch.arange(self.n_tokens + 1, device=self.tokens.device))

    @cached_property
    def by_feature(self) -> ByFeature:
        """The matches ordered by feature, for sums over tokens."""
        features, order = torch.sort(self.features, stable=True)
        bounds = torch.arange(self.n_features + 1, device=features.device)
        return ByFeature(order, torch.searchsorted(features, bounds), self.tokens[order])

    def matches_per_token(self) -> Int[Tensor, "n"]:
        """L0 of each token."""
        return torch.diff(self.offsets)

    def matches_per_feature(self) -> Int[Tensor, "F"]:
        """Number of tokens of the batch on which each feature is active."""
        return torch.bincount(self.features, minlength=self.n_features)

    def with_values(self, values: Float[Tensor, "m"]) -> SparseCode:
        """The same matches with other values; what is known of their order is shared."""
        code = replace(self, values=values)
        vars(code).update(offsets=self.offsets, by_feature=self.by_feature)
        return code

    def where(self, keep: Bool[Tensor, "m"]) -> SparseCode:
        """Some of the matches."""
        kept = keep.nonzero()[:, 0]
        return replace(self, tokens=self.tokens[kept], features=self.features[kept], values=self.values[kept])

    def to_dense(self) -> Float[Tensor, "n F"]:
        """The code as a matrix, zeros where nothing matched."""
        dense = self.values.new_zeros(self.shape)
        return dense.index_put((self.tokens, self.features), self.values)

    @staticmethod
    def concatenate(codes: Sequence[SparseCode]) -> SparseCode:
        """One code for the batches of ``codes`` (at least one, of equal width), one after another."""
        starts = [0]
        for code in codes:
            starts.append(starts[-1] + code.n_tokens)
        scales = [code.token_scale for code in codes if code.token_scale is not None]
        return SparseCode(
            torch.cat([code.tokens + start for code, start in zip(codes, starts, strict=False)]),
            torch.cat([code.features for code in codes]),
            torch.cat([code.values for code in codes]),
            starts[-1],
            codes[0].n_features,
            TokenScale(*map(torch.cat, zip(*scales, strict=True))) if len(scales) == len(codes) else None,
        )
