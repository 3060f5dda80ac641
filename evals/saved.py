"""Evaluate saved dictionaries: what each was trained on tells which model, hook and text to judge it by."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from saekit.activations import ActivationBatch, ActivationCache, ActivationSource, ContextBatch, harvest
from saekit.activations.finite import BadTokens
from saekit.activations.placement import NO_QUANTIZATION, how_loaded
from saekit.activations.python_source import Split
from saekit.activations.settings import SourceSettings
from saekit.activations.text import PYTHON
from saekit.errors import SaekitError, SaekitWarning
from saekit.evals.heldout import Drawn, draw
from saekit.evals.reference import Reference
from saekit.evals.registry import routed
from saekit.evals.report import Report
from saekit.evals.suite import evaluate_activations, judge, passes, scored_contexts
from saekit.evals.told import check_told, model_wanted, text_rules
from saekit.loading import load
from saekit.processing import asked_for, warn_of_processing
from saekit.reading import is_plain
from saekit.sae import SparseAutoencoder
from saekit.settings import partial

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


_Source: Any = partial(SourceSettings)
_OF_THE_TEXT = {"dataset_fingerprint": "text", "chat_template": "chat template"}


class Evaluator:
    """Evaluates dictionaries on the held-out part of the text they come from.

    Models and contexts are opened once for all dictionaries that share them. A source setting that is given wins over
    what the dictionary's metadata says. With ``max_norm`` left out all tokens are scored, also by dictionaries that
    were trained without the large ones, so that figures stay comparable.

    Attributes:
        source: the settings of ``SourceSettings`` that were given; the others are None.
        cache: judge by the held-out rows of this activation cache instead of a model and text.
        tokens: text tokens to evaluate on.
        device: where model and dictionary run.
        trust_remote_code: whether code that comes with the model may run.
        on_contexts: makes a progress callback from a description and a number of contexts.
        settings: of the evaluations, by their flat names.
    """

    def __init__(
        self,
        *,
        cache: Path | None = None,
        tokens: int = 131_072,
        device: str = "cpu",
        trust_remote_code: bool = False,
        on_contexts: Callable[[str, int], Callable[[int], object]] | None = None,
        settings: Mapping[str, Any] | None = None,
        **source: Any,
    ) -> None:
        """Take what is asked; further keywords are those of ``SourceSettings``, ``dtype`` for ``model_dtype`` too.

        Raises:
            SaekitError: a value is impossible, or both a cache and a text are given.
        """
        if "dtype" in source:
            source["model_dtype"] = source.pop("dtype")
        for name, count in (("tokens", tokens), ("context_length", source.get("context_length"))):
            if count is not None and count < 1:
                raise SaekitError(f"{name} = {count} is no number of tokens to judge by")
        if (norm := source.get("max_norm")) is not None and not 1 < norm < math.inf:
            raise SaekitError(f"--max-norm is a multiple of the median norm, more than 1, not {norm}")
        self.source = _Source(**source)
        self.cache, self.tokens, self.device, self.trust_remote_code = cache, tokens, device, trust_remote_code
        self.on_contexts, self.settings = on_contexts, dict(settings or {})
        self._models: dict[Any, TransformerBridge] = {}
        self._drawn: dict[Any, Drawn] = {}
        self._references: dict[Any, Reference] = {}
        self._limits: dict[Any, float | None] = {}
        given = self.source.model_dump(exclude_none=True).keys() - {"max_norm"}
        if cache and given:
            first = next(name for name in type(self.source).model_fields if name in given).replace("_", "-")
            raise SaekitError(f"judge either by --cache or by a model and text, not by --cache and --{first}")
        routed(self.settings)

    def __call__(self, path: str | Path) -> Report:
        """Load one dictionary and evaluate it.

        Raises:
            SaekitError: the dictionary, its model or its text is not found, or they do not fit each other.
        """
        sae = load(path, device=self.device)
        validated_metadata(sae)  # refused where it tells nonsense
        cache = self.cache_of(sae)
        report = self._by_cache(sae, cache) if cache else self._by_text(sae, str(path))
        about = {"dictionary": str(path), "architecture": sae.cfg.architecture, "d_in": sae.cfg.d_in}
        return Report(report.groups, {**about, "d_sae": sae.cfg.d_sae, "k": sae.cfg.k, **report.about})

    def activations(self, sae: SparseAutoencoder, path: str, part: Split) -> Iterator[ActivationBatch]:
        """About ``tokens`` activations of one part of the data that the dictionary comes from.

        Raises:
            SaekitError: as for a call.
        """
        place = self.cache_of(sae)
        if place:
            cache = self.checked(sae, place)
            batches: Iterator[ActivationBatch] = self.without_large(sae, cache, cache.batches(part, 1024))
            batches = islice(batches, -(-self.tokens // 1024))
        else:
            source = self.source_of(sae, path)
            if part == "heldout":
                contexts = self._draw(sae, source).contexts
                batches = harvest(source.model, source.hook, contexts.split(32))
            else:
                batches = source.batches(part, self.tokens, bad=self._sieve(sae, source))
        return (batch._replace(x=batch.x.float().to(self.device)) for batch in batches)

    def without_large(
        self, sae: SparseAutoencoder, cache: ActivationCache, batches: Iterable[ActivationBatch]
    ) -> Iterator[ActivationBatch]:
        """Rows of a cache without those that ``max_norm`` leaves out."""
        bad = self._sieve(sae, cache)
        return (bad.sift([batch], [cache.hook], f"batch {i} of '{cache.path}'")[0] for i, batch in enumerate(batches))

    def _sieve(self, sae: SparseAutoencoder, origin: ActivationSource | ActivationCache) -> BadTokens:
        limit = self.norm_limit(sae, origin)
        return BadTokens(limits={} if limit is None else {origin.hook: limit})

    def norm_limit(self, sae: SparseAutoencoder, origin: ActivationSource | ActivationCache) -> float | None:
        """The largest ‖x‖ that ``max_norm`` lets in: where it is that of the training, by the number used there."""
        if self.source.max_norm is None:
            return None
        own = _own(sae).get("provenance") or {}
        if isinstance(origin, ActivationSource):
            here = {"model": origin.name, "hook": origin.hook, "max_norm": self.source.max_norm}
            if "norm_limit" in own and here.items() <= own.items():
                return float(own["norm_limit"])
        place = (origin.name, origin.text.fingerprint) if isinstance(origin, ActivationSource) else origin.path
        if (key := (place, origin.hook)) not in self._limits:
            self._limits[key] = origin.norm_limit(self.source.max_norm)
        return self._limits[key]

    def cache_of(self, sae: SparseAutoencoder) -> Path | None:
        """The cache to judge by: the one that is asked for, or the only thing that the dictionary names."""
        own = _own(sae).get("cache") if not (self.source.model or validated_metadata(sae).get("model_name")) else None
        return self.cache or (Path(own) if own else None)

    def checked(self, sae: SparseAutoencoder, path: Path) -> ActivationCache:
        """The cache, once it is sure that it fits and that a part of it was held out from this dictionary.

        Raises:
            SaekitError: it is of another model or hook, or all of it may have been trained on.
        """
        cache, facts, own = ActivationCache.open(path), validated_metadata(sae), _own(sae)
        for fact, name in (("model", "model_name"), ("hook", "hook_name")):
            if None not in (cache.provenance.get(fact), facts.get(name)) and cache.provenance[fact] != facts[name]:
                raise SaekitError(
                    f"the cache '{path}' has {fact} '{cache.provenance[fact]}', the dictionary '{facts[name]}'"
                )
        trained_on_it = (own.get("provenance") or {}).get("cache_fingerprint") == cache.fingerprint
        rebuilt = own.get("cache") is not None and Path(own["cache"]).resolve() == cache.path
        if (rebuilt or cache.provenance.get("part") == "train") and not trained_on_it:
            raise SaekitError(
                f"rows of the cache '{path}' are held out for dictionaries trained on just these data; this one may "
                f"have seen them: judge it by a model and text (--model, --hook, --dataset)"
            )
        bos = {cache.provenance.get("prepend_bos"), facts.get("prepend_bos")} - {None}
        lacks = {*asked_for(facts, facts.get("hook_name") or "")} - {
            *(cache.provenance.get("processing") or ()),
            "center_unembed",
        }
        differs = [*(["prepend_bos"] if len(bos) > 1 else []), *sorted(lacks)]
        if differs and cache.provenance.get("model"):
            told = f"the cache '{path}' differs from what '{facts.get('model_name')}' was when it was trained on"
            warnings.warn(f"{told}: {', '.join(differs)}", SaekitWarning, stacklevel=3)
        return cache

    def _by_cache(self, sae: SparseAutoencoder, path: Path) -> Report:
        report = evaluate_activations(sae, self.activations(sae, str(path), "heldout"), self.settings)
        return Report(report.groups, {"cache": str(path), "part": "heldout", **self._told(None)})

    def source_of(self, sae: SparseAutoencoder, path: str) -> ActivationSource:
        """Model, hook and text, as asked for or as the dictionary names them.

        Raises:
            SaekitError: the dictionary says too little, or one of them does not exist.
        """
        asked, facts, provenance = self.source, validated_metadata(sae), _own(sae).get("provenance") or {}
        model, hook = asked.model or facts.get("model_name"), asked.hook or facts.get("hook_name")
        if not model:
            raise SaekitError(f"'{path}' does not say which model it belongs to; give --model and --hook, or --cache")
        own = facts.get("hook_name")
        if own is not None and hook != own:
            warnings.warn(f"'{path}' belongs to '{own}'; here it is judged at '{hook}'", SaekitWarning, stacklevel=3)
        if not hook:
            raise SaekitError(f"'{path}' does not say which hook point it belongs to; give --hook")
        wanted = model_wanted(facts, path, hook, named=asked.model is not None, dtype=asked.model_dtype)
        dtype = asked.model_dtype or provenance.get("model_dtype") or wanted.dtype or "float32"
        quantization = asked.model_quantization or provenance.get("model_quantization") or NO_QUANTIZATION
        how = how_loaded(asked, self.device) | {"dtype": dtype, "quantization": quantization}
        key = (model, dtype, quantization, wanted.revision, wanted.processing)
        own_text = {} if asked.dataset else provenance
        source = ActivationSource.open(
            model,
            hook,
            asked.dataset or facts.get("dataset_path") or "python",
            column=asked.column or provenance.get("column") or "text",
            **_documents(asked, own_text),
            group_column=asked.group_column or own_text.get("group_column"),
            split=asked.split or provenance.get("dataset_split") or "train",
            dataset_config=asked.dataset_config or own_text.get("dataset_config"),
            streaming=asked.streaming is not False,
            context_length=asked.context_length or facts.get("context_size"),
            skip_first=asked.skip_first or provenance.get("skip_first") or 1,
            prepend_bos=facts.get("prepend_bos") if asked.prepend_bos is None else asked.prepend_bos,
            rules=text_rules(facts),
            **how,
            revision=wanted.revision,
            processing=wanted.processing,
            loaded=self._models.get(key),
            trust_remote_code=self.trust_remote_code,
        )
        self._models[key] = source.model
        if (group := provenance.get("group_column")) != source.text.facts["group_column"] and not asked.group_column:
            told = f"'{path}' was trained on text that its column '{group}' divides; '{source.text.name}' is divided by"
            warnings.warn(f"{told} its documents (--group-column {group})", SaekitWarning, stacklevel=3)
        if not asked.dataset and source.text.name == provenance.get("dataset") != PYTHON:
            here = source.fingerprints()
            changed = [_OF_THE_TEXT[fact] for fact, now in here.items() if provenance.get(fact, now) != now]
            if changed:
                told = f"the {' and the '.join(changed)} changed since '{path}' was trained on '{source.text.name}'"
                warnings.warn(f"{told}; it is judged on what is there now", SaekitWarning, stacklevel=3)
        if asked.prepend_bos and not source.prepend_bos:
            raise SaekitError(f"the tokenizer of '{model}' has no BOS to prepend")
        check_told(facts, path, hook, str(source.model.cfg.normalization_type))
        return source

    def text_of(self, sae: SparseAutoencoder, path: str) -> tuple[ActivationSource, ContextBatch]:
        """Model, hook and text (``source_of``), and the held-out contexts to judge by.

        Raises:
            SaekitError: as ``source_of``, or there is no held-out text.
        """
        source = self.source_of(sae, path)
        return source, self._draw(sae, source).contexts

    def _key(self, sae: SparseAutoencoder, source: ActivationSource) -> tuple[Any, ...]:
        """What tells held-out contexts apart."""
        limit = self.norm_limit(sae, source)
        large = () if limit is None else (source.hook, limit)
        text = (source.text.fingerprint, *source.text.facts.values(), source.rules)
        return (source.name, *text, source.context_length, source.skip_first, source.prepend_bos, *large)

    def _draw(self, sae: SparseAutoencoder, source: ActivationSource) -> Drawn:
        key = self._key(sae, source)
        if key not in self._drawn:
            self._drawn[key] = draw(source, self.tokens, limit=self.norm_limit(sae, source))
        return self._drawn[key]

    def reference_of(self, sae: SparseAutoencoder, path: str) -> Reference:
        """What the model makes of the held-out contexts, found once for all dictionaries of a hook point.

        Raises:
            SaekitError: as ``text_of``.
        """
        return self._reference(sae, self.source_of(sae, path))

    def _reference(self, sae: SparseAutoencoder, source: ActivationSource) -> Reference:
        key = (*self._key(sae, source), source.hook, source.model)
        for other, reference in self._references.items():  # activations of one hook point at a time
            if other != key:
                reference.forget()
        if key not in self._references:
            contexts = scored_contexts(self._draw(sae, source).contexts, source.skip_first)
            self._references[key] = Reference(source.model, source.hook, contexts)
        return self._references[key]

    def _by_text(self, sae: SparseAutoencoder, path: str) -> Report:
        source = self.source_of(sae, path)
        reference = self._reference(sae, source)
        work = passes(sae, reference) * len(reference.contexts.tokens)
        tell = self.on_contexts(path, work) if self.on_contexts is not None else None
        warn_of_processing(sae, source.model, source.hook)
        report = judge(sae, reference, on_batch=tell, settings=self.settings)
        told = self._told(self.norm_limit(sae, source))
        about = {**source.provenance("heldout"), **self._draw(sae, source).about(), **told, **report.about}
        return Report(report.groups, about)

    def _told(self, limit: float | None) -> dict[str, float]:
        asked = {} if self.source.max_norm is None else {"max_norm": self.source.max_norm}
        return asked if limit is None else {**asked, "norm_limit": limit}


def _documents(asked: Any, own: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that documents are read from in place of text, as asked for or else as the training had them."""
    named = asked.column or asked.tokens_column or asked.messages_column
    own = {} if named else own
    return {
        "tokens_column": asked.tokens_column or own.get("tokens_column"),
        "messages_column": asked.messages_column or own.get("messages_column"),
        "train_on": asked.train_on or own.get("train_on") or "all",
    }


