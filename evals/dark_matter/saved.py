"""The dark matter suite on saved dictionaries: ``saekit eval --suite dark_matter``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from saekit.activations import ActivationCache, ActivationSource, ContextBatch, Harvest, harvest_hooks
from saekit.activations.batch import ActivationBatch
from saekit.activations.gradients import not_causal
from saekit.activations.model import check_hook, recorded
from saekit.activations.placement import device_of, dtype_of
from saekit.errors import SaekitError
from saekit.evals.dark_matter.error_cost import error_downstream, only_tested, without_start
from saekit.evals.dark_matter.study import SPLIT, ErrorStudy
from saekit.evals.heldout import draw
from saekit.evals.report import Report
from saekit.evals.saved import Evaluator, validated_metadata
from saekit.loading import load
from saekit.processing import applied_to
from saekit.sae import SparseAutoencoder

SKIPPED = 0.2  # of a context at its start, as in the paper
_CONTEXTS = 16


@dataclass(frozen=True)
class DarkMatterEvaluator:
    """Takes the errors of saved dictionaries of one hook point apart, on the same held-out tokens.

    Attributes:
        evaluator: by which model and text, or cache, and how many tokens.
        earlier: dictionaries of other hook points, to predict the errors from.
        pursuit: whether to encode by gradient pursuit too.
        ce_tokens: about so many tokens for the cross-entropies, where there is a model; 0 for none.
        seed: of the splits.
    """

    evaluator: Evaluator
    earlier: Sequence[str | Path] = ()
    pursuit: bool = False
    ce_tokens: int = 65_536
    seed: int = 0

    def __call__(self, paths: Sequence[str | Path]) -> tuple[dict[str, Report], dict[str, Any]]:
        """Load the dictionaries and take their errors apart.

        Returns:
            A report for each path, with the group ``dark_matter``; and what only several show together
            (``ErrorStudy.run``).

        Raises:
            SaekitError: a dictionary, its model or its text is not found, they do not fit each other, the dictionaries
                are of different hook points, or there are too few tokens or documents.
        """
        places = [path if str(path).startswith("hf://") else Path(path).resolve() for path in paths]
        if twice := [path for path, place in zip(paths, places, strict=True) if places.count(place) > 1]:
            raise SaekitError(f"the dictionary '{twice[0]}' is named twice")
        saes = {str(path): load(path, device=self.evaluator.device) for path in paths}
        first, sae = next(iter(saes.items()))
        cache = self.evaluator.cache_of(sae)
        if cache is not None:
            return self._by_cache(saes, cache)
        sources = {path: self._source(each, path) for path, each in saes.items()}
        for path, source in sources.items():
            _check_same(first, sources[first], path, source)
        return self._by_text(saes, sources[first])

    def _source(self, sae: SparseAutoencoder, path: str) -> ActivationSource:
        own = validated_metadata(sae).get("hook_name")
        if own and self.evaluator.source.hook and own != self.evaluator.source.hook:
            raise SaekitError(f"the dictionary '{path}' is of hook '{own}', not of '{self.evaluator.source.hook}'")
        return self.evaluator.source_of(sae, path)

    def _earlier(self, source: ActivationSource) -> dict[str, tuple[str, SparseAutoencoder]]:
        """The dictionaries of earlier parts with their hook points.

        Raises:
            SaekitError: one does not say its hook point, or is of the same one, a later one or another model.
        """
        found: dict[str, tuple[str, SparseAutoencoder]] = {}
        for path in map(str, self.earlier):
            sae = load(path, device=self.evaluator.device)
            hook, model = validated_metadata(sae).get("hook_name"), validated_metadata(sae).get("model_name")
            if not hook:
                raise SaekitError(f"'{path}' does not say which hook point it belongs to")
            if hook == source.hook:
                raise SaekitError(f"'{path}' is of '{hook}' itself, not of an earlier part")
            if model and model != source.name:
                raise SaekitError(f"'{path}' is of the model '{model}', not of '{source.name}'")
            check_hook(source.model, hook)
            found[path] = (hook, sae)
        late = _after(source, {hook for hook, _ in found.values()})
        for path, (hook, _) in found.items():
            if hook in late:
                raise SaekitError(f"'{path}' is of '{hook}', which comes after '{source.hook}': not an earlier part")
        return found

    def _by_text(
        self, saes: dict[str, SparseAutoencoder], source: ActivationSource
    ) -> tuple[dict[str, Report], dict[str, Any]]:
        study = ErrorStudy(saes, source.hook, self._earlier(source), self.pursuit, self.seed)
        why = not_causal(source.model)
        limit = self.evaluator.norm_limit(next(iter(saes.values())), source)
        drawn = draw(source, self.evaluator.tokens, partial(without_start, share=SKIPPED), limit=limit)
        contexts = drawn.contexts
        tell = self._bar(f"errors at {source.hook}", 2 * len(contexts.tokens))

        def batches(hooks: list[str]) -> Iterator[Harvest]:
            return harvest_hooks(source.model, hooks, _parts(contexts, tell), losses=why is None)

        figures, compared = study.run(batches)
        if self.ce_tokens and why is None:
            few = _first(only_tested(contexts, self.seed), self.ce_tokens)
            tell = self._bar("their costs", len(few.tokens) * len(saes))
            for path, sae in saes.items():
                b = study.analyses[path].b[SPLIT]
                cost = error_downstream(source.model, source.hook, _parts(few, tell), sae, b)
                figures[path]["cost"] = cost
        mask = f"text positions but the first {SKIPPED:.0%} and the last"
        about = {**source.provenance("heldout"), **drawn.about(), "mask": mask}
        if why:
            about["no_downstream"] = f"no next-token figures: {why}"
        return {path: _report(path, sae, figures[path], about) for path, sae in saes.items()}, compared

    def _by_cache(self, saes: dict[str, SparseAutoencoder], path: Path) -> tuple[dict[str, Report], dict[str, Any]]:
        if self.earlier:
            raise SaekitError("earlier parts need a model and text, not a cache")
        caches = [self.evaluator.checked(sae, self.evaluator.cache_of(sae) or path) for sae in saes.values()]
        if any(cache.fingerprint != caches[0].fingerprint for cache in caches):
            raise SaekitError("these dictionaries are of different caches; judge each alone, or give --cache")
        hook = str(caches[0].provenance.get("hook", path))
        study = ErrorStudy(saes, hook, {}, self.pursuit, self.seed)
        sae = next(iter(saes.values()))

        def batches(_: list[str]) -> Iterator[Harvest]:
            rows = self.evaluator.without_large(sae, caches[0], caches[0].batches("heldout", 1024))
            return _cached(caches[0], rows, hook, self.evaluator.tokens)

        figures, compared = study.run(batches)
        about = {"cache": str(path), "part": "heldout"}
        return {name: _report(name, sae, figures[name], about) for name, sae in saes.items()}, compared

    def _bar(self, name: str, contexts: int) -> Callable[[int], object]:
        return (
            self.evaluator.on_contexts(name, contexts) if self.evaluator.on_contexts is not None else lambda done: None
        )


def _after(source: ActivationSource, hooks: set[str]) -> set[str]:
    """Those of the hooks that a pass has not reached when it reaches the source's own."""
    tokens = next(source.contexts("heldout", 1)).tokens.to(device_of(source.model))
    with recorded(source.model, [source.hook, *hooks]) as seen:
        source.model(tokens, return_type=None)
    order = list(seen)
    return set(order[order.index(source.hook) :]) & hooks


