"""A mix of datasets as one name: ``wiki=0.7 + code.jsonl=0.3``, each with its weight."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from saekit.errors import SaekitError
from saekit.files import expanded

_BETWEEN = " + "


class Weighted(NamedTuple):
    """A dataset of a mix.

    Attributes:
        name: what the user wrote.
        weight: its part of all tokens; those of a mix make 1.
    """

    name: str
    weight: float


def mixture_of(dataset: str) -> list[Weighted]:
    """The datasets that a name mixes; none where it is the name of one, or of a file that has such a name.

    Raises:
        SaekitError: a weight is missing or no positive number, or a dataset is named twice.
    """
    pairs = _pairs(dataset)
    if not any(weight for _, weight in pairs):
        return []
    if os.path.exists(expanded(dataset)):  # a name too long for a file is none
        return []
    for name, weight in pairs:
        if not weight:
            raise SaekitError(_no_weight(name))
    if len(pairs) == 1:
        raise SaekitError(f"'{dataset}' has a weight; a mix has two datasets or more: --dataset a=2 --dataset b=1")
    names = [name for name, _ in pairs]
    if twice := next((name for number, name in enumerate(names) if name in names[:number]), None):
        raise SaekitError(f"the dataset '{twice}' is in the mix twice")
    largest = max(weight for _, weight in pairs)
    shares = [weight / largest for _, weight in pairs]
    parts = [share / math.fsum(shares) for share in shares]
    if small := next((name for name, part in zip(names, parts, strict=True) if part < 1e-9), None):
        raise SaekitError(f"the weight of '{small}' is next to nothing beside the others of the mix")
    return [Weighted(name, part) for name, part in zip(names, parts, strict=True)]


def weighted_in(dataset: str) -> list[Weighted]:
    """``mixture_of`` a name that others wrote: none where it is not in order."""
    try:
        return mixture_of(dataset)
    except SaekitError:
        return []


def mix(datasets: Sequence[str]) -> str:
    """The name of a mix of datasets, each with its weight; of one alone, its own.

    Raises:
        SaekitError: there are several, and one has no weight.
    """
    if len(datasets) > 1:
        for dataset in datasets:
            if not _weighted(dataset).weight:
                raise SaekitError(_no_weight(dataset))
    return _BETWEEN.join(datasets)


def described(weights: Iterable[tuple[Any, Any]]) -> str:
    """The name of a mix, from its datasets and their weights.

    Raises:
        SaekitError: there is none, or a weight is no number.
    """
    pairs = list(weights)
    for name, weight in pairs:
        if isinstance(weight, bool) or not isinstance(weight, int | float | str):
            raise SaekitError(_no_weight(str(name)))
    if not pairs:
        raise SaekitError("dataset: is a mix of no datasets; it is written as {NAME: WEIGHT, NAME: WEIGHT}")
    return mix([f"{name}={weight}" for name, weight in pairs])


def from_yaml(value: Any) -> Any:
    """The name of a mix that is a mapping of datasets to weights; anything else as it is."""
    return described(value.items()) if isinstance(value, Mapping) else value


def _no_weight(name: str) -> str:
    return f"'{name}' in a mix of datasets has no weight above 0; it is written as NAME=WEIGHT, as in a=0.7 and b=0.3"


def _pairs(dataset: str) -> list[Weighted]:
    """Names and weights, which are 0 where there are none; a name ends at its weight, and may hold what is between."""
    found: list[Weighted] = []
    waiting: list[str] = []
    for part in dataset.split(_BETWEEN):
        name, weight = _weighted(part)
        waiting.append(name)
        if weight or "=" in part:
            found.append(Weighted(_BETWEEN.join(waiting), weight))
            waiting = []
    return [*found, Weighted(_BETWEEN.join(waiting), 0.0)] if waiting else found


def _weighted(part: str) -> Weighted:
    """A name and its weight, which is 0 where there is none that is a positive number."""
    name, _, weight = part.rpartition("=")
    try:
        number = float(weight)
    except ValueError:
        return Weighted(part, 0.0)
    return Weighted(name.strip(), number) if name.strip() and 0 < number < math.inf else Weighted(part, 0.0)
