"""Which positions of a model's pass hold text, from what the model is called with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Bool


def call_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names; the first one is ``input_ids``, whatever its name."""
    names = list(inspect.signature(module.forward).parameters) if len(args) > 1 else []
    return {**dict(zip(names, args, strict=False)), **({"input_ids": args[0]} if args else {}), **kwargs}


def token_ids(call: Mapping[str, Any]) -> Tensor | None:
    """The token ids that a model is called with, if it is called with any."""
    ids = call.get("input_ids")
    return ids if isinstance(ids, Tensor) and not ids.is_floating_point() else None


def text_positions(call: Mapping[str, Any], bos: int | None) -> Bool[Tensor, "b t"] | None:
    """The positions of text in a pass: not the first of a context, not BOS, not padding.

    Later passes of a generation continue a context, so their first position is none of a context.

    Args:
        call: the arguments of the pass, among them the cache of earlier ones and the mask of padding, where there are.
        bos: id of BOS, if the model has one.

    Returns:
        The mask; None where the model is called with neither token ids nor embeddings.
    """
    ids, embeddings = token_ids(call), call.get("inputs_embeds")
    over = ids if ids is not None else embeddings if isinstance(embeddings, Tensor) else None
    if over is None or over.ndim < 2:
        return None
    rows, length = over.shape[:2]
    given = call.get("attention_mask")
    mask = given.to(over.device) != 0 if isinstance(given, Tensor) and given.ndim == 2 else None
    past = _past(call, mask.shape[1] - length if mask is not None else 1)
    columns = torch.arange(past, past + length, device=over.device)
    if mask is None or mask.shape[1] < past + length:  # no mask, or one of this pass alone
        begins, text = torch.zeros(rows, dtype=torch.long, device=over.device), None
    else:
        begins, text = mask.int().argmax(1), mask[:, past : past + length]
    kept = columns[None] != begins[:, None]
    places = call.get("position_ids")
    if isinstance(places, Tensor) and places.shape == over.shape[:2]:
        kept = kept & (places != 0)  # contexts that lie in one row, each with positions of its own
    if ids is not None and bos is not None:
        kept = kept & (ids != bos)
    return kept if text is None else kept & text


def _past(call: Mapping[str, Any], unknown: int) -> int:
    """How many positions earlier passes have left in the cache.

    Args:
        call: the arguments of the pass.
        unknown: how many where there is a cache, but it does not tell.
    """
    if isinstance(position := call.get("cache_position"), Tensor) and position.numel():
        return int(position.flatten()[0])
    cache = next((call[name] for name in ("past_key_values", "cache_params") if call.get(name) is not None), None)
    if cache is None:
        return 0
    if isinstance(cache, tuple | list):  # of transformers before its classes of caches: keys [b, heads, past, d]
        return int(cache[0][0].shape[-2]) if cache and cache[0] is not None else 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, TypeError, ValueError, NotImplementedError):  # a state-space model's has no length
        used = getattr(cache, "has_previous_state", True)
        return max(unknown, 1) if (used() if callable(used) else used) else 0
