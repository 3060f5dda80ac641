"""All pairs of two sets of vectors, scored a few rows at a time, with a bound on the error of every score.

A score is ⟨left, right⟩ + left_bias · right_bias: pre-activations with tokens as rows (left is x − b_dec, right the
encoder, the biases 1 and b_enc) or with features as rows (the other way round). Nothing of rows × columns is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saekit.code import SparseCode
from saekit.kernels.devices import full_accumulation, rows_in_cache
from saekit.kernels.pairs import pair_products
from saekit.kernels.workspace import Workspace

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_ENTRIES = 1 << 25  # scores held at a time
MULTIPLE = 64  # columns are filled up to one with -inf, so that they fall into groups


@dataclass(frozen=True, eq=False)
class Scores:
    """Exact scores, in the dtype of the operands.

    Attributes:
        left: [r, d]; one row of scores each.
        right: [c, d]; one column each.
        left_bias: [r], or None for ones; where both are None, there is no bias.
        right_bias: [c], or None for ones.
        workspace: where the buffers are.
    """

    left: Float[Tensor, "r d"]
    right: Float[Tensor, "c d"]
    left_bias: Float[Tensor, "r"] | None
    right_bias: Float[Tensor, "c"] | None
    workspace: Workspace
    exact = True

    @property
    def shape(self) -> tuple[int, int]:
        """(r, c)."""
        return len(self.left), len(self.right)

    @property
    def rows_at_once(self) -> int:
        """Rows of one piece, a power of two: matrix products are fastest in those."""
        return 1 << max(0, (_ENTRIES // self._padded).bit_length() - 1)

    @property
    def _padded(self) -> int:
        return -(-len(self.right) // MULTIPLE) * MULTIPLE

    @cached_property
    def margin(self) -> Float[Tensor, "r"]:
        """What a score of each row may be off by, before it is rounded to its dtype."""
        return self.left.new_zeros(len(self.left))

    def rows(self, start: int, stop: int) -> Float[Tensor, "m p"]:
        """Scores of some rows, columns filled up with -inf; the next call overwrites them."""
        c = len(self.right)
        out = self.workspace("scores", (stop - start, self._padded), self.left.dtype, self.left.device)
        out[:, c:] = -torch.inf
        left_bias = None if self.left_bias is None else self.left_bias[start:stop]
        return self._fill(out, self.left[start:stop], left_bias)

    def exact_rows(self, ids: Int[Tensor, "m"]) -> Float[Tensor, "m c"]:
        """Exact scores of the rows of these numbers."""
        left_bias = None if self.left_bias is None else self.left_bias[ids]
        return self._fill(self.left.new_empty(len(ids), len(self.right)), self.left[ids], left_bias)

    def _fill(self, out: Tensor, left: Tensor, left_bias: Tensor | None) -> Tensor:
        scores = out[:, : len(self.right)]
        if left_bias is None and self.right_bias is not None:
            torch.addmm(self.right_bias, left, self.right.T, out=scores)
            return out
        torch.mm(left, self.right.T, out=scores)
        if left_bias is not None:
            scores.addr_(left_bias, left.new_ones(len(self.right)) if self.right_bias is None else self.right_bias)
        return out

    def at(self, pairs: SparseCode) -> Float[Tensor, "m"]:
        """Exact scores of chosen pairs of a row and a column."""
        scores = pair_products(self.left, self.right, pairs)
        if self.left_bias is None and self.right_bias is None:
            return scores
        if self.left_bias is None or self.right_bias is None:
            bias = self.right_bias[pairs.features] if self.left_bias is None else self.left_bias[pairs.tokens]  # type: ignore[index]
            return scores.add_(bias)
        return scores.addcmul_(self.left_bias[pairs.tokens], self.right_bias[pairs.features])


@dataclass(frozen=True, eq=False)
class ApproximateScores(Scores):
    """Scores from a bfloat16 product, which is several times as fast where the processor has the instructions for it.

    The bound: with l and r rounded to l̃ and r̃, ⟨l, r⟩ − ⟨l̃, r̃⟩ = ⟨l − l̃, r⟩ + ⟨l̃, r − r̃⟩, so by Cauchy-Schwarz it is
    at most ‖l − l̃‖·max‖r‖ + ‖l̃‖·max‖r − r̃‖; the rounding errors are measured, not assumed. Sums in float32 add
    (d + 8)·2⁻²² of ‖l‖·max‖r‖, theirs and the exact score's. Biases join the product as two further dimensions.
    """

    exact = False

    @cached_property
    def _operands(self) -> tuple[_Rounded, _Rounded]:
        left = _Rounded(self.left, self.left_bias, self.right_bias, self.workspace, "left")
        return left, _Rounded(self.right, self.right_bias, self.left_bias, self.workspace, "right")

    @cached_property
    def margin(self) -> Float[Tensor, "r"]:
        """What a score of each row may be off by, before it is rounded to bfloat16."""
        left, right = self._operands
        norms, bias = right.norms.amax(), right.bias.abs().amax()
        vectors = left.errors * norms + (left.norms + left.errors) * right.errors.amax()
        biases = left.bias_errors * bias + (left.bias.abs() + left.bias_errors) * right.bias_errors.amax()
        sums = (self.left.shape[1] + 8) * 2**-22 * (left.norms * norms + left.bias.abs() * bias)
        return vectors + biases + sums

    def rows(self, start: int, stop: int) -> Float[Tensor, "m p"]:
        """Approximate scores of some rows in bfloat16, columns filled up with -inf; the next call overwrites them."""
        left, right = self._operands
        c = len(self.right)
        out = self.workspace("scores", (stop - start, self._padded), torch.bfloat16, self.left.device)
        out[:, c:] = -torch.inf
        with full_accumulation(self.left.device):
            torch.mm(left.half[start:stop], right.half.T, out=out[:, :c])
        return out


class _Rounded:
    """Vectors and their biases in bfloat16, and how much that changed each.

    A bias joins its vector as two dimensions, what bfloat16 makes of it and of the rest, so that it is exact to 2⁻¹⁶;
    against a bias of one on the other side both are added, against another bias all four products.
    """

    def __init__(self, vectors: Tensor, bias: Tensor | None, other: Tensor | None, ws: Workspace, side: str) -> None:
        n, d = vectors.shape
        device = vectors.device
        self.bias = vectors.new_ones(n) if bias is None else bias
        upper = self.bias.bfloat16()
        lower = (self.bias - upper).bfloat16()
        self.bias_errors = (self.bias - upper - lower).abs()
        if bias is None and other is None:
            columns = []
        elif bias is None:
            columns = [upper, upper]
        elif other is None:
            columns = [upper, lower]
        else:
            columns = [upper, lower, upper, lower] if side == "left" else [upper, upper, lower, lower]
        self.half = ws(f"{side} bfloat16", (n, d + len(columns)), torch.bfloat16, device)
        if columns:
            self.half[:, d:] = torch.stack(columns, dim=1)
        self.norms = ws(f"{side} norms", (n,), vectors.dtype, device)
        self.errors = ws(f"{side} errors", (n,), vectors.dtype, device)
        rows = rows_in_cache(device, n, d)
        for i in range(0, n, rows):
            block, half = vectors[i : i + rows], self.half[i : i + rows, :d]
            half.copy_(block)
            torch.linalg.vector_norm(block, dim=1, out=self.norms[i : i + rows])
            torch.linalg.vector_norm(block - half, dim=1, out=self.errors[i : i + rows])
