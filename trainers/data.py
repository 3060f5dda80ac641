"""Where a run's activations come from: a cache or a live harvest, with calibration data beside the training stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, islice
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.activations import ActivationCache, ActivationSource, ShuffledStream
from saekit.activations.finite import BadTokens, limits_in
from saekit.activations.harvesting import harvest_hooks
from saekit.activations.manifest import as_known
from saekit.activations.model import default_hook
from saekit.activations.placement import AUTO
from saekit.activations.settings import FACTS, StreamSettings
from saekit.activations.stream import StreamState, cache_rows, live_rows, live_rows_of_hooks
from saekit.errors import SaekitError
from saekit.kernels.devices import has_fast_bfloat16
from saekit.machine import pick_device
from saekit.trainers.config import TrainConfig
from saekit.trainers.variants import VARIANTS

_known_widths: WeakKeyDictionary[nn.Module, dict[str, int]] = WeakKeyDictionary()
_HELD = 2 << 30  # bytes of activations for the calibration
# settings that a cache answers for, and the facts of its provenance that they must equal
_FACTS = {field: FACTS.get(field, field) for field in StreamSettings.model_fields if field != "streaming"}


@dataclass(frozen=True)
class TrainingData:
    """The activations of one run.

    Attributes:
        provenance: facts about their origin, as in a cache's manifest.
        rows: makes the pieces [m, d] or, with gradients, [m, 2·d] of training rows, the same ones each time, from the
            piece of a number on; None for who wants none of those that several processes make.
        buffer: rows to shuffle together, no more than there are.
        gradients: whether gradients stand beside the activations, in the second half of each row.
        calibration: makes batches of held-out activations.
        columns: the part of each row that is this run's, where several runs share the rows.
        bad: what becomes of tokens that are NaN, infinite or too large.
        live: whether a model makes the rows.
    """

    provenance: dict[str, Any]
    rows: Callable[[int | None], Iterator[Float[Tensor, "m w"]]]
    buffer: int
    gradients: bool
    calibration: Callable[[], Iterator[Float[Tensor, "m d"]]]
    columns: slice = field(default_factory=lambda: slice(None))
    bad: BadTokens = field(default_factory=BadTokens)
    live: bool = False

    def stream(
        self, config: TrainConfig, place: StreamState | None, rows: Iterator[Float[Tensor, "m w"]] | None = None
    ) -> ShuffledStream:
        """The shuffled batches of the run, from a place on, of the run's own rows if no others are given."""
        place = place or StreamState()
        self.bad.count = place.skipped
        return ShuffledStream(
            self.rows(place.pieces) if rows is None else rows,
            config.batch_size,
            self.buffer,
            config.seed,
            limit=config.steps * config.batch_size,
            place=place,
            bad=self.bad,
            pinned=pick_device(config.device).type == "cuda",
        )


def training_data(
    config: TrainConfig,
    device: torch.device,
    trust_remote_code: bool = False,
    before: Mapping[str, Any] | None = None,
) -> TrainingData:
    """``shared_data`` of one run."""
    return shared_data([config], opened(config, device, trust_remote_code), [before])[0]


def origin(config: TrainConfig) -> tuple[Any, ...]:
    """What decides which rows a run gets, up to their order: runs with the same origin share them."""
    gradients = VARIANTS[config.variant].needs_gradients(config)
    sifted = (config.max_norm, config.skip_bad_tokens)
    if config.cache is not None:
        return (str(config.cache), gradients, config.device, *sifted)
    text = config.source.pooled(config.tokens).model_dump_json(exclude=set() if gradients else {"hook"})
    return (text, gradients, config.device, *sifted)


def opened(
    config: TrainConfig, device: torch.device, trust_remote_code: bool = False
) -> ActivationSource | ActivationCache:
    """The cache that a run is trained on, or its model and text.

    Raises:
        SaekitError: a part is missing, or the text is too short for its three parts.
    """
    if config.cache is not None:
        return ActivationCache.open(config.cache)
    source = ActivationSource.of(
        config.source.pooled(config.tokens), device=str(device), trust_remote_code=trust_remote_code
    )
    source.check_parts()  # better now than after the training
    return source


def widths(hooks: Sequence[str | None], origin: ActivationSource | ActivationCache) -> dict[str | None, int]:
    """d_in at each of these hook points, None for the one that is had where none is named.

    Raises:
        SaekitError: there is no such hook.
    """
    if isinstance(origin, ActivationCache):
        return dict.fromkeys(hooks, origin.d_in)
    points = {hook: origin.at(hook or default_hook(origin.model)).hook for hook in hooks}
    known = _known_widths.setdefault(origin.model, {})
    if new := [point for point in dict.fromkeys(points.values()) if point not in known]:
        context = [next(origin.contexts("calibration", 1))]
        (one,) = harvest_hooks(origin.model, new, context, bad=BadTokens(skip=True))
        known |= {point: batch.x.shape[1] for point, batch in one.batches.items()}
    return {hook: known[point] for hook, point in points.items()}


