"""A dictionary's linear and nonlinear error as activation caches, to train further dictionaries on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from saekit.activations import ActivationBatch, ActivationCache
from saekit.evals.dark_matter.least_squares import LinearMap, Moments, fit_linear
from saekit.sae import SparseAutoencoder

Part = Literal["linear", "nonlinear"]
_ROWS = 8192


@torch.no_grad()
def fit_error(sae: SparseAutoencoder, cache: ActivationCache) -> LinearMap:
    """b*, the map from x to the dictionary's error without an intercept, fitted on a cache's training rows."""
    moments = Moments.zeros(cache.d_in, cache.d_in)
    for batch in cache.batches("train", _ROWS):
        x = batch.x.float().to(sae.W_dec.device)
        moments.update(x, x - sae(x))
    return fit_linear(moments, intercept=False)


def write_error_part(
    path: str | Path, sae: SparseAutoencoder, cache: ActivationCache, b: LinearMap, part: Part, dtype: str = "float32"
) -> ActivationCache:
    """Write one part of the error of a dictionary on a cache's rows as a cache of its own, row by row.

    The ordinary trainer takes it (``saekit train --cache``), and keeps the same rows for calibration and held out; give
    it a ``b`` of ``fit_error``, which has not seen those (arXiv 2410.14670).

    Args:
        path: the folder to write.
        sae: the dictionary.
        cache: activations that it was, or could have been, trained on.
        b: the map from x to the linear error.
        part: ``linear``: x b*; ``nonlinear``: x − x̂ − x b*.
        dtype: how it is stored.

    Raises:
        SaekitError: the folder holds something.
    """

    def batches() -> Iterator[ActivationBatch]:
        for start in range(0, len(cache), _ROWS):
            batch = cache.read(start, min(start + _ROWS, len(cache)))
            with torch.no_grad():
                x = batch.x.float().to(sae.W_dec.device)
                linear = b(x)
                error = linear if part == "linear" else x - sae(x) - linear
            yield batch._replace(x=error.cpu())

    provenance = {
        "error_part": part,
        "of_hook": cache.provenance.get("hook"),
        "of_model": cache.provenance.get("model"),
    }
    return ActivationCache.write(path, batches(), provenance, dtype=dtype, division=cache.division)
