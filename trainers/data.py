"""Where a run's activations come from: a cache or a live harvest, with calibration data beside the training stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.activations import ActivationCache, ActivationSource, ShuffledStream
from saekit.activations.finite import BadTokens, limits_in
from saekit.activations.harvesting import harvest_hooks
from saekit.activations.manifest import as_known
from saekit.activations.settings import FACTS, StreamSettings
from saekit.activations.stream import StreamState, cache_rows, live_rows, live_rows_of_hooks
from saekit.errors import SaekitError
from saekit.kernels.devices import has_fast_bfloat16
from saekit.trainers.config import TrainConfig
from saekit.trainers.variants import VARIANTS

# settings that a cache answers for, and the facts of its provenance that they must equal
_FACTS = {field: FACTS.get(field, field) for field in StreamSettings.model_fields if field != "streaming"}


@dataclass(frozen=True)
class TrainingData:
    """The activations of one run.

    Attributes:
        provenance: facts about their origin, as in a cache's manifest.
        rows: makes the pieces [m, d] or, with gradients, [m, 2·d] of training rows, the same ones each time, from the
            piece of a number on.
        buffer: rows to shuffle together, no more than there are.
        gradients: whether gradients stand beside the activations, in the second half of each row.
        calibration: makes batches of held-out activations.
        columns: the part of each row that is this run's, where several runs share the rows.
        bad: what becomes of tokens that are NaN, infinite or too large.
    """

    provenance: dict[str, Any]
    rows: Callable[[int], Iterator[Float[Tensor, "m w"]]]
    buffer: int
    gradients: bool
    calibration: Callable[[], Iterator[Float[Tensor, "m d"]]]
    columns: slice = field(default_factory=lambda: slice(None))
    bad: BadTokens = field(default_factory=BadTokens)

    def stream(self, config: TrainConfig, place: StreamState | None) -> ShuffledStream:
        """The shuffled batches of the run, from a place on."""
        place = place or StreamState()
        self.bad.count = place.skipped
        return ShuffledStream(
            self.rows(place.pieces),
            config.batch_size,
            self.buffer,
            config.seed,
            limit=config.steps * config.batch_size,
            place=place,
            bad=self.bad,
        )


def training_data(
    config: TrainConfig,
    device: torch.device,
    trust_remote_code: bool = False,
    before: Mapping[str, Any] | None = None,
) -> TrainingData:
    """Open the cache that the config names, or load the model and the text.

    A run that goes on keeps the limit of the norm in ``before``, its provenance.

    Raises:
        SaekitError: a part is missing or does not fit another, or the text is too short for its three parts.
    """
    gradients = VARIANTS[config.variant].needs_gradients(config)
    if config.cache is not None:
        return _from_cache(config, ActivationCache.open(config.cache), gradients, before)
    source = _source(config, device, trust_remote_code)
    return _live(config, source, source.provenance("train", gradients=gradients), gradients, before)


def data_of_hooks(
    config: TrainConfig,
    hooks: Sequence[str],
    device: torch.device,
    trust_remote_code: bool = False,
    before: Sequence[Mapping[str, Any] | None] = (),
) -> list[TrainingData]:
    """Load the model and the text once for runs at several hook points, whose activations share the rows.

    Raises:
        SaekitError: as ``training_data``.
    """
    source = _source(config.replace(hook=hooks[0]), device, trust_remote_code)
    sources = [source.at(hook) for hook in hooks]
    (one,) = harvest_hooks(source.model, hooks, [next(source.contexts("calibration", 1))], bad=BadTokens(skip=True))
    widths = [batch.x.shape[1] for batch in one.batches.values()]
    provenance = source.provenance("train")  # fingerprints of large models take a while
    data = [
        _live(config, each, {**provenance, "hook": each.hook}, before=was)
        for each, was in zip(sources, before or [None] * len(hooks), strict=True)
    ]
    bad = BadTokens(config.skip_bad_tokens, limits={hook: r for each in data for hook, r in each.bad.limits.items()})

    def rows(first: int) -> Iterator[Tensor]:
        return live_rows_of_hooks(source, hooks, first=first, bad=bad)

    return [
        replace(each, rows=rows, columns=slice(stop - width, stop), bad=bad)
        for each, width, stop in zip(data, widths, accumulate(widths), strict=True)
    ]


def _source(config: TrainConfig, device: torch.device, trust_remote_code: bool) -> ActivationSource:
    source = ActivationSource.of(
        config.source.pooled(config.tokens), device=str(device), trust_remote_code=trust_remote_code
    )
    next(source.contexts("calibration"))  # better now than after the training
    next(source.contexts("heldout"))
    return source


def _live(
    config: TrainConfig,
    source: ActivationSource,
    provenance: dict[str, Any],
    gradients: bool = False,
    before: Mapping[str, Any] | None = None,
) -> TrainingData:
    if config.max_norm is not None:
        limit = (before or {}).get("norm_limit") or source.norm_limit(config.max_norm)
        provenance = {**provenance, "max_norm": config.max_norm, "norm_limit": limit}
    limits = limits_in(provenance)
    bad = BadTokens(config.skip_bad_tokens, limits=limits)

    def calibration() -> Iterator[Tensor]:
        apart = BadTokens(config.skip_bad_tokens, limits=limits)
        pool = min(source.pool, config.calibration_tokens)  # this part of the text is small
        batches = replace(source, pool=pool).batches("calibration", config.calibration_tokens, bad=apart)
        return (batch.x.float() for batch in batches)

    return TrainingData(
        provenance,
        lambda first: live_rows(source, gradients, first=first, bad=bad),
        min(config.buffer, config.tokens),
        gradients,
        calibration,
        bad=bad,
    )


def _from_cache(
    config: TrainConfig, cache: ActivationCache, gradients: bool, before: Mapping[str, Any] | None
) -> TrainingData:
    """Part of a cache serves the calibration and is never trained on."""
    facts = as_known(cache.provenance)
    for setting, fact in _FACTS.items():
        asked, found = getattr(config, setting), facts.get(fact)
        if setting in config.given and None not in (asked, found) and asked != found:
            raise SaekitError(f"the cache '{config.cache}' has {setting} '{found}', not '{asked}' as asked")
    if gradients:
        cache.check_gradients()
    if not cache.count("calibration") or cache.count("train") < config.batch_size:
        raise SaekitError(
            f"the cache '{config.cache}' of {len(cache):,} tokens is too small for a batch_size of {config.batch_size}"
        )

    provenance = {**cache.provenance, "cache_fingerprint": cache.fingerprint, "held_out": cache.division.told}
    limits = {}
    if config.max_norm is not None and (limit := cache.norm_limit(config.max_norm)) is not None:
        limit = (before or {}).get("norm_limit", limit)
        provenance |= {"max_norm": config.max_norm, "norm_limit": limit}
        limits = {cache.hook: limit}
    bad = BadTokens(config.skip_bad_tokens, limits=limits)

    def calibrate() -> Iterator[Tensor]:
        apart = BadTokens(config.skip_bad_tokens, limits=limits)
        for batch in islice(cache.batches("calibration", 1024), -(-config.calibration_tokens // 1024)):
            yield apart.sift([batch], [cache.hook], "calibration rows")[0].x.float()

    return TrainingData(
        provenance,
        lambda first: cache_rows(cache, config.seed, gradients, first=first, bad=bad),
        min(config.buffer, config.tokens, cache.count("train")),
        gradients,
        calibrate,
        bad=bad,
    )


def resolved(config: TrainConfig, provenance: dict[str, Any], d_in: int) -> TrainConfig:
    """The config with every default that the data decides filled in.

    Raises:
        SaekitError: more features a token are asked for than the width has.
    """
    facts = {setting: provenance[fact] for setting, fact in _FACTS.items() if provenance.get(fact) is not None}
    width = config.width or round(config.expansion * d_in)
    config.check_width(width)
    dead_after = config.dead_after or max(config.batch_size, min(10_000_000, config.tokens // 10))
    derived: dict[str, Any] = {"width": width, "dead_after": dead_after, "lr": config.peak_lr}
    if "k_aux" in config.fields:
        derived["k_aux"] = config.k_aux or max(1, min(d_in // 2, width))
    if config.optimizer.precision is None:
        derived["precision"] = "bf16_select" if has_fast_bfloat16(config.device) else "fp32"
    return config.replace(**facts, **derived)
