"""What next-token predictions cost with something else in the place of the activations at a hook point."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.activations import ContextBatch
from saekit.errors import SaekitError
from saekit.evals.intervals import DocumentSums
from saekit.evals.passage import Edit, Passage, passages

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class Costs(NamedTuple):
    """What predictions cost under several edits.

    Attributes:
        names: of the columns of ``sums``: ``tokens``, ``ce_NAME`` of each edit and ``kl_NAME`` of some.
        sums: nats by document, and how many predictions they are of.
    """

    names: list[str]
    sums: DocumentSums

    @property
    def tokens(self) -> int:
        """Predictions scored."""
        return int(self.sums.total()[0])

    def means(self, sums: Float[Tensor, "... c"]) -> dict[str, Float[Tensor, "..."]]:
        """Nats a token of each name, from sums over documents."""
        return {name: sums[..., i] / sums[..., 0] for i, name in enumerate(self.names) if i}

    @property
    def ce(self) -> dict[str, float]:
        """Cross-entropy under each edit, nats a token."""
        return {name[3:]: float(value) for name, value in self.means(self.sums.total()).items() if name[:3] == "ce_"}


def costs(
    model: TransformerBridge,
    hook: str,
    contexts: Iterable[ContextBatch],
    edits: Mapping[str, Edit | None],
    divergence: Sequence[str] = (),
) -> Costs:
    """Cross-entropy of next tokens under several edits of the activations at the kept positions.

    Memory does not grow with the contexts in a batch once their logits are large (``saekit.activations.unembedding``).

    Args:
        model: the hooked model.
        hook: the hook point.
        contexts: held-out text.
        edits: what is put in place of x; None, under the name ``clean`` and first, leaves the model as it is.
        divergence: of which edits to take KL(clean ‖ edited) too.

    Raises:
        SaekitError: the model has no such hook, or there is no text to score.
    """
    return costs_of(passages(model, hook, contexts), edits, divergence)


def costs_of(contexts: Iterable[Passage], edits: Mapping[str, Edit | None], divergence: Sequence[str] = ()) -> Costs:
    """The same, of contexts in a model.

    Raises:
        SaekitError: there is no text to score.
    """
    names = ["tokens", *(f"ce_{name}" for name in edits), *(f"kl_{name}" for name in divergence)]
    found = Costs(names, DocumentSums(len(names)))
    for passage in contexts:
        documents = passage.scored().documents
        if not len(documents):
            continue
        nats = {"tokens": torch.ones(len(documents))}
        for name, edit in edits.items():
            if name in divergence:
                each = passage.compared(passage.edited(edit))
                nats |= {f"ce_{name}": each[0].cpu(), f"kl_{name}": each[1].cpu()}
            else:
                nats[f"ce_{name}"] = passage.nats(edit).cpu()
        found.sums.add(torch.stack([nats[name] for name in names], dim=1), documents)
    if not found.tokens:
        raise SaekitError("there is no held-out text to score")
    return found
