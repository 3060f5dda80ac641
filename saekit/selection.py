"""The allocation rules on a batch of activations, without its dense pre-activations.

``Selection`` finds the same matches as the rules of ``saekit.allocation`` on the dense matrix, which is never held.
With ``approximate`` scores, candidates come from a bfloat16 product whose error is bounded; all pairs that the bound
cannot rule out are scored again in full precision, and the rule decides on those. Rows in which too many are left are
scored again as a whole. So the matches are those of exact scores, up to the order in which float32 sums are added.
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saekit.allocation import (
    check_budgets,
    check_k,
    check_total,
    feature_choice,
    gradient_choice,
    mutual_choice,
    threshold_choice,
    token_choice,
)
from saekit.code import SparseCode
from saekit.errors import SaekitError
from saekit.kernels.influenced import InfluencedScores
from saekit.kernels.scan import above, above_largest, largest_of_rows
from saekit.kernels.scores import ApproximateScores, Scores
from saekit.kernels.select import largest_among, largest_in_rows
from saekit.kernels.workspace import Workspace

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_SAMPLE = 64  # tokens of which mutual choice sees everything before it begins


def _bounds_of(bounds: Tensor, piece: Tensor, maxima: Tensor, part: slice) -> Tensor:
    return bounds[part]


class DenseSelection:
    """The rules on dense pre-activations: the plain twin of ``Selection``.

    Attributes:
        pre: [n, F] pre-activations.
        token_norms: [n] in units of which pairs of different tokens are compared, or None.
        influence: [n, F] of the gradients, for gradient choice.
    """

    rescored = 0.0

    def __init__(
        self,
        pre: Float[Tensor, "n F"],
        token_norms: Float[Tensor, "n"] | None = None,
        influence: Float[Tensor, "n F"] | None = None,
    ) -> None:
        self.pre, self.token_norms, self.influence = pre, token_norms, influence

    def token_choice(self, k: int) -> SparseCode:
        """Each token's k best features."""
        return token_choice(self.pre, k)

    def mutual_choice(self, total: int) -> SparseCode:
        """The batch's ``total`` best pairs."""
        return mutual_choice(self.pre, total, self.token_norms)

    def feature_choice(self, budgets: Int[Tensor, "F"]) -> SparseCode:
        """Each feature's ``budgets[j]`` best tokens."""
        return feature_choice(self.pre, budgets, self.token_norms)

    def gradient_choice(self, k: int, beta: float) -> SparseCode:
        """Each token's k best features, weighed by their effect on the loss."""
        if beta == 0:
            return self.token_choice(k)
        if self.influence is None:
            raise SaekitError("gradient choice needs gradients beside the activations")
        return gradient_choice(self.pre, self.influence, k, beta)

    def threshold_choice(self, thresholds: Float[Tensor, "F"]) -> SparseCode:
        """All pairs above their feature's threshold."""
        return threshold_choice(self.pre, thresholds, self.token_norms)


