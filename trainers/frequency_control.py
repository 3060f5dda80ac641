"""Frequency control: thresholds that feedback drives towards each feature's budget while it trains (our reading).

As in feature choice a run begins with mutual choice, and at the switch ranks and budgets m_j are frozen. From then on
feature j is active above a threshold θ_j, in units of the token's norm, as it will be when it is saved; θ_j rises where
it fires more often than its target and falls where it fires less. Targets go from the rates at the switch to m_j/n, so
that no feature is cut off at once. Group Bias Adaptation (arXiv 2506.14002) drives biases in the same spirit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saekit.settings import setting
from saekit.trainers.feature_choice import BudgetSettings, FeatureChoice
from saekit.trainers.variant import Batch

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.code import SparseCode
    from saekit.trainers.statistics import Statistics


class FrequencyControl(FeatureChoice):
    """Feature choice's budgets without its batch rule; saved as ``jumprelu`` with a threshold for each feature."""

    class Config(BudgetSettings):
        """The switch and the feedback."""

        control_fraction: float = setting(
            0.7, gt=0, le=1, description="share of the steps, at the end, that thresholds decide, after mutual choice"
        )
        control_rate: float = setting(
            0.02,
            gt=0,
            lt=1,
            description="step of log thresholds where a feature fires twice too often",
        )

    thresholds: Tensor | None = None  # [F] since the switch
    rates: Tensor | None = None  # [F] at the switch

    @property
    def fraction(self) -> float:
        """Share of the steps after the switch."""
        return float(self.config.control_fraction)

    def allocate(self, batch: Batch) -> SparseCode:
        """Mutual choice before the switch, all pairs above their threshold after it."""
        if not self.switched(batch):
            return batch.select.mutual_choice(self.k * batch.n_tokens)
        if self.thresholds is None:
            self._begin(batch)
        assert self.thresholds is not None
        code = batch.select.threshold_choice(self.thresholds)
        fired = code.matches_per_feature() / batch.n_tokens
        off = (fired / self._targets(batch.done) - 1).clamp(max=3)
        self.thresholds = self.thresholds * (self.config.control_rate * off).exp().to(self.thresholds)
        return code

    def _begin(self, batch: Batch) -> None:
        """Fix the budgets; thresholds begin where this batch's mutual choice ends, the same for all features."""
        self._freeze(batch.statistics)
        code = batch.select.mutual_choice(self.k * batch.n_tokens)
        norms = batch.token_norms
        strengths = code.values if norms is None else code.values / norms[code.tokens]
        self.thresholds = code.values.new_full((self.d_sae,), float(strengths.min()) if len(strengths) else 1.0)
        self.rates = batch.statistics.density.clamp(min=0.1 / self.config.batch_size)

    def _targets(self, done: float) -> Tensor:
        """Rates [F] aimed at: from those at the switch to the budgets', which hold for the second half."""
        assert self.budgets is not None
        assert self.rates is not None
        share = min(1.0, 2 * (done - (1 - self.fraction)) / self.fraction)
        budgets = (self.budgets / self.config.batch_size).to(self.rates)
        targets: Tensor = self.rates ** (1 - share) * budgets**share
        return targets

    def running_rule(self, statistics: Statistics) -> dict[str, Tensor]:
        """The thresholds that feedback has driven, once they decide."""
        return super().running_rule(statistics) if self.thresholds is None else {"threshold": self.thresholds}

    def state_dict(self) -> dict[str, Any]:
        """Budgets, law, thresholds and the rates at the switch."""
        return {**super().state_dict(), "thresholds": self.thresholds, "rates": self.rates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
        super().load_state_dict(state)
        self.thresholds, self.rates = state["thresholds"], state["rates"]
