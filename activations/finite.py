"""Tokens that are not learned from: NaN or infinite, an error unless they are to be skipped; or far too large.

Attention sinks have a hundred times the norm of other tokens, and would hold most of the variance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saekit.activations.batch import ActivationBatch
from saekit.errors import SaekitError
from saekit.finite import not_finite

_FEW = 4096  # bad tokens before their share is looked at
SAMPLE = 16_384  # tokens of which the median norm is taken


class BadTokens:
    """What becomes of tokens with numbers that are not finite, or with too large a norm.

    Attributes:
        skip: whether those that are not finite are left out; else the first one is an error.
        count: tokens left out so far, of either kind.
        limits: by hook point, the largest ‖x‖ of a token that is not left out.
    """

    def __init__(self, skip: bool = False, count: int = 0, limits: Mapping[str, float] | None = None) -> None:
        self.skip, self.count, self.limits = skip, count, dict(limits or {})
        self._seen = self._left_out = 0  # since this object was made

    @property
    def leaves_out(self) -> bool:
        """Whether any kind of token is left out."""
        return self.skip or bool(self.limits)

    def sift(self, batches: Sequence[ActivationBatch], hooks: Sequence[str], where: str) -> list[ActivationBatch]:
        """The batches without bad tokens; they hold the same tokens at several hooks, and still do afterwards.

        Args:
            batches: of each hook.
            hooks: their names.
            where: the place of these tokens, for the message.

        Raises:
            SaekitError: there are bad tokens and they are not to be skipped (the first is named), or most are bad.
        """
        bad: Tensor | None = None
        for batch, hook in zip(batches, hooks, strict=True):
            for kind, values in (("activations", batch.x), ("gradients", batch.gradients)):
                here = None if values is None else not_finite(values)
                if here is None:
                    continue
                if not self.skip:
                    raise SaekitError(_told(batch, here, kind, hook, where))
                bad = _either(bad, here)
            if hook in self.limits:
                bad = _either(bad, norms(batch) > self.limits[hook])
        self._seen += len(batches[0].x)
        if bad is None:
            return list(batches)
        self.count += int(bad.sum())
        self._left_out += int(bad.sum())
        if self._left_out > max(_FEW, self._seen // 2):
            raise SaekitError(
                f"{self._left_out:,} of {self._seen:,} tokens at '{hooks[0]}' are NaN or inf"
                + (" or beyond --max-norm" if self.limits else "")
                + ": too many to skip"
            )
        return [batch.where(~bad) for batch in batches]


def check_finite(batch: ActivationBatch, hook: str, where: str) -> None:
    """Raise SaekitError where an activation or a gradient is NaN or infinite, naming its token."""
    BadTokens().sift([batch], [hook], where)


def norms(batch: ActivationBatch) -> Float[Tensor, "m"]:
    """‖x‖ of each token."""
    found: Tensor = batch.x.float().norm(dim=1)
    return found


def norm_limit(batches: Iterable[ActivationBatch], max_norm: float) -> float:
    """``max_norm`` times the median norm of these tokens; it is written down wherever it is used.

    Raises:
        SaekitError: the median is 0, or there are no tokens.
    """
    median = float(torch.cat([norms(batch).cpu() for batch in batches]).median())
    if not 0 < median < math.inf:
        raise SaekitError(f"--max-norm {max_norm} is a multiple of the median norm, which is {median} here")
    return max_norm * median


def limits_in(provenance: Mapping[str, Any]) -> dict[str, float]:
    """The largest norm at the hook point that a provenance names, if its tokens were held to one."""
    limit = provenance.get("norm_limit")
    return {} if limit is None else {str(provenance.get("hook")): limit}


def _either(bad: Bool[Tensor, "m"] | None, here: Bool[Tensor, "m"]) -> Bool[Tensor, "m"]:
    return here if bad is None else bad | here.to(bad.device)


def _told(batch: ActivationBatch, bad: Tensor, kind: str, hook: str, where: str) -> str:
    i = int(bad.nonzero()[0])
    return (
        f"NaN or inf in the {kind} of '{hook}' at {where}, row {i} (token id {int(batch.tokens[i])}, document "
        f"{int(batch.documents[i])}, position {int(batch.positions[i])}); {int(bad.sum())} such tokens here; "
        f"--skip-bad-tokens leaves them out"
    )
