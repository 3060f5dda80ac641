"""A loss that runs away is noticed soon, and not saved over a good state."""

from __future__ import annotations

from saekit.errors import SaekitError

_RATE = 0.1  # of the running mean over steps
_FORGET = 1.005  # growth of the remembered lowest mean a step, so that a lasting change becomes the new normal
_SUSPECT, _DIVERGED = 3.0, 10.0  # times the lowest mean of late
_SMALL = 0.5  # an FVU below this is no divergence, whatever it was before
_HOPELESS = 2.0  # an FVU twice that of a dictionary which gives the mean alone


class Divergence:
    """Watches the running mean of a run's FVU (our reading of what diverges).

    Attributes:
        mean: running mean of the FVU.
        lowest: what it was at its lowest of late.
        first: FVU of the first step.
    """

    def __init__(self) -> None:
        self.mean = self.lowest = self.first = 0.0

    def update(self, fvu: float, step: int) -> None:
        """Look at one more step.

        Raises:
            SaekitError: the mean is ten times its lowest and above 0.5, or above 2 and twice the FVU of the first step.
        """
        if step == 0:
            self.mean = self.lowest = self.first = fvu
        self.mean += _RATE * (fvu - self.mean)
        self.lowest = min(self.mean, _FORGET * self.lowest)
        ran_away = self.mean > max(_SMALL, _DIVERGED * self.lowest)
        if ran_away or self.mean > _HOPELESS * max(1.0, self.first):
            raise SaekitError(
                f"the loss diverges: the mean FVU is {self.mean:.3g} at step {step + 1}, after {self.lowest:.3g}; "
                f"the last good checkpoint is kept; a lower --lr may help"
            )

    @property
    def suspect(self) -> bool:
        """Whether the state should not replace an older one."""
        return self.mean > max(_SMALL / 2, _SUSPECT * self.lowest)

    def state_dict(self) -> dict[str, float]:
        """Everything, for a checkpoint."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take up what ``state_dict`` gave."""
        vars(self).update(state)
