"""What an evaluation is: one file that asks one question of a dictionary, and says what its figures mean.

Nothing here imports torch, so that the command line helps without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from saekit.settings import Settings

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor
    from transformer_lens.model_bridge import TransformerBridge

    from saekit.activations import ContextBatch
    from saekit.code import SparseCode
    from saekit.evals.passage import Passage
    from saekit.evals.reference import Reference
    from saekit.sae import SparseAutoencoder


@dataclass(frozen=True)
class Figure:
    """One figure of an evaluation, as people read it.

    Attributes:
        key: where it stands in the group that the evaluation gives; dots lead into mappings. A standard error stands
            beside it as ``KEY_se``.
        title: in a few letters, the head of a column.
        shape: its format, as ``{:.4f}``.
        meaning: with its unit, in a few words.
        headline: its place among the figures at the top of the report, from 1; 0 for none.
        detail: whether the report alone shows it, and no table.
        last: whether it closes the table.
        where: a key of the group that must hold something for this figure to mean anything.
    """

    key: str
    title: str
    shape: str
    meaning: str
    headline: int = 0
    detail: bool = False
    last: bool = False
    where: str = ""


class Seen(NamedTuple):
    """One batch of activations, encoded and decoded: n tokens.

    Attributes:
        x, code, x_hat: them.
        documents: the numbers of their documents, if those are known.
        passage: the contexts that they come from, in the model; None where activations alone are at hand. Its
            ``spliced(x_hat)`` is the model with x̂ in the place of x, computed once for all evaluations.
    """

    x: Float[Tensor, "n d"]
    code: SparseCode
    x_hat: Float[Tensor, "n d"]
    documents: Int[Tensor, "n"] | None
    passage: Passage | None = None


class Accumulator(Protocol):
    """Counts batch by batch."""

    def see(self, seen: Seen) -> None:
        """Count one batch."""

    def result(self) -> dict[str, Any]:
        """The figures of all batches, as JSON; none at all where ``run`` gives them."""


@dataclass(frozen=True, eq=False)
class Context:
    """What an evaluation that needs the model works on.

    Attributes:
        sae, model, hook: the dictionary, the model and where it is spliced.
        contexts: makes the held-out contexts, the same ones each time; each call is a pass.
        settings: the evaluation's own.
        accumulators: of the evaluations of the pass over the activations, by name.
        reference: what the model makes of the contexts without a dictionary, with the cost of ablations.
    """

    sae: SparseAutoencoder
    model: TransformerBridge
    hook: str
    contexts: Callable[[], Iterator[ContextBatch]]
    settings: Settings
    accumulators: dict[str, Any]
    reference: Reference


class Evaluation:
    """Base of all evaluations; one names its figures and defines ``begin`` or ``run``.

    Attributes:
        name: of its group in ``eval.json``.
        title: of its section in the report.
        figures: what is shown of the group.
        Config: its settings, which become flags of ``saekit eval``.
        suite: ``standard``, or what ``--suite`` calls it.
        on_card: whether its figures stand on a model card.
        passes: over the contexts, beside the one over the activations that all share.
    """

    name: str
    title: str
    figures: tuple[Figure, ...] = ()
    Config: type[Settings] = Settings
    suite = "standard"
    on_card = True
    passes = 0

    def applies(self, sae: SparseAutoencoder) -> bool:
        """Whether the question makes sense for this dictionary."""
        return True

    def check(self, sae: SparseAutoencoder, contexts: ContextBatch) -> None:
        """Raise SaekitError where it cannot be asked on these contexts, before anything is counted."""

    def begin(self, sae: SparseAutoencoder, settings: Settings) -> Accumulator | None:
        """What counts over the activations, for a question that needs no model."""
        return None

    def run(self, context: Context) -> dict[str, Any] | None:
        """The figures, as JSON, of a question that needs a causal model."""
        return None