def shared_data(
    configs: Sequence[TrainConfig],
    origin: ActivationSource | ActivationCache,
    before: Sequence[Mapping[str, Any] | None] = (),
) -> list[TrainingData]:
    """The data of runs of one origin.

    A run that goes on keeps the limit of the norm in ``before``, its provenance. Live activations at several hooks
    share the rows; what is left out at one hook is left out at all.

    Args:
        configs: of the runs.
        origin: what ``opened`` makes of them.
        before: their provenance, where they go on.

    Raises:
        SaekitError: a part does not fit another.
    """
    before = before or [None] * len(configs)
    first, gradients = configs[0], VARIANTS[configs[0].variant].needs_gradients(configs[0])
    if isinstance(origin, ActivationCache):
        return [_from_cache(each, origin, gradients, was) for each, was in zip(configs, before, strict=True)]
    source = origin
    at = {each.hook: source.at(each.hook or default_hook(source.model)) for each in configs}
    hooks = list(dict.fromkeys(each.hook for each in at.values()))
    provenance = source.provenance("train", gradients=gradients)  # fingerprints of large models take a while
    data = [
        _live(each, at[each.hook], {**provenance, "hook": at[each.hook].hook}, gradients, was)
        for each, was in zip(configs, before, strict=True)
    ]
    bad = BadTokens(first.skip_bad_tokens, limits={hook: r for each in data for hook, r in each.bad.limits.items()})
    wanted = max(each.steps * each.optimizer.batch_size for each in configs)
    if len(hooks) == 1:
        rows = partial(_rows_of_one, at[first.hook], gradients, bad, wanted)
        return _sharing_calibration([replace(each, rows=rows, bad=bad) for each in data], configs)
    found = widths(hooks, source).values()
    columns = {hook: slice(stop - w, stop) for hook, w, stop in zip(hooks, found, accumulate(found), strict=True)}
    rows = partial(_rows_of_hooks, source, hooks, bad, wanted)
    data = [
        replace(each, rows=rows, bad=bad, columns=columns[at[config.hook].hook])
        for each, config in zip(data, configs, strict=True)
    ]
    return _sharing_calibration(data, configs)


def _rows_of_one(
    source: ActivationSource, gradients: bool, bad: BadTokens, wanted: int, first: int | None
) -> Iterator[Tensor]:
    return live_rows(source, gradients, first=first, bad=bad, wanted=wanted)


def _rows_of_hooks(
    source: ActivationSource, hooks: list[str], bad: BadTokens, wanted: int, first: int | None
) -> Iterator[Tensor]:
    return live_rows_of_hooks(source, hooks, first=first, bad=bad, wanted=wanted)


def _sharing_calibration(data: list[TrainingData], configs: Sequence[TrainConfig]) -> list[TrainingData]:
    """Runs that are calibrated on the same activations have them harvested once."""
    held: dict[tuple[Any, int], Held] = {}
    return [
        replace(each, calibration=held.setdefault((config.hook, config.calibration_tokens), Held(each.calibration)))
        for each, config in zip(data, configs, strict=True)
    ]


class Held:
    """Batches that are made once and held, where they are no larger than 2 GiB; else they are made each time."""

    def __init__(self, make: Callable[[], Iterator[Tensor]]) -> None:
        self._make = make
        self._batches: list[Tensor] | None = None

    def __call__(self) -> Iterator[Tensor]:
        """The batches."""
        if self._batches is not None:
            yield from self._batches
            return
        kept: list[Tensor] = []
        size = 0
        for batch in self._make():
            size += batch.nbytes
            if size <= _HELD:
                kept.append(batch)
            else:
                kept.clear()
            yield batch
        self._batches = kept if size <= _HELD else None


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
        partial(_rows_of_one, source, gradients, bad, config.steps * config.optimizer.batch_size),
        min(config.buffer, config.tokens),
        gradients,
        calibration,
        bad=bad,
        live=True,
    )


def _from_cache(
    config: TrainConfig, cache: ActivationCache, gradients: bool, before: Mapping[str, Any] | None
) -> TrainingData:
    """Part of a cache serves the calibration and is never trained on."""
    facts = as_known(cache.provenance)
    for setting, fact in _FACTS.items():
        asked, found = getattr(config, setting), facts.get(fact)
        if setting in config.given and asked not in (None, AUTO) and found is not None and asked != found:
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
        lambda first: cache_rows(cache, config.seed, gradients, first=first or 0, bad=bad),
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
    if config.source.model_dtype == AUTO:
        facts.setdefault("model_dtype", "float32")  # activations that tell no model
    width = config.width_at(d_in)
    dead_after = config.dead_after or max(config.batch_size, min(10_000_000, config.tokens // 10))
    derived: dict[str, Any] = {"width": width, "dead_after": dead_after, "lr": config.peak_lr}
    if "k_aux" in config.fields:
        derived["k_aux"] = config.k_aux or max(1, min(d_in // 2, width))
    if config.optimizer.precision is None:
        derived["precision"] = "bf16_select" if has_fast_bfloat16(config.device) else "fp32"
    return config.replace(**facts, **derived)
