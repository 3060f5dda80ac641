"""A mix of datasets as one name: ``wiki=0.7 + code.jsonl=0.3``, each with its weight."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import NamedTuple

from saekit.errors import SaekitError
from saekit.files import expanded

BETWEEN = " + "


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
    parts = dataset.split(BETWEEN)
    pairs = [_weighted(part.strip()) for part in parts]
    if not any(weight for _, weight in pairs) and (len(parts) == 1 or "*" in dataset):
        return []  # the name of one, or a pattern
    if os.path.exists(expanded(dataset)):  # a name too long for a file is none
        return []
    if len(parts) == 1:
        raise SaekitError(f"'{dataset}' has a weight; a mix has two datasets or more: --dataset a=2 --dataset b=1")
    for (_, weight), part in zip(pairs, parts, strict=True):
        if not weight:
            raise SaekitError(f"'{part.strip()}' in a mix of datasets has no weight above 0, as in a=0.7{BETWEEN}b=0.3")
    names = [name for name, _ in pairs]
    if twice := next((name for number, name in enumerate(names) if name in names[:number]), None):
        raise SaekitError(f"the dataset '{twice}' is in the mix twice")
    total = math.fsum(weight for _, weight in pairs)
    return [Weighted(name, weight / total) for name, weight in pairs]


def weighted_in(dataset: str) -> list[Weighted]:
    """``mixture_of`` a name that others wrote: none where it is not in order."""
    try:
        return mixture_of(dataset)
    except SaekitError:
        return []


def described(weights: Mapping[str, float]) -> str:
    """The name of a mix, from its datasets and their weights."""
    return BETWEEN.join(f"{name}={weight:g}" for name, weight in weights.items())


def _weighted(part: str) -> Weighted:
    """A name and its weight, which is 0 where there is none that is a positive number."""
    name, _, weight = part.rpartition("=")
    try:
        number = float(weight)
    except ValueError:
        return Weighted(part, 0.0)
    return Weighted(name, number if 0 < number < math.inf else 0.0) if name else Weighted(part, 0.0)
