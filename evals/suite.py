"""The standard suite: every evaluation of the registry that applies, on held-out text, by the inference rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.activations import ActivationBatch, ContextBatch
from saekit.activations.padding import as_contexts
from saekit.activations.tokens import without_first
from saekit.errors import SaekitError
from saekit.evals.evaluation import Accumulator, Context, Seen
from saekit.evals.outliers import warn_of_outliers
from saekit.evals.passage import Passage
from saekit.evals.reference import Reference
from saekit.evals.registry import evaluations, routed
from saekit.evals.report import Report
from saekit.processing import warn_of_processing
from saekit.sae import SparseAutoencoder
from saekit.settings import Settings

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_WITH_DOCUMENTS = (Passage, ActivationBatch)


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
    settings: Mapping[str, Any] | None = None,
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
        settings: of the evaluations, by their flat names.
        on_batch: called with the number of contexts done, for a progress bar; each counts ``passes`` times.

    Returns:
        A report with a group for each evaluation of the registry that applies: ``sparsity``, ``reconstruction``,
        ``downstream``, for a dictionary that gradient TopK trained ``gradient_selection``, and those of other packages.
        A model that is not causal has those of activations alone, and ``about`` says why under ``no_downstream``.

    Raises:
        SaekitError: no hook is known, the dictionary does not fit the model, or there is no text.
    """
    hook = hook or sae.cfg.metadata.get("hook_name")
    if not hook:
        raise SaekitError("the dictionary does not name its hook point; give one")
    warn_of_processing(sae, model, hook)
    contexts = as_contexts(model, tokens, kept=kept, attention_mask=attention_mask)
    contexts = scored_contexts(contexts, skipped_first(sae) if skip_first is None else skip_first)
    return judge(sae, Reference(model, hook, contexts, batch=batch), on_batch=on_batch, settings=settings)


def judge(
    sae: SparseAutoencoder,
    reference: Reference,
    *,
    on_batch: Callable[[int], object] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Report:
    """``evaluate`` on contexts of which the model's own part is found once for all dictionaries of a hook point.

    Raises:
        SaekitError: the dictionary does not fit the model, or there is no text.
    """
    contexts = reference.contexts
    if not contexts.kept.any():
        raise SaekitError("there is no held-out text to evaluate on")
    asked = [(name, each) for name, each in evaluations("standard") if each.applies(sae)]
    for _, evaluation in asked:
        evaluation.check(sae, contexts)
    own = routed(settings or {})

    def told(batches: Iterable[Passage]) -> Iterator[Passage]:
        for passage in batches:
            yield passage
            if on_batch is not None:
                on_batch(len(passage.contexts.tokens))

    def parts() -> Iterator[ContextBatch]:
        for part in contexts.split(reference.batch):
            yield part
            if on_batch is not None:
                on_batch(len(part.tokens))

    accumulators = _seen(sae, told(reference), reference.hook, own)
    groups = _results(accumulators)
    about = {"hook": reference.hook, "contexts": len(contexts.tokens), "context_length": contexts.tokens.shape[1]}
    if why := reference.no_downstream:
        return Report(groups, {**about, "no_downstream": f"no next-token figures: {why}"})
    reference.costs(on_batch)
    for name, evaluation in asked:
        context = Context(sae, reference.model, reference.hook, parts, own[name], accumulators, reference)
        found = evaluation.run(context)
        if found is not None:
            groups[name] = {**groups.get(name, {}), **found}
    return Report(groups, about)


def scored_contexts(contexts: ContextBatch, skip_first: int) -> ContextBatch:
    """The contexts without so many positions at the start of each."""
    return contexts._replace(kept=without_first(contexts.kept, skip_first))


def skipped_first(sae: SparseAutoencoder) -> int:
    """The positions at the start of each context that this dictionary was not trained on, at least 1."""
    provenance = (sae.cfg.metadata.get("saekit") or {}).get("provenance") or {}
    return max(1, provenance.get("skip_first") or 1)


def passes(sae: SparseAutoencoder, reference: Reference) -> int:
    """How often ``judge`` goes through the contexts."""
    if reference.no_downstream:
        return 1
    return 1 + reference.passes + sum(each.passes for _, each in evaluations("standard") if each.applies(sae))


def evaluate_activations(
    sae: SparseAutoencoder,
    batches: Iterable[ActivationBatch | Float[Tensor, "m d_in"]],
    settings: Mapping[str, Any] | None = None,
) -> Report:
    """Judge a dictionary on activations alone: the groups of evaluations that need no model.

    Args:
        sae: the dictionary.
        batches: activations with the numbers of their documents, or activations alone: then each row is taken for a
            document of its own, and the standard errors are too small where neighbouring rows are alike.
        settings: of the evaluations, by their flat names.

    Raises:
        SaekitError: there are none, or they have another width than the dictionary.
    """
    found = _seen(sae, batches, "these activations", routed(settings or {}))
    return Report(_results(found))


def _results(accumulators: Mapping[str, Accumulator]) -> dict[str, dict[str, Any]]:
    """The groups of those that have figures by themselves."""
    return {name: found for name, accumulator in accumulators.items() if (found := accumulator.result())}


@torch.no_grad()
def _seen(
    sae: SparseAutoencoder,
    batches: Iterable[Passage | ActivationBatch | Float[Tensor, "m d_in"]],
    origin: str,
    settings: Mapping[str, Settings],
) -> dict[str, Accumulator]:
    """All that counts over activations, after one pass over them."""
    begun = {name: each.begin(sae, settings[name]) for name, each in evaluations("standard") if each.applies(sae)}
    accumulators = {name: accumulator for name, accumulator in begun.items() if accumulator is not None}
    tokens = 0
    for batch in batches:
        x, documents = (batch.x, batch.documents) if isinstance(batch, _WITH_DOCUMENTS) else (batch, None)
        if not isinstance(x, Tensor) or x.ndim != 2:
            kind = f"of shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise SaekitError(f"activations come in batches, each a tensor [m, d_in], not {kind}")
        if not len(x):
            continue
        if x.shape[1] != sae.cfg.d_in:
            raise SaekitError(
                f"the dictionary does not fit: it takes width {sae.cfg.d_in}, but '{origin}' has width {x.shape[1]}"
            )
        tokens += len(x)
        code = sae.encode_sparse(x.to(sae.W_dec.device))
        seen = Seen(x, code, sae.decode(code), documents, batch if isinstance(batch, Passage) else None)
        for accumulator in accumulators.values():
            accumulator.see(seen)
    if not tokens:
        raise SaekitError("there are no activations to evaluate on")
    if "reconstruction" in accumulators:
        warn_of_outliers(accumulators["reconstruction"].result())
    return accumulators