def _plain(text: str) -> str:
    if not is_plain(text):
        raise ValueError("it has characters that no name has")
    return text


_Text = Annotated[str, AfterValidator(_plain)] | None


_Id = Annotated[int, Field(ge=0, lt=2**31)]
_Slice = Annotated[list[int | None] | tuple[int | None, ...], Field(max_length=3)]


class _Provenance(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(extra="allow", strict=True)  # type: ignore[misc]
    hook: _Text
    column: _Text
    tokens_column: _Text
    messages_column: _Text
    train_on: Literal["all", "assistant", "user"] | None
    group_column: _Text
    dataset_split: _Text
    dataset_config: _Text
    skip_first: Annotated[int, Field(gt=0, lt=2**31)] | None
    max_norm: Annotated[float, Field(gt=0)] | None
    norm_limit: Annotated[float, Field(gt=0)] | None
    model_dtype: _Text
    model_quantization: _Text
    cache_fingerprint: _Text


class _Own(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(extra="allow", strict=True)  # type: ignore[misc]
    cache: _Text
    provenance: _Provenance | None
    beta: float | int | None


class _Metadata(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(extra="allow", strict=True)  # type: ignore[misc]
    model_name: _Text
    hook_name: _Text
    dataset_path: _Text
    context_size: Annotated[int, Field(gt=0, lt=2**31)] | None
    prepend_bos: bool | None
    model_from_pretrained_kwargs: dict[str, Any] | None
    hook_head_index: int | None
    seqpos_slice: _Slice | None
    exclude_special_tokens: bool | list[_Id] | None
    sequence_separator_token: _Id | Literal["bos", "eos", "sep"] | None
    disable_concat_sequences: bool | None
    saekit: _Own | None


def validated_metadata(sae: SparseAutoencoder) -> dict[str, Any]:
    """A dictionary's metadata, which others may have written.

    Raises:
        SaekitError: what it tells of its origin is of the wrong kind.
    """
    try:
        TypeAdapter(_Metadata).validate_python(sae.cfg.metadata)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise SaekitError(f"the dictionary's metadata: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return sae.cfg.metadata


def _own(sae: SparseAutoencoder) -> dict[str, Any]:
    """What saekit wrote about the training."""
    return dict(validated_metadata(sae).get("saekit") or {})
