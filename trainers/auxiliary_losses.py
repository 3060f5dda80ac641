"""The registry of auxiliary losses: a new one is a class that chooses its pool of features, and one line here.

``aux_k`` (of OpenAI's TopK, on which arXiv 2411.02124 builds) revives the dead features, ``aux_zipf`` (arXiv
2411.02124) the dead and the underutilised ones. Who is underutilised is our reading: whose running density lies below τ
times the fitted Zipf curve at its rank. With τ = 0 both pools are the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from saekit.settings import MANY, Settings, setting

if TYPE_CHECKING:
    from jaxtyping import Bool
    from torch import Tensor

    from saekit.trainers.statistics import Statistics


class NoAuxiliary:
    """No auxiliary loss."""

    Config: type[Settings] = Settings


class AuxK(NoAuxiliary):
    """The dead features explain the error."""

    class Config(Settings):
        """What every auxiliary loss takes."""

        aux_alpha: float = setting(1 / 32, ge=0, description="weight of the auxiliary loss")
        k_aux: int | None = setting(
            None,
            gt=0,
            lt=MANY,
            own=True,
            within_width=True,
            description="auxiliary features a token; half of d_in if not given",
        )

    @staticmethod
    def pool(statistics: Statistics, settings: Config, dead_after: int) -> Bool[Tensor, "F"]:
        """Features that have not fired for ``dead_after`` tokens."""
        return statistics.dead(dead_after)


class AuxZipf(AuxK):
    """The dead features and those far below the Zipf curve explain the error."""

    class Config(AuxK.Config):
        """Those of ``aux_k``, and who is underutilised."""

        tau: float = setting(0.1, ge=0, description="below this share of the Zipf curve is underutilised; 0 is aux_k")

    @staticmethod
    def pool(statistics: Statistics, settings: AuxK.Config, dead_after: int) -> Bool[Tensor, "F"]:
        """The dead ones and those below τ times the Zipf curve."""
        assert isinstance(settings, AuxZipf.Config)
        return statistics.dead(dead_after) | statistics.underutilised(settings.tau)


AUXILIARY: dict[str, type[NoAuxiliary]] = {"none": NoAuxiliary, "aux_k": AuxK, "aux_zipf": AuxZipf}