def _check_same(first: str, one: ActivationSource, path: str, other: ActivationSource) -> None:
    """Raise SaekitError unless both dictionaries are of one hook point, model and text."""
    same = ("name", "hook", "context_length", "skip_first", "prepend_bos", "rules")
    for what in (*same, *one.text.facts, "processing"):
        a, b = (
            applied_to(s.model) if what == "processing" else {**vars(s), **s.text.facts}[what] for s in (one, other)
        )
        if a != b:
            kind = {"name": "model"}.get(what, what)
            raise SaekitError(f"'{first}' has {kind} '{a}', '{path}' has '{b}'; errors are compared at one hook point")
    a, b = (str(dtype_of(source.model)) for source in (one, other))
    if a != b:
        raise SaekitError(f"the models of '{first}' and '{path}' run in {a} and {b}; give --model-dtype")
    if one.text.fingerprint != other.text.fingerprint:
        raise SaekitError(f"'{first}' and '{path}' are of different texts ('{one.text.name}', '{other.text.name}')")


def _report(path: str, sae: SparseAutoencoder, figures: dict[str, Any], about: dict[str, Any]) -> Report:
    facts = {"dictionary": path, "architecture": sae.cfg.architecture, "d_in": sae.cfg.d_in, "d_sae": sae.cfg.d_sae}
    return Report({"dark_matter": figures}, {**facts, "k": sae.cfg.k, **about})


def _parts(contexts: ContextBatch, tell: Callable[[int], object]) -> Iterator[ContextBatch]:
    for part in contexts.split(_CONTEXTS):
        yield part
        tell(len(part.tokens))


def _cached(cache: ActivationCache, rows: Iterable[ActivationBatch], hook: str, left: int) -> Iterator[Harvest]:
    """The held-out rows of a cache, without the start of each context (rows of a plain tensor have no places)."""
    first = SKIPPED * (cache.provenance.get("context_length") or 0) if cache.provenance.get("model") else 0
    for batch in rows:
        kept = (batch.positions >= first).nonzero()[:left, 0]
        left -= len(kept)
        if len(kept):
            x, tokens, documents, positions = (column[kept] for column in batch[:4])
            yield Harvest({hook: ActivationBatch(x, tokens, documents, positions)})
        if left <= 0:
            return


def _first(contexts: ContextBatch, tokens: int) -> ContextBatch:
    """The first contexts that hold at least this many kept tokens, without those that hold none."""
    contexts = ContextBatch(*(column[contexts.kept.any(1)] for column in contexts))
    needed = int((contexts.kept.sum(1).cumsum(0) < tokens).sum()) + 1
    return contexts.rows(0, needed)
