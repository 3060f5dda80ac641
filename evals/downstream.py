"""What splicing the reconstruction into the model costs it in next-token prediction."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.activations import ContextBatch
from saekit.activations.attention import quick_attention, try_quick_attention
from saekit.activations.model import check_hook
from saekit.activations.tokens import PADDING
from saekit.activations.unembedding import Unembedding
from saekit.errors import SaekitError
from saekit.evals.evaluation import Context, Evaluation, Figure
from saekit.evals.intervals import DocumentSums

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Edit = Callable[[Float[Tensor, "m d"]], Float[Tensor, "m d"]]
MASK = "spliced at text positions, scored on the next tokens predicted there; the first, BOS and separators left out"


def edited_logits(
    model: TransformerBridge, hook: str, batch: ContextBatch, edit: Edit | None
) -> Float[Tensor, "b t v"]:
    """Logits of the model with ``edit`` applied to the activations at the kept positions of a hook point."""
    return edited(Unembedding(model, whole=True), hook, batch, edit).float()


def edited(end: Unembedding, hook: str, batch: ContextBatch, edit: Edit | None) -> Float[Tensor, "b t w"]:
    """The same, up to the rows that the model's unembedding takes."""
    device = next(end.model.parameters()).device
    kept = batch.kept.to(device)

    def replace(activation: Tensor, hook: Any) -> Tensor:
        assert edit is not None
        changed = activation.clone()
        changed[kept] = edit(activation[kept].flatten(1)).to(activation.dtype).reshape(activation[kept].shape)
        return changed

    try_quick_attention(end.model)
    with torch.no_grad(), quick_attention(end.model, hook):
        return end.before(batch.tokens.to(device), [] if edit is None else [(hook, replace)])


def scored_positions(batch: ContextBatch) -> Bool[Tensor, "b t-1"]:
    """Positions whose next token counts: kept ones that are not the last; the target may be a true end of text.

    Padding is no target.
    """
    return batch.kept[:, :-1] & (batch.documents[:, 1:] != PADDING)


def scored(batch: ContextBatch, device: torch.device) -> tuple[Int[Tensor, "m"], Int[Tensor, "m"], Int[Tensor, "m"]]:
    """Of the scored positions: their places in the flattened batch, the tokens that follow there, their documents."""
    places = torch.nn.functional.pad(scored_positions(batch), (0, 1)).flatten().nonzero()[:, 0]
    targets, documents = batch.tokens.flatten()[places + 1], batch.documents.flatten()[places]
    return places.to(device), targets.to(device), documents


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
    check_hook(model, hook)
    end = Unembedding.of(model, hook)
    names = ["tokens", *(f"ce_{name}" for name in edits), *(f"kl_{name}" for name in divergence)]
    found = Costs(names, DocumentSums(len(names)))
    for batch in contexts:
        for part in batch.split(end.at_once(batch.tokens.shape[1])):
            places, targets, documents = scored(part, next(model.parameters()).device)
            if not len(places):
                continue
            nats = {"tokens": torch.ones(len(places))}
            clean: Tensor | None = None
            for name in sorted(edits, key=lambda name: (name != "clean", name not in divergence)):
                rows = edited(end, hook, part, edits[name])
                nats[f"ce_{name}"] = end.nats(rows, places, targets).cpu()
                if name in divergence:
                    assert clean is not None
                    nats[f"kl_{name}"] = end.divergence(clean, rows, places).cpu()
                clean = rows if name == "clean" else clean if name in divergence else None
            found.sums.add(torch.stack([nats[name] for name in names], dim=1), documents)
    if not found.tokens:
        raise SaekitError("there is no held-out text to score")
    return found


def costs_of_reconstruction(context: Context) -> Costs:
    """``costs`` of the ``replacements``, with the divergence of the reconstruction; counted once for all that ask."""
    sae = context.sae

    def reconstruct(x: Tensor) -> Tensor:
        with torch.no_grad():
            x_hat: Tensor = sae(x.to(sae.W_dec.device))
        return x_hat.to(x.device)

    if "costs" not in context.shared:
        edits = replacements(reconstruct, context.accumulators["reconstruction"].mean())
        context.shared["costs"] = costs(context.model, context.hook, context.contexts(), edits, ["reconstructed"])
    found: Costs = context.shared["costs"]
    return found


def replacements(reconstruct: Edit, mean: Float[Tensor, "d"]) -> dict[str, Edit | None]:
    """What ``downstream`` compares: x as it is, x̂, 0 and the mean activation [d] in its place."""
    return {
        "clean": None,
        "reconstructed": reconstruct,
        "zero": torch.zeros_like,
        "mean": lambda x: mean.to(x).expand_as(x),
    }


def downstream(found: Costs) -> dict[str, Any]:
    """What the reconstruction costs the model, beside ablations.

    Args:
        found: the costs of ``replacements``, with the divergence of ``reconstructed``.

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
    passes = 1
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

    def run(self, context: Context) -> dict[str, Any]:
        """Splice and score."""
        return downstream(costs_of_reconstruction(context))
