"""The standard evaluation: sparsity, reconstruction and downstream cost, on held-out text, by the inference rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.activations import ActivationBatch, ContextBatch, harvest
from saekit.activations.gradients import not_causal
from saekit.activations.padding import as_contexts
from saekit.activations.tokens import PADDING, without_first
from saekit.errors import SaekitError
from saekit.evals.downstream import costs, downstream, replacements
from saekit.evals.gradient_selection import gradient_selection
from saekit.evals.outliers import warn_of_outliers
from saekit.evals.reconstruction import Reconstruction
from saekit.evals.report import Report
from saekit.evals.sparsity import Sparsity
from saekit.processing import warn_of_processing
from saekit.sae import SparseAutoencoder

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def evaluate(
    sae: SparseAutoencoder,
    model: TransformerBridge,
    tokens: Int[Tensor, "c t"] | ContextBatch,
    *,
    hook: str | None = None,
    kept: Bool[Tensor, "c t"] | None = None,
    skip_first: int | None = None,
    attention_mask: Bool[Tensor, "c t"] | None = None,
    batch: int = 16,
    on_batch: Callable[[int], object] | None = None,
) -> Report:
    """Judge a dictionary on held-out contexts.

    Args:
        sae: the dictionary.
        model: the hooked model (``saekit.activations.load_model``).
        tokens: [c, t] contexts of token ids, or a ``ContextBatch`` that knows its text positions.
        hook: hook point; what the dictionary's metadata names if not given.
        kept: [c, t] positions that hold text, where ``tokens`` is a plain tensor; everything if not given. The first of
            each context is left out in any case.
        skip_first: positions at the start of each context that are never scored, at least 1; if not given, what the
            dictionary was trained with, or 1.
        attention_mask: [c, t] which of plain token ids are no padding (``contexts_of``).
        batch: contexts in one forward pass.
        on_batch: called with the number of contexts done, for a progress bar; each counts ``passes(sae, model)`` times.

    Returns:
        A report with the groups ``sparsity``, ``reconstruction`` and ``downstream``, and ``gradient_selection`` for a
        dictionary that gradient TopK trained. A model that is not causal has the first two alone, and ``about`` says
        why under ``no_downstream``.

    Raises:
        SaekitError: no hook is known, the dictionary does not fit the model, or there is no text.
    """
    hook = hook or sae.cfg.metadata.get("hook_name")
    if not hook:
        raise SaekitError("the dictionary does not name its hook point; give one")
    warn_of_processing(sae, model, hook)
    contexts = as_contexts(model, tokens, kept=kept, attention_mask=attention_mask)
    skip_first = skipped_first(sae) if skip_first is None else skip_first
    contexts = contexts._replace(kept=without_first(contexts.kept, skip_first))
    if not contexts.kept.any():
        raise SaekitError("there is no held-out text to evaluate on")
    if _beta(sae) is not None and bool((contexts.documents == PADDING).any()):
        raise SaekitError(
            "this dictionary selects by gradients of a whole context's loss; give contexts without padding"
        )

    def parts() -> Iterator[ContextBatch]:
        for part in contexts.split(batch):
            yield part
            if on_batch is not None:
                on_batch(len(part.tokens))

    sparsity, reconstruction = _explained(sae, harvest(model, hook, parts()), hook)
    groups = {"sparsity": sparsity.result(), "reconstruction": reconstruction.result()}
    about = {"hook": hook, "contexts": len(contexts.tokens), "context_length": contexts.tokens.shape[1]}
    if why := not_causal(model):
        return Report(groups, {**about, "no_downstream": f"no next-token figures: {why}"})
    cost = costs(model, hook, parts(), replacements(_reconstruct(sae), reconstruction.mean()), ["reconstructed"])
    groups["downstream"] = downstream(cost)
    if (beta := _beta(sae)) is not None:
        groups["gradient_selection"] = gradient_selection(sae, model, hook, parts, beta, cost)
    return Report(groups, about)


def skipped_first(sae: SparseAutoencoder) -> int:
    """The positions at the start of each context that this dictionary was not trained on, at least 1."""
    provenance = (sae.cfg.metadata.get("saekit") or {}).get("provenance") or {}
    return max(1, provenance.get("skip_first") or 1)


def passes(sae: SparseAutoencoder, model: TransformerBridge) -> int:
    """How often ``evaluate`` goes through the contexts."""
    if not_causal(model):
        return 1
    return 2 if _beta(sae) is None else 4


def _beta(sae: SparseAutoencoder) -> float | None:
    """The weight of the gradient in the training of this dictionary, if it had one."""
    beta = (sae.cfg.metadata.get("saekit") or {}).get("beta")
    return float(beta) if beta is not None and sae.cfg.k is not None else None


def evaluate_activations(
    sae: SparseAutoencoder, batches: Iterable[ActivationBatch | Float[Tensor, "m d_in"]]
) -> Report:
    """Judge a dictionary on activations alone: the groups ``sparsity`` and ``reconstruction``.

    Args:
        sae: the dictionary.
        batches: activations with the numbers of their documents, or activations alone: then each row is taken for a
            document of its own, and the standard errors are too small where neighbouring rows are alike.

    Raises:
        SaekitError: there are none, or they have another width than the dictionary.
    """
    sparsity, reconstruction = _explained(sae, batches, "these activations")
    return Report({"sparsity": sparsity.result(), "reconstruction": reconstruction.result()})


@torch.no_grad()
def _explained(
    sae: SparseAutoencoder, batches: Iterable[ActivationBatch | Float[Tensor, "m d_in"]], origin: str
) -> tuple[Sparsity, Reconstruction]:
    sparsity, reconstruction = Sparsity(sae.cfg.d_sae), Reconstruction(sae.cfg.d_in)
    for batch in batches:
        x, documents = (batch.x, batch.documents) if isinstance(batch, ActivationBatch) else (batch, None)
        if not isinstance(x, Tensor) or x.ndim != 2:
            kind = f"of shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise SaekitError(f"activations come in batches, each a tensor [m, d_in], not {kind}")
        if not len(x):
            continue
        if x.shape[1] != sae.cfg.d_in:
            raise SaekitError(
                f"the dictionary does not fit: it takes width {sae.cfg.d_in}, but '{origin}' has width {x.shape[1]}"
            )
        code = sae.encode_sparse(x.to(sae.W_dec.device))
        sparsity.update(code, documents)
        reconstruction.update(x, sae.decode(code), documents)
    if not sparsity.tokens:
        raise SaekitError("there are no activations to evaluate on")
    warn_of_outliers(reconstruction.result())
    return sparsity, reconstruction


def _reconstruct(sae: SparseAutoencoder) -> Callable[[Tensor], Tensor]:
    def reconstruct(x: Tensor) -> Tensor:
        with torch.no_grad():
            x_hat: Tensor = sae(x.to(sae.W_dec.device))
        return x_hat.to(x.device)

    return reconstruct
