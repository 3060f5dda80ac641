"""Dictionaries to splice in, and what a model says."""

from __future__ import annotations

import torch

from saekit import SAEConfig, SparseAutoencoder

HOOK, MODULE = "blocks.1.hook_resid_post", "model.layers.1"


def dictionary(x, architecture="topk", width=512, seed=0):
    """Untrained, but at home at these activations [n, d]: random directions about their mean."""
    d = x.shape[1]
    normalised = architecture == "layer_norm"
    rule = "topk" if normalised else architecture
    k, facts = (16 if rule == "topk" else None), {"hook_name": HOOK}
    sae = SparseAutoencoder(
        SAEConfig(d, width, rule, k=k, input_normalization="layer_norm" if normalised else "none", metadata=facts)
    )
    directions = torch.randn(width, d, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        sae.W_dec.copy_(directions / directions.norm(dim=1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_dec.copy_(sae.normalised(x)[0].mean(0))
        if sae.threshold is not None:
            sae.threshold.copy_(sae.pre_activations(x).quantile(0.97, dim=0))
    return sae


def at(model, tokens, hook, **options):
    """What a pass of the bridge has at a hook."""
    with torch.no_grad():
        return model.run_with_cache(tokens, names_filter=hook, **options)[1][hook]


def logits(model, tokens):
    with torch.no_grad():
        found = model(tokens)
    return found if isinstance(found, torch.Tensor) else found.logits


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def strongest(sae, x):
    """The feature that is active most often at positions of text."""
    return int(sae.encode_sparse(x[:, 1:]).matches_per_feature().argmax())
