"""Matryoshka: prefixes of the features reconstruct too, so that the first ones stay general (arXiv 2503.17547).

The matches are those of one allocation over the whole width, by token or over the batch, and the loss is the mean error
over prefixes; that they count alike is the paper's, that prefixes double is our reading.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from saekit.errors import SaekitError
from saekit.settings import setting
from saekit.trainers.mutual_choice import MutualChoice
from saekit.trainers.variant import Batch, BatchSettings, RunConfig

if TYPE_CHECKING:
    from saekit.code import SparseCode
    from saekit.sae import SparseAutoencoder
    from saekit.trainers.calibration import Heldout
    from saekit.trainers.terms import Term


class Matryoshka(MutualChoice):
    """Mutual or token choice under a loss of nested widths; saved as ``jumprelu`` or ``topk``."""

    class Config(BatchSettings):
        """The prefixes, and what allocates."""

        choice: Literal["mutual", "token"] = setting(
            "mutual", description="matches over the batch, or k for each token"
        )
        prefixes: str = setting(
            "0.0625,0.125,0.25,0.5,1", description="widths that reconstruct alone, as shares of the width or numbers"
        )

    def __init__(self, config: RunConfig, d_sae: int) -> None:
        super().__init__(config, d_sae)
        self.by_token = config.choice == "token"
        if self.by_token:
            self.architecture, self.compares_tokens = "topk", False
        self.widths = _widths(config.prefixes, d_sae)

    def allocate(self, batch: Batch) -> SparseCode:
        """The k largest of each row, or the k·n largest of the batch."""
        return batch.select.token_choice(self.k) if self.by_token else super().allocate(batch)

    def terms(self) -> Iterable[Term]:
        """The mean error over the prefixes."""
        import torch

        from saekit.trainers.prefixes import PrefixReconstruction

        def group_of(code: SparseCode) -> torch.Tensor:
            return torch.bucketize(code.features, torch.tensor(self.widths, device=code.features.device), right=True)

        return [PrefixReconstruction(len(self.widths), group_of)]

    def calibrate(self, sae: SparseAutoencoder, heldout: Heldout) -> None:
        """Set the threshold of mutual choice; token choice needs none."""
        if not self.by_token:
            super().calibrate(sae, heldout)

    def facts(self) -> dict[str, Any]:
        """The widths that reconstruct alone."""
        return {"matryoshka_widths": self.widths}


def _widths(prefixes: str, d_sae: int) -> list[int]:
    """The widths that a text names, ascending up to the whole.

    Raises:
        SaekitError: it names none, or one that is no prefix.
    """
    try:
        given = [float(part) for part in prefixes.split(",")]
    except ValueError:
        raise SaekitError(f"prefixes = {prefixes} are no numbers, as 0.25,0.5,1 or 256,1024") from None
    widths = {round(each * d_sae) if each <= 1 else int(each) for each in given} | {d_sae}
    if min(widths) < 1 or max(widths) > d_sae:
        raise SaekitError(f"prefixes = {prefixes} are not all within the width of {d_sae} features")
    return sorted(widths)
