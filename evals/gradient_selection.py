"""What gradient selection would give at evaluation time, for dictionaries that gradient TopK trained.

The headline of such a dictionary is plain TopK, since gradients of the loss depend on the next token. Beside it stand
selection by gradients of labels that the model itself samples, and of the true labels, which leaks them (our reading of
arXiv 2411.10397). Sampled labels leak less, not nothing: the loss is that of the whole context, whose later tokens are
still inputs of later predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.activations import ContextBatch
from saekit.activations.gradients import Labels, with_gradients
from saekit.allocation import gradient_choice, influence_of
from saekit.errors import SaekitError
from saekit.evals.downstream import Edit, edited_logits, scored_predictions
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
    ce_clean: float,
) -> dict[str, float]:
    """FVU and next-token cross-entropy with features selected by gradients of sampled and of true labels.

    Args:
        sae: a ``topk`` dictionary.
        model: the hooked model.
        hook: the hook point.
        contexts: makes the held-out text, once for each kind of labels.
        beta: weight of the gradient in the selection.
        ce_clean: nats a token of the model as it is, on the same text.

    Returns:
        beta; and with the suffixes ``_sampled`` and ``_true_labels_leaking``: fvu, ce_reconstructed, ce_increase.

    Raises:
        SaekitError: the dictionary is not ``topk``, the model is not causal, or there is no text.
    """
    if sae.cfg.k is None:
        raise SaekitError(f"gradient selection is for topk dictionaries, not for {sae.cfg.architecture}")
    figures = {"beta": beta}
    device = next(model.parameters()).device
    for labels, suffix in SUFFIX.items():
        reconstruction, nats, tokens = Reconstruction(sae.cfg.d_in), 0.0, 0
        run = with_gradients(model, hook, labels)
        for batch in contexts():
            kept = batch.kept.to(device)
            x, gradient = (part[kept].to(sae.W_dec) for part in run(batch.tokens.to(device)))
            with torch.no_grad():
                influence = influence_of(gradient, sae.W_dec)
                x_hat = sae.decode(gradient_choice(sae.pre_activations(x), influence, sae.cfg.k, beta))
            reconstruction.update(x, x_hat)
            log_p, targets = scored_predictions(edited_logits(model, hook, batch, _put(x_hat)), batch)
            nats -= float(log_p.gather(1, targets[:, None]).cpu().double().sum())
            tokens += len(targets)
        if not tokens:
            raise SaekitError("there is no held-out text to score")
        figures[f"fvu_{suffix}"] = float(reconstruction.result()["fvu"])
        figures[f"ce_reconstructed_{suffix}"] = nats / tokens
        figures[f"ce_increase_{suffix}"] = nats / tokens - ce_clean
    return figures


def _put(x_hat: Float[Tensor, "m d"]) -> Edit:
    return lambda x: x_hat
