"""Hierarchical TopK: one dictionary that is good at many k (arXiv 2505.24473).

Each token matches its k best features; the loss is the mean error of the reconstructions from the best k' of them, over
a list of k'.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from saekit.errors import SaekitError
from saekit.settings import setting
from saekit.trainers.variant import Batch, KSettings, RunConfig, Variant

if TYPE_CHECKING:
    from saekit.code import SparseCode
    from saekit.sae import Architecture
    from saekit.trainers.terms import Term


class HierarchicalTopK(Variant):
    """Token choice under a loss of many k; saved as ``topk`` of the largest, good at each."""

    class Config(KSettings):
        """The list of k."""

        k_list: str | None = setting(
            None, description="numbers of features that reconstruct alone, as 8,16,32; halves of k if not given"
        )

    architecture: Architecture = "topk"

    def __init__(self, config: RunConfig, d_sae: int) -> None:
        super().__init__(config, d_sae)
        self.ks = _list(config.k_list, self.k)

    def allocate(self, batch: Batch) -> SparseCode:
        """The k largest of each row."""
        return batch.select.token_choice(self.k)

    def terms(self) -> Iterable[Term]:
        """The mean error over the list."""
        import torch

        from saekit.trainers.prefixes import PrefixReconstruction, rank_in_token

        def group_of(code: SparseCode) -> torch.Tensor:
            return torch.bucketize(rank_in_token(code), torch.tensor(self.ks, device=code.features.device), right=True)

        return [PrefixReconstruction(len(self.ks), group_of)]

    def facts(self) -> dict[str, Any]:
        """The list of k."""
        return {"k_list": self.ks}


def _list(text: str | None, k: int) -> list[int]:
    """The numbers that a text names, ascending up to k.

    Raises:
        SaekitError: they are no whole numbers from 1 to k.
    """
    if text is None:
        return sorted({max(1, k >> i) for i in range(4)})
    try:
        ks = {int(part) for part in text.split(",")} | {k}
    except ValueError:
        raise SaekitError(f"k_list = {text} are no whole numbers, as 8,16,32") from None
    if min(ks) < 1 or max(ks) > k:
        raise SaekitError(f"k_list = {text} are not all from 1 to k = {k}")
    return sorted(ks)
