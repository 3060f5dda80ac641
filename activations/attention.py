"""The model's own attention in place of TransformerLens's, where nobody looks inside it.

TransformerLens computes attention step by step, so that hooks can see patterns and scores. Where no hook is there, the
model's own attention with torch's fused kernel gives the same, half as fast again for the whole pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from saekit.activations.placement import device_of, dtype_of

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_SDPA = "sdpa"
_quick: WeakKeyDictionary[nn.Module, list[nn.Module]] = WeakKeyDictionary()  # the attentions that can be replaced


def try_quick_attention(model: TransformerBridge) -> None:
    """See once whether the model predicts the same with its own attention; call it while nothing hooks into it."""
    if model not in _quick:
        _quick[model] = _replaceable(model)


@contextmanager
def quick_attention(model: TransformerBridge, *hooks: str) -> Iterator[None]:
    """Run the model's own attention while it is entered, where that was tried, unless something hooks into it.

    Args:
        model: the hooked model.
        hooks: the hook points that are about to be used.
    """
    attentions = _quick.get(model, [])
    points = {point for attention in attentions for point in attention.modules()}
    if any(model.hook_dict.get(hook) in points for hook in hooks) or any(_hooked(point) for point in points):
        attentions = []
    with _replaced(model, attentions):
        yield


def _hooked(module: nn.Module) -> bool:
    return bool(getattr(module, "fwd_hooks", None) or getattr(module, "bwd_hooks", None))


@contextmanager
def _replaced(model: TransformerBridge, attentions: list[nn.Module]) -> Iterator[None]:
    """Calls of the attentions go to the modules that they wrap."""
    if not attentions:
        yield
        return
    configs = [model.original_model.config, *(attention.original_component.config for attention in attentions)]  # type: ignore[union-attr]
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = _SDPA
        for attention in attentions:
            vars(attention)["forward"] = attention.original_component.forward  # type: ignore[union-attr]
        yield
    finally:
        for attention in attentions:
            vars(attention).pop("forward", None)
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


def _replaceable(model: TransformerBridge) -> list[nn.Module]:
    """The model's attentions, if it predicts the same with its own ones; else none."""
    from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

    attentions = [m for m in model.original_model.modules() if isinstance(m, AttentionBridge)]
    if any("forward" in vars(attention) for attention in attentions):  # somebody has replaced it already
        return []
    length = min(int(model.cfg.n_ctx), 256)
    tokens = torch.arange(length, device=device_of(model))[None] % int(model.cfg.d_vocab)

    def logits() -> Tensor:
        with torch.no_grad():
            return torch.as_tensor(model(tokens, return_type="logits")).float()

    try:
        expected = logits()
        with _replaced(model, attentions):
            found = logits()
    except Exception:  # models that no adapter knows fail in many ways, and then keep what works
        return []
    size = float(expected.norm())
    tolerance = max(1e-4, 2 * torch.finfo(dtype_of(model)).eps)
    return attentions if float(expected.sub_(found).norm()) <= tolerance * size else []  # no third copy
