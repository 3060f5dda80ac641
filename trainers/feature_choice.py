"""Feature choice: each feature matches a budget of tokens (arXiv 2411.02124), after a phase of mutual choice.

The paper's are the rule and budgets by a Zipf law of the features' ranks. Our reading: ranks mean nothing at a cold
start, so a run begins with mutual choice; at the switch ranks and law are frozen; the saved dictionary has a threshold
for each feature, at which it fires as often as its budget says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from saekit.settings import setting
from saekit.trainers.variant import Batch, BatchSettings, RunConfig, Variant

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.code import SparseCode
    from saekit.sae import SparseAutoencoder
    from saekit.trainers.calibration import Heldout
    from saekit.trainers.statistics import Statistics
    from saekit.zipf import ZipfLaw


class BudgetSettings(BatchSettings):
    """How budgets are made."""

    budgets: Literal["zipf", "uniform"] = setting("zipf", description="how features share the matches")
    zipf_exponent: float | None = setting(None, ge=0, description="of the law; fitted if not given")
    zipf_shift: float | None = setting(None, ge=0, description="of the law; fitted if not given")


class FeatureChoice(Variant):
    """Budgets from the switch on; saved as ``jumprelu`` with a threshold for each feature."""

    class Config(BudgetSettings):
        """The switch."""

        feature_choice_fraction: float = setting(
            0.1, gt=0, le=1, description="share of the steps, at the end, after mutual choice"
        )

    architecture = "jumprelu"
    compares_tokens = True

    def __init__(self, config: RunConfig, d_sae: int) -> None:
        super().__init__(config, d_sae)
        self.budgets: Tensor | None = None  # [F] since the switch
        self.law: ZipfLaw | None = None
        self._budgets(exponent=0.0, shift=0.0)  # impossible budgets are refused before any training

    def _budgets(self, exponent: float, shift: float) -> Tensor:
        """[F] by rank, densest first; they sum to k·n."""
        from saekit.allocation import zipf_budgets

        n = self.config.batch_size
        return zipf_budgets(self.k * n, self.d_sae, n, exponent, shift)

    @property
    def fraction(self) -> float:
        """Share of the steps after the switch."""
        return float(self.config.feature_choice_fraction)

    def switched(self, batch: Batch) -> bool:
        """Whether the budgets hold; for the last step they do."""
        last = (self.config.steps - 1) / self.config.steps
        return bool(batch.done >= min(1 - self.fraction, last))

    def allocate(self, batch: Batch) -> SparseCode:
        """Mutual choice before the switch, the budgets' largest of each column after it."""
        if not self.switched(batch):
            return batch.select.mutual_choice(self.k * batch.n_tokens)
        if self.budgets is None:
            self._freeze(batch.statistics)
        assert self.budgets is not None
        return batch.select.feature_choice(self.budgets)

    def _freeze(self, statistics: Statistics) -> None:
        """Fix every feature's rank and budget by the densities so far."""
        from saekit.zipf import ZipfLaw, ranks_of

        density = statistics.density
        if self.config.budgets == "uniform":
            by_rank = self._budgets(exponent=0.0, shift=0.0)
        else:
            exponent, shift = self.config.zipf_exponent, self.config.zipf_shift
            self.law = statistics.law(exponent, shift) or ZipfLaw(
                1.0 if exponent is None else exponent, 3.0 if shift is None else shift, scale=1.0, r2=0.0
            )  # where there is nothing to fit yet
            by_rank = self._budgets(self.law.exponent, self.law.shift)
        self.budgets = by_rank.to(density.device)[ranks_of(density)]

    def running_rule(self, statistics: Statistics) -> dict[str, Tensor]:
        """One threshold before the switch; after it each feature's, and none is reached where there is no budget."""
        rule = super().running_rule(statistics)
        if self.budgets is None:
            return rule
        kept = statistics.smallest_kept.where(~statistics.smallest_kept.isnan(), rule["threshold"])
        return {"threshold": kept.masked_fill(self.budgets == 0, 3e38)}

    def calibrate(self, sae: SparseAutoencoder, heldout: Heldout) -> None:
        """Set the thresholds at which each feature fires at its budget's rate on held-out activations."""
        assert sae.threshold is not None
        assert self.budgets is not None
        sae.threshold.copy_(heldout.feature_thresholds(sae, self.budgets / self.config.batch_size))

    def facts(self) -> dict[str, Any]:
        """The law that set the budgets."""
        return {"budgets": self.config.budgets, "zipf": None if self.law is None else self.law._asdict()}

    def state_dict(self) -> dict[str, Any]:
        """Budgets and law, once they are fixed."""
        return {"budgets": self.budgets, "law": None if self.law is None else tuple(self.law)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up budgets and law."""
        from saekit.zipf import ZipfLaw

        self.budgets = state["budgets"]
        self.law = None if state["law"] is None else ZipfLaw(*state["law"])
