"""Where a run's activations come from: a cache or a live harvest, with calibration data beside the training stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.activations import ActivationCache, ActivationSource
from saekit.activations.stream import cache_fills, live_fills
from saekit.errors import SaekitError
from saekit.trainers.config import TrainConfig


@dataclass(frozen=True)
class TrainingData:
    """The activations of one run.

    Attributes:
        passport: facts about their origin, as in a cache's manifest.
        fills: makes the endless blocks of training rows, the same ones each time.
        calibration: makes batches of held-out activations.
    """

    passport: dict[str, Any]
    fills: Callable[[], Iterator[Float[Tensor, "m d"]]]
    calibration: Callable[[], Iterator[Float[Tensor, "m d"]]]


def training_data(config: TrainConfig, device: torch.device) -> TrainingData:
    """Open the cache that the config names, or load the model and the text.

    Raises:
        SaekitError: a part is missing or does not fit another.
    """
    if config.cache is not None:
        return _from_cache(config, ActivationCache.open(config.cache))
    source = ActivationSource.open(
        config.model,
        config.hook,
        config.dataset,
        column=config.column,
        context_length=config.context_length,
        device=str(device),
        dtype=config.dtype,
    )

    def calibration() -> Iterator[Tensor]:
        return (batch.x.float() for batch in source.batches("calibration", config.calibration_tokens))

    return TrainingData(source.passport("train"), partial(live_fills, source, config.buffer), calibration)


def _from_cache(config: TrainConfig, cache: ActivationCache) -> TrainingData:
    """The end of a cache serves the calibration and is never trained on."""
    asked = {"model": config.model, "hook": config.hook, "dataset": config.dataset}
    for field in asked.keys() & config.model_fields_set & cache.passport.keys():
        if asked[field] is not None and asked[field] != cache.passport[field]:
            raise SaekitError(
                f"the cache '{config.cache}' has {field} '{cache.passport[field]}', not '{asked[field]}' as asked"
            )
    if not cache.rows_of("calibration") or len(cache.rows_of("train")) < config.batch_size:
        raise SaekitError(
            f"the cache '{config.cache}' of {len(cache):,} tokens is too small for a batch_size of {config.batch_size}"
        )

    def calibration() -> Iterator[Tensor]:
        return (batch.x.float() for batch in cache.batches("calibration"))

    fills = partial(cache_fills, cache, config.buffer, config.seed)
    return TrainingData(dict(cache.passport), fills, calibration)
