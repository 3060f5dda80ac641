"""Plain token ids, padded or not, as contexts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saekit.activations.gradients import not_causal
from saekit.activations.model import context_length_of
from saekit.activations.tokens import PADDING, ContextBatch, without_first
from saekit.errors import SaekitError, SaekitWarning, first_line
from saekit.finite import place_of
from saekit.special_tokens import special_tokens

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def contexts_of(
    model: TransformerBridge, tokens: Any, *, kept: Any = None, attention_mask: Any = None, stacklevel: int = 2
) -> ContextBatch:
    """Contexts of plain token ids, each row a document of its own.

    Rows that are padded on the left are turned so that their text stands first: a model that looks back alone, and
    counts positions from the first token of the text, computes the same of them then, without a mask.

    Args:
        model: the hooked model that the ids are of.
        tokens: [c, t] token ids, or what a tokenizer gives: a mapping with ``input_ids`` and ``attention_mask``.
        kept: [c, t] positions that hold text; all that are no padding if not given. The first of each text is left out
            in any case.
        attention_mask: [c, t] which positions are no padding, as tokenizers give it; text stands in one piece.
        stacklevel: of the warning, where the pad token stands at the ends of rows and no mask says that it is padding.

    Raises:
        SaekitError: the ids are none of the model's, shapes do not fit, the mask has gaps, or the model looks ahead, so
            that padding changes what it computes of the text.
    """
    if isinstance(tokens, Mapping):
        attention_mask = tokens.get("attention_mask") if attention_mask is None else attention_mask
        tokens = tokens.get("input_ids")
    tokens = _whole_numbers(tokens)
    if tokens.ndim != 2:
        raise SaekitError(f"tokens are contexts [c, t], not of shape {list(tokens.shape)}")
    if tokens.shape[1] > (longest := context_length_of(model)):
        raise SaekitError(
            f"contexts of {tokens.shape[1]:,} tokens are longer than the {longest:,} that the model takes"
        )
    outside = (tokens < 0) | (tokens >= int(model.cfg.d_vocab))
    if outside.any():
        at = place_of(outside)
        raise SaekitError(f"token id {int(tokens[tuple(at)])} at {at} is none of the model's {model.cfg.d_vocab:,}")
    real = _mask(attention_mask, "attention_mask", tokens)
    kept = _mask(kept, "kept", tokens)
    if attention_mask is None:
        _warn_of_padding(tokens, kept, special_tokens(model).pad, stacklevel + 1)
    elif not real.all():
        if (real[:, 1:] & ~real[:, :-1]).sum(1).add(real[:, 0].long()).max() > 1:
            raise SaekitError("attention_mask has gaps amid the text of a row; kept= leaves positions out of figures")
        if why := not_causal(model):
            raise SaekitError(f"padding changes what this model computes: {why}; give contexts of one length")
        order = (~real).long().argsort(dim=1, stable=True)  # text first, padding last
        tokens, kept, real = (column.gather(1, order) for column in (tokens, kept, real))
    documents = torch.arange(len(tokens))[:, None].expand_as(tokens).masked_fill(~real, PADDING)
    return ContextBatch(tokens, documents, without_first(kept & real, 1))


def as_contexts(model: TransformerBridge, tokens: Any, **masks: Any) -> ContextBatch:
    """``contexts_of``, for what calls it in turn; contexts themselves are taken as they are.

    Raises:
        SaekitError: as ``contexts_of``, or there are masks beside contexts, which know their text.
    """
    if not hasattr(model, "hook_dict"):
        raise SaekitError(
            f"a {type(model).__name__} has no hooks; saekit.activations.load_model gives a model that has"
        )
    if not isinstance(tokens, ContextBatch):
        return contexts_of(model, tokens, **masks, stacklevel=4)
    for name, mask in masks.items():
        if mask is not None:
            raise SaekitError(f"{name} is for plain token ids; a ContextBatch says itself what is kept")
    return tokens


def _whole_numbers(tokens: Any) -> Int[Tensor, "..."]:
    if isinstance(tokens, str) or (isinstance(tokens, list) and any(isinstance(row, str) for row in tokens)):
        raise SaekitError("tokens are ids, not text; give what the model's tokenizer makes of it")
    try:
        found = torch.as_tensor(tokens).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        told = f"tokens are ids [c, t], rows of one length (pad them, and give attention_mask): {first_line(error)}"
        raise SaekitError(told) from None
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise SaekitError(f"tokens are whole numbers, not {str(found.dtype).removeprefix('torch.')}")
    return found.long()


def _mask(given: Any, name: str, tokens: Tensor) -> Bool[Tensor, "c t"]:
    if given is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    found = torch.as_tensor(given).cpu().bool()
    if found.shape != tokens.shape:
        raise SaekitError(f"{name} of shape {list(found.shape)} does not fit tokens of shape {list(tokens.shape)}")
    return found


def _warn_of_padding(tokens: Tensor, kept: Tensor, pad: int | None, stacklevel: int) -> None:
    """Warn where the pad token ends or begins rows and counts as text; one alone may be BOS or EOS."""
    if pad is None:
        return
    padding = (tokens == pad).long()
    runs = {"end": padding.flip(1).cumprod(1).flip(1), "start": padding.cumprod(1)}
    for where, run in runs.items():
        counted = run.bool() & (run.sum(1, keepdim=True) > 1) & kept
        if count := int(counted.sum()):
            warnings.warn(
                f"{count:,} tokens at the {where} of {int(counted.any(1).sum()):,} rows hold the pad token (id {pad}) "
                f"and are taken for text; where they are padding, give attention_mask=, as the tokenizer gives it",
                SaekitWarning,
                stacklevel=stacklevel,
            )