class Selection:
    """The rules on activations and an encoder; call one of them.

    Attributes:
        rescored: share of the rows (tokens, or features in feature choice) that were scored again in full precision.
    """

    def __init__(
        self,
        x: Float[Tensor, "n d"],
        W_enc: Float[Tensor, "d F"],
        b_enc: Float[Tensor, "F"],
        *,
        token_norms: Float[Tensor, "n"] | None = None,
        gradients: Float[Tensor, "n d"] | None = None,
        W_dec: Float[Tensor, "F d"] | None = None,
        approximate: bool = False,
        workspace: Workspace | None = None,
    ) -> None:
        """Take a batch, without gradients.

        Args:
            x: [n, d] activations less b_dec.
            W_enc, b_enc: the encoder; quickest where a feature's column is contiguous.
            token_norms: [n] in units of which pairs of different tokens are compared; None compares them as they are.
            gradients, W_dec: [n, d] of the model's loss and the decoder, for gradient choice.
            approximate: whether candidates come from a bfloat16 product.
            workspace: buffers of earlier batches, to use again.
        """
        self.x, self.W, self.b_enc = x, W_enc.T, b_enc
        self.token_norms = None if token_norms is None else token_norms.clamp_min(1e-12)
        self.gradients, self.W_dec = gradients, W_dec
        self.workspace = Workspace() if workspace is None else workspace
        self._kind = ApproximateScores if approximate else Scores
        self.rescored = 0.0

    @cached_property
    def pre(self) -> Float[Tensor, "n F"]:
        """The dense pre-activations, for rules that need them."""
        return torch.addmm(self.b_enc, self.x, self.W.T)

    def token_choice(self, k: int) -> SparseCode:
        """Each token's k best features, as ``saekit.allocation.token_choice``."""
        check_k(k, len(self.W))
        scores = self._kind(self.x, self.W, None, self.b_enc, self.workspace)
        return self._largest_of_rows(scores, self._counts(k))

    def gradient_choice(self, k: int, beta: float) -> SparseCode:
        """Each token's k best features, weighed by their effect on the loss, as ``saekit.allocation.gradient_choice``.

        Its scores are exact always, since the bound on approximate ones would have to hold for a product of two;
        unless β is 0, where it is token choice, which looks at no gradients.
        """
        check_k(k, len(self.W), beta)
        if beta == 0:
            return self.token_choice(k)
        if self.gradients is None or self.W_dec is None:
            raise SaekitError("gradient choice needs gradients beside the activations")
        scores = InfluencedScores(
            self.x, self.W, None, self.b_enc, self.workspace, gradients=self.gradients, W_dec=self.W_dec, beta=beta
        )
        code = self._largest_of_rows(scores, self._counts(k))
        code = code.with_values(scores.at(code))  # the scores are not what is decoded
        return code.where(code.values > 0)

    def mutual_choice(self, total: int) -> SparseCode:
        """The batch's ``total`` best pairs, as ``saekit.allocation.mutual_choice``."""
        check_total(total, len(self.x), len(self.W))
        norms = self.x.new_ones(len(self.x)) if self.token_norms is None else self.token_norms
        scores = self._kind(self.x, self.W, None, self.b_enc, self.workspace)
        least = self._lower_bound(total, norms)
        for share in (1.0, 0.7, 0.4, 0.2, 0.1, 0.0):
            if share == 0 or least == 0:  # every positive pair, if need be
                share, scores = 0.0, Scores(self.x, self.W, None, self.b_enc, self.workspace)
            bounds = share * least * (1 - 1e-5) * norms
            code = above(scores, partial(_bounds_of, bounds)).pairs
            strengths = code.values / norms[code.tokens]
            # where so many lie above the bound, the total largest are among them
            if share == 0 or int((strengths >= share * least).sum()) >= total:
                break
            self.rescored = 1.0  # the sample misled
        return code.where(largest_among(strengths, total))

    def _lower_bound(self, total: int, norms: Float[Tensor, "n"]) -> float:
        """A value, at least 0, that almost surely lies below the ``total`` best pairs, from a sample of the tokens."""
        ids = torch.arange(0, len(self.x), max(1, len(self.x) // _SAMPLE), device=self.x.device)
        scores = Scores(self.x, self.W, None, self.b_enc, self.workspace).exact_rows(ids) / norms[ids, None]
        expected = total / len(self.x) * len(ids)
        rank = int(1.2 * expected + 6 * expected**0.5 + 10)
        if scores.shape[1] % 8 == 0 and scores.numel() >= 16 * rank:
            scores = scores.view(len(ids), 8, -1).amax(1)  # fewer to sort: group maxima bound their like from below
        return max(0.0, float(scores.flatten().topk(rank, sorted=False).values.min())) if rank < scores.numel() else 0.0

    def feature_choice(self, budgets: Int[Tensor, "F"]) -> SparseCode:
        """Each feature's ``budgets[j]`` best tokens, as ``saekit.allocation.feature_choice``."""
        check_budgets(budgets, len(self.x), len(self.W))
        return self._by_token(self._largest_of_rows(self._scores_by_feature(), budgets.to(self.x.device)))

    def threshold_choice(self, thresholds: Float[Tensor, "F"]) -> SparseCode:
        """All pairs above their feature's threshold, as ``saekit.allocation.threshold_choice``."""
        thresholds = thresholds.clamp(min=0)
        bounds = thresholds * (1 - 1e-5)
        by_feature = above(self._scores_by_feature(), partial(_bounds_of, bounds)).pairs
        return self._by_token(by_feature.where(by_feature.values > thresholds[by_feature.tokens]))

    def _scores_by_feature(self) -> Scores:
        """What pairs are compared by, features as rows."""
        x, unit = self.x, None
        if self.token_norms is not None:
            unit = 1 / self.token_norms
            x = torch.mul(x, unit[:, None], out=self.workspace("unit", tuple(x.shape), x.dtype, x.device))
        return self._kind(self.W, x, self.b_enc, unit, self.workspace)

    def _by_token(self, by_feature: SparseCode) -> SparseCode:
        """Pairs of a feature and a token as those of a token and a feature, with pre-activations for values."""
        tokens, order = by_feature.features.sort(stable=True)
        values = by_feature.values[order]
        values = values if self.token_norms is None else values * self.token_norms[tokens]
        return SparseCode(tokens, by_feature.tokens[order], values, len(self.x), len(self.W))

    def _counts(self, k: int) -> Int[Tensor, "n"]:
        return torch.full((len(self.x),), k, device=self.x.device)

    def _largest_of_rows(self, scores: Scores, counts: Int[Tensor, "r"]) -> SparseCode:
        """The ``counts[i]`` largest positive scores of each row i."""
        pairs, overflow_rows = above_largest(scores, counts)
        pairs = pairs.where(largest_of_rows(pairs, counts))
        if not overflow_rows.numel():
            return pairs
        self.rescored = overflow_rows.numel() / len(counts)
        rows, columns, values = [pairs.tokens], [pairs.features], [pairs.values]
        for count in torch.unique(counts[overflow_rows]).tolist():
            for ids in torch.split(overflow_rows[counts[overflow_rows] == count], scores.rows_at_once):
                exact = scores.exact_rows(ids)
                best = largest_in_rows(exact, count)
                rows.append(ids[:, None].expand_as(best).flatten())
                columns.append(best.flatten())
                values.append(exact.gather(1, best).flatten())
        row, order = torch.cat(rows).sort(stable=True)
        code = SparseCode(row, torch.cat(columns)[order], torch.cat(values)[order], *scores.shape)
        return code.where(code.values > 0)
