"""Dictionaries of random weights, for tests of what does not ask for trained ones."""

from __future__ import annotations

import torch

from saekit import SAEConfig, SparseAutoencoder


def dictionary(architecture, *, d_in=8, d_sae=32, dtype=torch.float32, **extra):
    torch.manual_seed(1)
    k = 4 if architecture == "topk" else None
    sae = SparseAutoencoder(SAEConfig(d_in, d_sae, architecture, k, **extra), dtype)
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn(p.shape))
        if sae.threshold is not None:
            sae.threshold.copy_(torch.rand(d_sae) * 3)
    return sae


def near(found, expected):
    """Equal to 1e-5 of the largest entry."""
    assert float((found.double() - expected.double()).abs().max()) <= 1e-5 * float(expected.abs().max())
