"""What a run remembers about its features while it trains, shared by all variants and losses."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saekit.code import SparseCode
from saekit.kernels.devices import exact_dtype
from saekit.zipf import ZipfLaw, fit_zipf, ranks_of

_RATE = 0.01  # of the running means over batches
_QUICK = 0.1  # of the threshold's, which each batch tells well by itself


class Statistics:
    """Figures of the training tokens; all but ``smallest_kept`` are the same however the tokens are cut into batches.

    Attributes:
        tokens: training tokens seen.
        window: tokens; a firing's weight in ``density`` falls by e in as many.
        since_fired: [F] tokens since each feature was last active, all tokens for one that never was.
        smallest_kept: [F] running mean (rate 0.01, unbiased from the first) of the smallest affinity at which each
            feature was active in a batch, over the batches in which it was; NaN for one that never was. In units of the
            token's norm where the rule compares those. By nature it depends on the size of the batches.
        threshold: [] running mean (rate 0.1) of the smallest affinity at which any feature was active in a batch, in
            the same units; NaN before the first match.
    """

    def __init__(self, n_features: int, window: int, device: torch.device) -> None:
        self.tokens = 0
        self.window = window
        self.since_fired = torch.zeros(n_features, dtype=torch.long, device=device)
        exact = exact_dtype(device)
        self._fired = torch.zeros(n_features, dtype=exact, device=device)
        self._seen = 0.0
        self._kept = torch.zeros(n_features, device=device)
        self._kept_weight = torch.zeros(n_features, device=device)
        self.threshold = torch.full((), math.nan, device=device)

    @property
    def density(self) -> Float[Tensor, "F"]:
        """Running mean of each feature's firing rate, recent tokens weighing most."""
        return self._fired / max(self._seen, 1.0)

    @property
    def smallest_kept(self) -> Float[Tensor, "F"]:
        """[F] Running mean of the smallest affinity at which each feature was active; NaN for one that never was."""
        return self._kept / self._kept_weight

    def update(self, code: SparseCode, token_norms: Float[Tensor, "n"] | None = None) -> None:
        """Count one batch; ``token_norms`` where affinities are compared in units of them."""
        n = code.n_tokens
        self.tokens += n
        last = torch.full_like(self.since_fired, -1).scatter_reduce_(0, code.features, code.tokens, "amax")
        self.since_fired = torch.where(last < 0, self.since_fired + n, n - 1 - last)
        # each token has a weight of its own by its age, so that batches of any size give the same
        weights = torch.exp((code.tokens + 1 - n).to(self._fired.dtype) / self.window)
        fading = math.exp(-n / self.window)
        self._fired = fading * self._fired
        self._fired.index_add_(0, code.features, weights)
        self._seen = fading * self._seen + (1 - fading) / (1 - math.exp(-1 / self.window))
        smallest = self._kept.new_full(self._kept.shape, math.inf)
        kept = code.values.detach() if token_norms is None else code.values.detach() / token_norms[code.tokens]
        smallest.scatter_reduce_(0, code.features, kept.to(smallest.dtype), "amin")
        active = last >= 0
        least = torch.where(active.any(), smallest.min(), self.threshold)
        self.threshold = torch.where(self.threshold.isnan(), least, torch.lerp(self.threshold, least, _QUICK))
        self._kept = torch.where(active, (1 - _RATE) * self._kept + _RATE * smallest, self._kept)
        self._kept_weight = torch.where(active, (1 - _RATE) * self._kept_weight + _RATE, self._kept_weight)

    def law(self, exponent: float | None = None, shift: float | None = None) -> ZipfLaw | None:
        """The Zipf-Mandelbrot law of the densities; features silent for a whole window count as silent altogether.

        Their density only fades; taken as it is, it would bend the fit where many are dead. An exponent or shift that
        is given is kept.
        """
        return fit_zipf(self.density.masked_fill(self.dead(self.window), 0.0), exponent=exponent, shift=shift)

    def dead(self, dead_after: int) -> Bool[Tensor, "F"]:
        """Features that have not fired for more than ``dead_after`` tokens."""
        return self.since_fired > dead_after

    def underutilised(self, tau: float) -> Bool[Tensor, "F"]:
        """Features whose density lies below ``tau`` times the fitted Zipf curve at their rank."""
        density = self.density
        law = self.law() if tau > 0 else None
        if law is None:
            return torch.zeros_like(density, dtype=torch.bool)
        return density < tau * law.curve(len(density)).to(density)[ranks_of(density)]

    def state_dict(self) -> dict[str, int | float | Tensor]:
        """Everything, for a checkpoint."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, int | float | Tensor]) -> None:
        """Take up what ``state_dict`` gave."""
        vars(self).update(state)
