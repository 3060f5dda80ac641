"""What gradient selection would give at evaluation time, for dictionaries that gradient TopK trained.

The headline of such a dictionary is plain TopK, since gradients of the loss depend on the next token. Beside it stand
selection by gradients of labels that the model itself samples, and of the true labels, which leaks them (our reading of
arXiv 2411.10397). Sampled labels leak less, not nothing: the loss is that of the whole context, whose later tokens are
still inputs of later predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.activations import ContextBatch
from saekit.activations.gradients import Labels, with_gradients
from saekit.activations.tokens import PADDING
from saekit.allocation import gradient_choice, influence_of
from saekit.errors import SaekitError
from saekit.evals.costs import Costs, costs
from saekit.evals.evaluation import Context, Evaluation, Figure
from saekit.evals.passage import Edit
from saekit.evals.reconstruction import Reconstruction
from saekit.sae import SparseAutoencoder

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

SUFFIX: dict[Labels, str] = {"sampled": "sampled", "true": "true_labels_leaking"}


def gradient_selection(
    sae: SparseAutoencoder,
    model: TransformerBridge,
    hook: str,
    contexts: Callable[[], Iterable[ContextBatch]],
    beta: float,
    clean: Costs,
) -> dict[str, float | None]:
    """FVU and next-token cross-entropy with features selected by gradients of sampled and of true labels.

    Args:
        sae: a ``topk`` dictionary.
        model: the hooked model.
        hook: the hook point.
        contexts: makes the held-out text, once for each kind of labels.
        beta: weight of the gradient in the selection.
        clean: costs of the model as it is, among others, on the same text.

    Returns:
        beta; and with the suffixes ``_sampled`` and ``_true_labels_leaking``: fvu, ce_reconstructed, ce_increase, each
        with its standard error over documents under a further ``_se``.

    Raises:
        SaekitError: the dictionary is not ``topk``, the model is not causal, or there is no text.
    """
    if sae.cfg.k is None:
        raise SaekitError(f"gradient selection is for topk dictionaries, not for {sae.cfg.architecture}")
    found: dict[str, float | None] = {"beta": beta}
    for labels, suffix in SUFFIX.items():
        selection = _Selection(sae, Reconstruction(sae.cfg.d_in), with_gradients(model, hook, labels), beta)
        edits: dict[str, Edit | None] = {"reconstructed": selection.put}
        spliced = costs(model, hook, map(selection.make, contexts()), edits)

        def figures(sums: Tensor, spliced: Costs = spliced) -> dict[str, Tensor]:
            nats = spliced.means(sums)["ce_reconstructed"]
            before = clean.means(sums[..., len(spliced.names) :])["ce_clean"]
            return {"ce_reconstructed": nats, "ce_increase": nats - before}

        result = spliced.sums.beside(clean.sums).figures(figures) | selection.reconstruction.result()
        for name in ("fvu", "ce_reconstructed", "ce_increase"):
            found |= {f"{name}_{suffix}": result[name], f"{name}_{suffix}_se": result[f"{name}_se"]}
    return found


@dataclass
class _Selection:
    """Reconstructions of one batch after the other, with features selected by gradients in the whole of it."""

    sae: SparseAutoencoder
    reconstruction: Reconstruction
    run: Callable[[Int[Tensor, "b t"]], tuple[Float[Tensor, "b t d"], Float[Tensor, "b t d"]]]
    beta: float
    left: Tensor = field(default_factory=lambda: torch.empty(0), init=False)

    def make(self, batch: ContextBatch) -> ContextBatch:
        """Reconstruct the batch, for ``put``."""
        sae, k = self.sae, self.sae.cfg.k
        assert k is not None
        x, gradient = (part[batch.kept.to(part.device)].to(sae.W_dec) for part in self.run(batch.tokens))
        with torch.no_grad():
            influence = influence_of(gradient, sae.W_dec)
            self.left = sae.decode(gradient_choice(sae.pre_activations(x), influence, k, self.beta))
        self.reconstruction.update(x, self.left, batch.documents[batch.kept])
        return batch

    def put(self, x: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
        """The reconstructions of the next m tokens."""
        x_hat, self.left = self.left[: len(x)], self.left[len(x) :]
        return x_hat


def trained_beta(sae: SparseAutoencoder) -> float | None:
    """The weight of the gradient in the training of this dictionary, if it had one."""
    beta = (sae.cfg.metadata.get("saekit") or {}).get("beta")
    return float(beta) if beta is not None and sae.cfg.k is not None else None


class GradientSelectionEvaluation(Evaluation):
    """What would selection by gradients give?"""

    name = "gradient_selection"
    title = "Selection by gradients"
    on_card = False
    passes = 2
    figures = (
        Figure("ce_reconstructed_sampled", "CE sampled", "{:.3f}", "x̂ selected by gradients of sampled labels"),
        Figure("ce_reconstructed_true_labels_leaking", "CE leaking", "{:.3f}", "of true labels: leaks them"),
    )

    def applies(self, sae: SparseAutoencoder) -> bool:
        """To dictionaries that gradient TopK trained."""
        return trained_beta(sae) is not None

    def check(self, sae: SparseAutoencoder, contexts: ContextBatch) -> None:
        """Contexts must have no padding."""
        if bool((contexts.documents == PADDING).any()):
            raise SaekitError(
                "this dictionary selects by gradients of a whole context's loss; give contexts without padding"
            )

    def run(self, context: Context) -> dict[str, Any]:
        """With the β of the training."""
        beta = trained_beta(context.sae)
        assert beta is not None
        clean = context.reference.costs()
        return dict(gradient_selection(context.sae, context.model, context.hook, context.contexts, beta, clean))
