"""Division of tokens into a half to fit on and a half to test on."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

SplitKind = Literal["random", "document"]
SPLITS: tuple[SplitKind, ...] = ("random", "document")


def scrambled(numbers: Int[Tensor, "n"], seed: int) -> Int[Tensor, "n"]:
    """Whole numbers from 0 to 2³¹ − 1 that depend on each number and the seed alone, even in every bit (splitmix64)."""
    with np.errstate(over="ignore"):
        z = numbers.cpu().numpy().astype(np.uint64) + np.uint64(seed + 1) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return torch.from_numpy((z >> np.uint64(33)).astype(np.int64))


def in_test_half(numbers: Int[Tensor, "n"], seed: int) -> Bool[Tensor, "n"]:
    """Which tokens are in the half to test on, by their running number or by that of their document."""
    return scrambled(numbers, seed) % 2 == 1
