"""The model by the bridge and without, a few tokens, and dictionaries that are at home there."""

from __future__ import annotations

import pytest
import torch
from spliced import HOOK, at, dictionary
from transformers import AutoModelForCausalLM

from saekit.activations.model import load_model, model_path


@pytest.fixture(scope="module")
def model():
    return load_model(device="cpu")


@pytest.fixture(scope="module")
def plain():
    return AutoModelForCausalLM.from_pretrained(
        model_path("embedded"), dtype=torch.float32, attn_implementation="eager"
    ).requires_grad_(False)


@pytest.fixture(scope="module")
def tokens(contexts):
    return contexts.tokens[:3, :48]


@pytest.fixture(scope="module")
def x(model, tokens):
    """[b, t, d] at the hook."""
    return at(model, tokens, HOOK)


@pytest.fixture(scope="module", params=["topk", "jumprelu", "layer_norm"])
def sae(request, x):
    return dictionary(x[:, 1:].flatten(0, 1), request.param)
