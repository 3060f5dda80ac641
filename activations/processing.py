"""Weights of a hooked model, processed as TransformerLens does on request, and tried."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.activations.placement import device_of, dtype_of
from saekit.errors import SaekitError, did_you_mean, first_line
from saekit.processing import OPTIONS

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_PROBE = 32  # tokens


def process(model: TransformerBridge, options: Sequence[str]) -> None:
    """Process a model's weights in place; afterwards it tells so to ``saekit.processing.applied_to``.

    ``center_writing_weights``: all that is written to the residual stream has mean zero (models with layer norm alone;
    with an RMS norm nothing changes, as in TransformerLens). ``fold_ln``: the weights of norms move into what reads
    them. ``fold_value_biases``: value biases move into the attention's output. ``center_unembed``: logits have mean
    zero.

    Raises:
        SaekitError: an option is not known, or cannot be had with this model: TransformerLens refuses, or predictions
            would change.
    """
    options = [options] if isinstance(options, str) else options
    for option in options:
        if option not in OPTIONS:
            raise SaekitError(f"unknown processing '{option}'{did_you_mean(option, OPTIONS)}")
        if not getattr(model.adapter, f"supports_{option}", True):
            raise _refusal(model, option, "TransformerLens does not do it with this kind of model")
    if "refactor_factored_attn_matrices" in options:
        raise _refusal(model, "refactor_factored_attn_matrices", "its factors are not unique")
    if options:
        names = ", ".join(options)
        try:
            before = _predictions(model)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.process_weights(**{option: option in options for option in OPTIONS})
            change = float((_predictions(model) - before).norm() / before.norm())
        except Exception as error:  # it was made for some kinds of models, and fails in many ways for others
            raise _refusal(model, names, first_line(error)) from error
        if not change <= max(1e-3, 8 * torch.finfo(dtype_of(model)).eps):
            raise _refusal(model, names, f"its predictions would change by {change:.1%}")
        model.requires_grad_(False)
    model.processing = tuple(option for option in OPTIONS if option in options)


def _refusal(model: TransformerBridge, names: str, why: str) -> SaekitError:
    return SaekitError(f"{names} cannot be had with the model '{model.cfg.model_name}': {why}")


@torch.no_grad()
def _predictions(model: TransformerBridge) -> Float[Tensor, "t v"]:
    """Log-probabilities of next tokens, which no processing changes."""
    tokens = torch.arange(min(_PROBE, int(model.cfg.n_ctx)), device=device_of(model))
    logits: Tensor = model(tokens[None] % int(model.cfg.d_vocab), return_type="logits")
    return logits[0].float().log_softmax(-1)
