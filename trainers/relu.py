"""ReLU: every positive pre-activation is active, and an L1 penalty keeps few positive (arXiv 2309.08600).

The penalty is weighted by the norm of each feature's decoder row (Transformer Circuits, April 2024). That its weight
follows from the k that is asked for is our reading.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from saekit.settings import setting
from saekit.trainers.sparsity_control import SparsityControl
from saekit.trainers.variant import Batch, KSettings, RunConfig, Variant

if TYPE_CHECKING:
    from saekit.code import SparseCode
    from saekit.sae import Architecture, SparseAutoencoder
    from saekit.trainers.terms import Term


class ReLU(Variant):
    """All positive pairs under an L1 penalty; saved as ``standard``."""

    class Config(KSettings):
        """How strong the penalty is."""

        l1: float | None = setting(
            None, ge=0, description="weight of the L1 penalty; driven towards k active features if not given"
        )

    architecture: Architecture = "standard"

    def __init__(self, config: RunConfig, d_sae: int) -> None:
        super().__init__(config, d_sae)
        self.control = SparsityControl(config.l1, self.k)

    def begin(self, sae: SparseAutoencoder) -> None:
        """Make the thresholds of the rule."""
        self.zeros = sae.b_enc.detach().clone().zero_()

    def allocate(self, batch: Batch) -> SparseCode:
        """All positive pairs."""
        code = batch.select.threshold_choice(self.zeros)
        self.control.update(code.l0)
        return code

    def terms(self) -> Iterable[Term]:
        """Reconstruction and the penalty."""
        from saekit.trainers.penalties import L1
        from saekit.trainers.terms import Reconstruction

        return [Reconstruction(), L1(self.control)]

    def state_dict(self) -> dict[str, Any]:
        """The weight of the penalty."""
        return {"l1": self.control.weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the weight."""
        self.control.weight = state["l1"]
