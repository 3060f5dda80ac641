"""What a run remembers about its features while it trains."""

from __future__ import annotations

import torch
from torch import Tensor

from saekit.code import SparseCode


class Statistics:
    """Counts over the training tokens, exact for any batch size.

    Attributes:
        tokens: training tokens seen.
        since_fired: [F] tokens since the end of the last batch in which each feature was active.
        smallest_kept: running mean of each batch's smallest kept activation (rate 0.01, unbiased from the first batch).
    """

    def __init__(self, n_features: int, device: torch.device) -> None:
        self.tokens = 0
        self.since_fired = torch.zeros(n_features, dtype=torch.long, device=device)
        self.smallest_kept = 0.0
        self._weight = 0.0

    def update(self, code: SparseCode) -> None:
        """Count one batch."""
        self.tokens += code.n_tokens
        self.since_fired += code.n_tokens
        self.since_fired[code.features] = 0
        if code.values.numel():
            self._weight += 0.01 * (1 - self._weight)
            self.smallest_kept += 0.01 / self._weight * (float(code.values.min()) - self.smallest_kept)

    def dead_share(self, dead_after: int) -> float:
        """Share of the features that have not fired for more than ``dead_after`` tokens."""
        return float((self.since_fired > dead_after).float().mean())

    def state_dict(self) -> dict[str, int | float | Tensor]:
        """Everything, for a checkpoint."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, int | float | Tensor]) -> None:
        """The reverse of ``state_dict``."""
        vars(self).update(state)
