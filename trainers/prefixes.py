"""The mean error over prefixes of a code: those of the features, or those of each token's matches by strength."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.code import SparseCode
from saekit.kernels.pairs import pair_products, sum_by_feature, sum_by_token
from saekit.trainers.backward import add_through_encoder, gradient_of
from saekit.trainers.terms import Step, Term


class PrefixReconstruction(Term):
    """The mean of ‖x − x̂_g‖² over the variance, x̂_g from the matches of the groups 0 ... g and b_dec.

    A match of group h takes part in every x̂_g with g ≥ h, so its gradient is that of the sum of their errors: one pass
    over the matches does, group by group.
    """

    name = "prefix_fvu"

    def __init__(self, groups: int, group_of: Callable[[SparseCode], Int[Tensor, "m"]]) -> None:
        """Take the prefixes.

        Args:
            groups: how many there are.
            group_of: the group of each match, 0 to groups − 1.
        """
        self.groups, self.group_of = groups, group_of

    @torch.no_grad()
    def add(self, step: Step) -> Float[Tensor, ""]:
        """Add the gradients of all four parameters."""
        sae, code = step.sae, step.code
        W_dec, group = sae.W_dec.detach(), self.group_of(code)
        where = [(group == g).nonzero()[:, 0] for g in range(self.groups)]
        parts = [code.where(group == g) for g in range(self.groups)]
        errors = [step.centred]
        for part in parts:
            errors.append(errors[-1] - sum_by_token(W_dec, part.values, part))
        c = -2 / (self.groups * step.variance)
        table, at_values = torch.zeros_like(step.x), torch.zeros_like(code.values)
        for error, part, ids in reversed([*zip(errors[1:], parts, where, strict=True)]):
            table += c * error
            at_values[ids] = pair_products(table, W_dec, part)
            gradient_of(sae.W_dec).add_(sum_by_feature(table, part.values, part))
            gradient_of(sae.b_dec).add_(c * error.sum(0))
        add_through_encoder(sae, step.centred, code, at_values)
        losses: list[Tensor] = [error.square().sum() for error in errors[1:]]
        return torch.stack(losses).sum() / (self.groups * step.variance)


def rank_in_token(code: SparseCode) -> Int[Tensor, "m"]:
    """The place of each match among its token's, 0 for the strongest; among equals the first feature comes first."""
    order = code.values.sort(descending=True, stable=True).indices
    order = order[code.tokens[order].sort(stable=True).indices]
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order), device=order.device) - code.offsets[code.tokens]
    return ranks
