"""Standard errors of figures over documents: sums in groups of documents, and the jackknife over those."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

GROUPS = 1024  # documents share these once there are more of them


class DocumentSums:
    """Sums of some columns over tokens, kept apart by document as far as memory is bounded.

    Tokens of one document are not independent, so documents are what a standard error counts. A document's group is
    its number modulo 1,024: up to so many running numbers, each document is a group of its own. Memory is
    O(1,024 · columns), and 8 bytes a document to count them.

    Attributes:
        sums: [1024, c] in float64.
    """

    def __init__(self, columns: int) -> None:
        self.sums = torch.zeros(GROUPS, columns, dtype=torch.float64)
        self._filled = torch.zeros(GROUPS, dtype=torch.bool)
        self._alone = 0  # rows that named no document
        self._numbers = [torch.empty(0, dtype=torch.long)]
        self._compact = 0  # numbers in the first of them, each of which is there once

    def add(self, values: Float[Tensor, "n c"], documents: Int[Tensor, "n"] | None = None) -> None:
        """Count n tokens.

        Args:
            values: what to sum.
            documents: numbers of their documents; if not known, each row is a document of its own.
        """
        if documents is None:
            documents = torch.arange(self._alone, self._alone + len(values))
            self._alone += len(values)
        else:
            documents = documents.cpu().long()
            self._numbers.append(torch.unique(documents))
            if sum(map(len, self._numbers)) > 2 * self._compact + GROUPS:
                self._merge_numbers()
        group = documents % GROUPS
        self.sums.index_add_(0, group, values.cpu().double())
        self._filled[group] = True

    def __add__(self, other: DocumentSums) -> DocumentSums:
        """The sums over both; a number means the same document in either."""
        both = DocumentSums(self.sums.shape[1])
        both.sums = self.sums + other.sums
        both._filled = self._filled | other._filled
        both._alone = self._alone + other._alone
        both._numbers = [*self._numbers, *other._numbers]
        both._merge_numbers()
        return both

    def beside(self, other: DocumentSums) -> DocumentSums:
        """The columns of both, over the same documents."""
        both = self + DocumentSums(self.sums.shape[1])
        both.sums = torch.cat([self.sums, other.sums], dim=1)
        both._filled |= other._filled
        return both

    def _merge_numbers(self) -> None:
        self._numbers = [torch.unique(torch.cat(self._numbers))]
        self._compact = len(self._numbers[0])

    @property
    def documents(self) -> int:
        """How many there are."""
        self._merge_numbers()
        return self._alone + self._compact

    def total(self) -> Float[Tensor, "c"]:
        """The sums over all documents."""
        return self.sums.sum(0)

    def figures(
        self, figures: Callable[[Float[Tensor, "... c"]], Mapping[str, Float[Tensor, "..."]]]
    ) -> dict[str, float | None]:
        """Each figure of the sums and, as ``NAME_se``, its standard error over documents.

        The error is the jackknife's, from the figure's values θ_g with each of G groups left out in turn: the root of
        (G − 1)/G · Σ(θ_g − θ̄)². Groups count as documents do.

        Args:
            figures: figures of the sums, for any number of leading dimensions; twice the sums must give the same.

        Returns:
            The error is None where there are fewer than two documents, or a figure is not finite without one of them.
        """
        sums = self.sums[self._filled]
        total = self.total()
        n = len(sums)
        found: dict[str, float | None] = {}
        for name, values in figures(torch.cat([total[None], total - sums])).items():
            value, without = values[0], values[1:]
            error = float(((without - without.mean()).square().sum() * (n - 1) / n).sqrt()) if n > 1 else math.nan
            found |= {name: float(value), f"{name}_se": error if math.isfinite(error) else None}
        return found
