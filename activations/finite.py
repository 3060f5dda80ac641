"""Tokens whose activations or gradients are NaN or infinite: an error, or left out and counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool
from torch import Tensor

from saekit.errors import SaekitError

if TYPE_CHECKING:
    from saekit.activations.harvest import ActivationBatch

_FEW = 4096  # bad tokens before their share is looked at


class BadTokens:
    """What becomes of tokens with numbers that are not finite.

    Attributes:
        skip: whether they are left out; else the first one is an error.
        count: tokens left out so far.
    """

    def __init__(self, skip: bool = False, count: int = 0) -> None:
        self.skip, self.count = skip, count
        self._seen = self._left_out = 0  # since this object was made

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
                here = None if values is None else _not_finite(values)
                if here is None:
                    continue
                if not self.skip:
                    raise SaekitError(_told(batch, here, kind, hook, where))
                bad = here if bad is None else bad | here.to(bad.device)
        self._seen += len(batches[0].x)
        if bad is None:
            return list(batches)
        self.count += int(bad.sum())
        self._left_out += int(bad.sum())
        if self._left_out > max(_FEW, self._seen // 2):
            raise SaekitError(
                f"{self._left_out:,} of {self._seen:,} tokens at '{hooks[0]}' are NaN or inf: too many to skip"
            )
        return [batch.where(~bad) for batch in batches]


def check_finite(batch: ActivationBatch, hook: str, where: str) -> None:
    """Raise SaekitError where an activation or a gradient is NaN or infinite, naming its token."""
    BadTokens().sift([batch], [hook], where)


def _not_finite(values: Tensor) -> Bool[Tensor, "m"] | None:
    """The tokens with a number that is not finite; None where there are none."""
    if bool(torch.isfinite(values.sum())):  # one pass; an overflow of the sum is told apart below
        return None
    bad = (~torch.isfinite(values)).any(1)
    return bad if bool(bad.any()) else None


def _told(batch: ActivationBatch, bad: Tensor, kind: str, hook: str, where: str) -> str:
    i = int(bad.nonzero()[0])
    return (
        f"NaN or inf in the {kind} of '{hook}' at {where}, row {i} (token id {int(batch.tokens[i])}, document "
        f"{int(batch.documents[i])}, position {int(batch.positions[i])}); {int(bad.sum())} such tokens here; "
        f"--skip-bad-tokens leaves them out"
    )
