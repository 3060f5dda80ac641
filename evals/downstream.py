"""What splicing the reconstruction into the model costs it in next-token prediction."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.activations import ContextBatch
from saekit.activations.attention import try_quick_attention
from saekit.activations.model import check_hook
from saekit.activations.unembedding import Unembedding
from saekit.evals.costs import Costs
from saekit.evals.evaluation import Context, Evaluation, Figure, Seen
from saekit.evals.intervals import DocumentSums
from saekit.evals.passage import Edit, Passage
from saekit.sae import SparseAutoencoder
from saekit.settings import Settings

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

MASK = "spliced at text positions, scored on the next tokens predicted there; the first, BOS and separators left out"


def edited_logits(
    model: TransformerBridge, hook: str, batch: ContextBatch, edit: Edit | None
) -> Float[Tensor, "b t v"]:
    """Logits of the model with ``edit`` applied to the activations at the kept positions of a hook point."""
    check_hook(model, hook)
    try_quick_attention(model)
    return Passage(Unembedding(model, whole=True), hook, [], batch).edited(edit).float()


class Spliced:
    """What predictions cost with x̂ in the place of x, batch by batch."""

    columns = ("ce_reconstructed", "kl_reconstructed")

    def __init__(self) -> None:
        self.sums = DocumentSums(len(self.columns))

    def see(self, seen: Seen) -> None:
        """Count one batch; without a causal model there is nothing to count."""
        passage = seen.passage
        if passage is None or not passage.causal:
            return
        documents = passage.scored().documents
        if len(documents):
            found = passage.compared(passage.spliced(seen.x_hat))
            self.sums.add(torch.stack([each.cpu() for each in found], dim=1), documents)

    def result(self) -> dict[str, Any]:
        """Nothing: the figures compare with ablations, which ``DownstreamEvaluation.run`` knows."""
        return {}


def downstream(found: Costs) -> dict[str, Any]:
    """What the reconstruction costs the model, beside ablations.

    Args:
        found: costs named ``clean``, ``reconstructed``, ``zero`` and ``mean``, with the divergence of the second.

    Returns:
        The figures; all but the first three have their standard error over documents beside them, as NAME_se.
        tokens, documents: predictions scored, and documents they are of; mask: which those are.
        ce_clean, ce_reconstructed, ce_zero, ce_mean: nats a token, with x, x̂, 0 and the mean activation.
        ce_increase: ce_reconstructed − ce_clean.
        recovered_share: (ce_zero − ce_reconstructed) / (ce_zero − ce_clean).
        recovered_share_mean: the same against mean ablation, the stricter baseline.
        kl: mean KL(clean ‖ spliced) in nats a token.
    """

    def figures(sums: Tensor) -> dict[str, Tensor]:
        nats = found.means(sums)
        kl, clean = nats.pop("kl_reconstructed"), nats["ce_clean"]
        increase = nats["ce_reconstructed"] - clean
        return {
            **nats,
            "ce_increase": increase,
            "recovered_share": _recovered(increase, nats["ce_zero"] - clean),
            "recovered_share_mean": _recovered(increase, nats["ce_mean"] - clean),
            "kl": kl,
        }

    about = {"tokens": found.tokens, "documents": found.sums.documents, "mask": MASK}
    return {**about, **found.sums.figures(figures)}


def _recovered(increase: Tensor, damage: Tensor) -> Tensor:
    """1 − increase / damage; NaN where ablation does the model no damage."""
    return 1 - increase / damage.where(damage != 0, math.nan)


class DownstreamEvaluation(Evaluation):
    """What does the reconstruction cost the model's predictions?"""

    name = "downstream"
    title = "Downstream"
    figures = (
        Figure("ce_clean", "CE", "{:.3f}", "nats a token of the model as it is"),
        Figure("ce_reconstructed", "CE with x̂", "{:.3f}", "with the reconstruction spliced in"),
        Figure("ce_zero", "CE with 0", "{:.3f}", "with zeros in place of the activations"),
        Figure("recovered_share", "recovered", "{:.4f}", "share of what zeros would cost that x̂ saves", headline=3),
        Figure("kl", "KL", "{:.4f}", "nats a token from the model's own predictions"),
        Figure("ce_mean", "CE with x̄", "{:.3f}", "with the mean activation in place of each", detail=True),
        Figure(
            "recovered_share_mean",
            "recovered, x̄",
            "{:.4f}",
            "the share kept where x̄, not 0, is the baseline",
            detail=True,
        ),
    )

    def begin(self, sae: SparseAutoencoder, settings: Settings) -> Spliced:
        """Sums over predictions."""
        return Spliced()

    def run(self, context: Context) -> dict[str, Any]:
        """Beside the model as it is and its ablations."""
        own, model = context.accumulators[self.name], context.reference.costs()
        return downstream(Costs([*model.names, *own.columns], model.sums.beside(own.sums)))
