"""What a variant of a sparse autoencoder is: an allocation rule, the losses it is trained by, and its inference rule.

This file and those of the variants import torch inside methods alone, so that the command line helps without it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from saekit.settings import MANY, Settings, setting

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from saekit.code import SparseCode
    from saekit.sae import Architecture, SparseAutoencoder
    from saekit.selection import DenseSelection, Selection
    from saekit.trainers.calibration import Heldout
    from saekit.trainers.statistics import Statistics
    from saekit.trainers.terms import Term


@dataclass(frozen=True)
class Batch:
    """What an allocation rule may look at; nothing carries gradients.

    Attributes:
        select: the allocation rules on this batch; quicker than on dense pre-activations, and with the same result.
        n_tokens: n.
        statistics: of the features, up to the batch before.
        done: share of the training steps that lie behind.
    """

    select: Selection | DenseSelection
    n_tokens: int
    statistics: Statistics
    done: float

    @property
    def pre(self) -> Float[Tensor, "n F"]:
        """The dense pre-activations, for rules of one's own: made when they are asked for."""
        return self.select.pre

    @property
    def token_norms(self) -> Float[Tensor, "n"] | None:
        """‖x − b_dec‖ [n], or None where affinities are compared as they are (``affinity_scale: none``)."""
        return self.select.token_norms


class RunConfig(Protocol):
    """What a variant may ask of its run: every setting by its flat name, and ``steps`` (``TrainConfig``)."""

    def __getattr__(self, key: str) -> Any: ...


class KSettings(Settings):
    """Of variants that are told how many features are active."""

    k: int = setting(32, gt=0, lt=MANY, within_width=True, description="mean number of active features a token")


class BatchSettings(KSettings):
    """Of variants that compare pairs of different tokens."""

    affinity_scale: Literal["none", "token_norm"] = setting(
        "token_norm", description="what batch rules compare: pre-activations, or those over the token's norm"
    )


class Variant:
    """Base of all variants; one must name its ``architecture`` and define ``allocate``.

    Attributes:
        Config: its settings, which become keys of ``config.yaml`` and flags of ``saekit train``; k alone, if not said.
        architecture: the inference rule of the saved dictionary: ``topk``, ``jumprelu`` (thresholds, which
            ``calibrate`` sets) or ``standard``.
        compares_tokens: whether the rule compares pairs of different tokens, so that ``affinity_scale`` matters.
    """

    Config: type[Settings] = KSettings
    architecture: Architecture = "topk"
    compares_tokens = False

    def __init__(self, config: RunConfig, d_sae: int) -> None:
        """Take from the config what the rule needs.

        Raises:
            SaekitError: the rule cannot be followed with these settings.
        """
        self.config, self.d_sae = config, d_sae

    @property
    def k(self) -> int:
        """Mean number of active features a token, for variants that are told it."""
        return int(self.config.k)

    @classmethod
    def needs_gradients(cls, config: RunConfig) -> bool:
        """Whether batches must come with gradients of the model's loss, with these settings."""
        return False

    def begin(self, sae: SparseAutoencoder) -> None:
        """See the dictionary once before the first step, or the first after a resumption: learned things are made here.

        Its weights may still change; width, device and dtype do not.
        """

    def parameters(self) -> dict[str, Tensor]:
        """What is learned beside the dictionary, by name: Adam, the clipped norm and checkpoints take it in."""
        return {}

    def allocate(self, batch: Batch) -> SparseCode:
        """The training code of a batch."""
        raise NotImplementedError

    def terms(self) -> Iterable[Term]:
        """The losses that it is trained by, asked for once; the auxiliary loss of the run comes on top."""
        from saekit.trainers.terms import Reconstruction

        return [Reconstruction()]

    def calibrate(self, sae: SparseAutoencoder, heldout: Heldout) -> None:
        """Set what the inference rule needs, from activations that were not trained on."""

    def running_rule(self, statistics: Statistics) -> dict[str, Tensor]:
        """What a checkpoint is read with as a dictionary, by what training knows so far, in the run's units.

        Of ``threshold``, ``gain`` and ``shift``, each [F], what there is: W_enc and b_enc are multiplied by the gain,
        and the shift joins b_enc. For ``jumprelu`` by default one threshold, at which training has matched of late.
        """
        if self.architecture != "jumprelu":
            return {}
        return {"threshold": statistics.threshold.nan_to_num(0.0).expand(self.d_sae)}

    def facts(self) -> dict[str, Any]:
        """What the saved dictionary should tell about its training, as JSON."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What the rule has found out so far, ``parameters`` apart, for a checkpoint: tensors, numbers and None."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
