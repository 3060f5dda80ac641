"""The figures of the dark matter suite that tables and reports show (``saekit.evals.dark_matter.saved`` finds them)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saekit.evals.dark_matter.settings import DarkMatterSettings
from saekit.evals.evaluation import Evaluation, Figure

if TYPE_CHECKING:
    from saekit.sae import SparseAutoencoder


class DarkMatterEvaluation(Evaluation):
    """A suite of its own: it compares dictionaries of one hook point, on other tokens than the standard one."""

    name = "dark_matter"
    title = "Dark matter"
    suite = "dark_matter"
    on_card = False
    Config = DarkMatterSettings
    figures = (
        Figure("l0", "L0", "{:.1f}", "active features a token"),
        Figure("document.fvu", "FVU", "{:.4f}", "of x̂; all here is of the half that nothing was fitted on"),
        Figure("document.plain.fvu_nonlinear", "FVU nonlin", "{:.4f}", "of x̂ + linear error"),
        Figure("random.plain.r2", "R²", "{:.3f}", "of the error on x, mean of dimensions, split by token"),
        Figure("document.plain.r2", "R² doc", "{:.3f}", "the same, split by document"),
        Figure("document.plain.r2_pooled", "R² pooled", "{:.3f}", "the same, all dimensions together"),
        Figure("document.shrinkage.r2", "R² rescaled", "{:.3f}", "R² doc with x̂ at its best length"),
        Figure("document.norms.error.from_x_with_intercept", "R² ‖e‖²", "{:.3f}", "of the error's squared norm on x"),
        Figure("document.norms.nonlinear.from_x_with_intercept", "R² ‖nonlin‖²", "{:.3f}", "of the nonlinear error's"),
        Figure("cost.recovered_linear", "CE + linear", "{:.3f}", "share of x̂'s cost that x̂ + linear recovers"),
        Figure("cost.recovered_nonlinear", "CE + nonlin", "{:.3f}", "share that x̂ + nonlinear recovers"),
        Figure("pursuit.fvu", "FVU pursuit", "{:.4f}", "features chosen by gradient pursuit"),
        Figure("pursuit.plain.fvu_nonlinear", "nonlin pursuit", "{:.4f}", "with its linear error added"),
        Figure("tokens", "tokens", "{:,d}", "held-out tokens, half of them to fit on", last=True),
    )

    def applies(self, sae: SparseAutoencoder) -> bool:
        """Never to one dictionary alone."""
        return False
