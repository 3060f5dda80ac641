"""Gradient TopK (g-SAE, arXiv 2411.10397): TopK whose training selection weighs each feature's effect on the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saekit.settings import setting
from saekit.trainers.variant import Batch, KSettings, RunConfig, Variant

if TYPE_CHECKING:
    from saekit.code import SparseCode


class GradientTopK(Variant):
    """Gradient choice in training; saved as plain ``topk``, since gradients know the next token (our reading)."""

    class Config(KSettings):
        """How much gradients count."""

        beta: float = setting(1.0, ge=0, description="weight of the gradient in the selection; 0 is TopK")

    architecture = "topk"

    @classmethod
    def needs_gradients(cls, config: RunConfig) -> bool:
        """With a weight of 0 it is TopK, and nothing is asked of the model that TopK does not ask."""
        return bool(config.beta > 0)

    def facts(self) -> dict[str, Any]:
        """The weight of the gradient; evaluations of the gradient selection use it."""
        return {"beta": self.config.beta}

    def allocate(self, batch: Batch) -> SparseCode:
        """The k of each row with the largest relu(pre) · (1 + β·|g W_decᵀ| / s_g), s_g the batch's root mean square."""
        return batch.select.gradient_choice(self.k, self.config.beta)
