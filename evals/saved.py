"""Evaluate saved dictionaries: what each was trained on tells which model, hook and text to judge it by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import saekit
from saekit.activations import ActivationCache, ActivationSource, ContextBatch
from saekit.errors import SaekitError
from saekit.evals.report import Report
from saekit.evals.suite import evaluate, evaluate_activations
from saekit.sae import SparseAutoencoder


@dataclass
class Judge:
    """Evaluates dictionaries on the held-out part of the text they come from.

    Models and contexts are opened once for all dictionaries that share them. Every field but ``tokens`` overrides what
    the dictionary's metadata says.

    Attributes:
        model, hook, dataset, column, context_length: as in ``ActivationSource.open``.
        cache: judge by the held-out rows of this activation cache instead of a model and text.
        tokens: text tokens to evaluate on.
        device: where model and dictionary run.
        on_contexts: makes a progress callback from a description and a number of contexts.
    """

    model: str | None = None
    hook: str | None = None
    dataset: str | None = None
    column: str | None = None
    context_length: int | None = None
    cache: Path | None = None
    tokens: int = 131_072
    device: str = "cpu"
    on_contexts: Callable[[str, int], Callable[[int], object]] | None = None
    _opened: dict[Any, Any] = field(default_factory=dict, init=False)

    def __call__(self, path: str | Path) -> Report:
        """Load one dictionary and evaluate it.

        Raises:
            SaekitError: the dictionary, its model or its text is not found, or they do not fit each other.
        """
        sae = saekit.load(path, device=self.device)
        about = {"dictionary": str(path), "architecture": sae.cfg.architecture, "d_in": sae.cfg.d_in}
        report = self._judge(sae, str(path))
        return Report(report.groups, {**about, "d_sae": sae.cfg.d_sae, "k": sae.cfg.k, **report.about})

    def _judge(self, sae: SparseAutoencoder, path: str) -> Report:
        facts = sae.cfg.metadata
        own = facts.get("saekit", {}) if isinstance(facts.get("saekit"), dict) else {}
        model = self.model or facts.get("model_name")
        cache = self.cache or (None if model else own.get("cache"))
        if cache:
            found = ActivationCache.open(cache)
            batches = (b.x.float().to(self.device) for b in found.batches("heldout"))
            report = evaluate_activations(sae, batches)
            return Report(report.groups, {"cache": str(cache), "part": "heldout"})
        if not model:
            raise SaekitError(f"'{path}' does not say which model it belongs to; give --model and --hook, or --cache")
        hook = self.hook or facts.get("hook_name")
        if not hook:
            raise SaekitError(f"'{path}' does not say which hook point it belongs to; give --hook")
        source, contexts = self._contexts(
            model,
            hook,
            self.dataset or facts.get("dataset_path") or "python",
            self.column or own.get("column") or "text",
            self.context_length or facts.get("context_size"),
        )
        tell = None
        if self.on_contexts is not None:
            tell = self.on_contexts(path, 2 * len(contexts.tokens))
        report = evaluate(sae, source.model, contexts, hook=hook, on_batch=tell)
        passport = source.passport("heldout")
        return Report(report.groups, {**report.about, **{k: v for k, v in passport.items() if k != "hook"}})

    def _contexts(
        self, model: str, hook: str, dataset: str, column: str, context_length: int | None
    ) -> tuple[ActivationSource, ContextBatch]:
        key = (model, hook, dataset, column, context_length)
        if key not in self._opened:
            source = ActivationSource.open(
                model, hook, dataset, column=column, context_length=context_length, device=self.device
            )
            self._opened[key] = source, heldout_contexts(source, self.tokens)
        opened: tuple[ActivationSource, ContextBatch] = self._opened[key]
        return opened


def heldout_contexts(source: ActivationSource, tokens: int) -> ContextBatch:
    """The first held-out contexts that hold at least this many text tokens (all where there are fewer).

    Raises:
        SaekitError: there is no held-out text.
    """
    parts: list[ContextBatch] = []
    count = 0
    for batch in source.contexts("heldout"):
        reached = batch.kept.sum(1).cumsum(0) + count
        needed = int((reached < tokens).sum()) + 1
        parts.append(ContextBatch(*(column[:needed] for column in batch)))
        count = int(reached[min(needed, len(reached)) - 1])
        if count >= tokens:
            break
    return ContextBatch(*(torch.cat(column) for column in zip(*parts, strict=True)))
