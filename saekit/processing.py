"""Processing of a model's weights: its predictions stay, and what its hook points hold changes.

TransformerLens does it where it is asked to, and a dictionary's metadata tell on what it was trained (as SAELens writes
them, under ``model_from_pretrained_kwargs``). What they do not name was not done.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from saekit.errors import SaekitWarning

if TYPE_CHECKING:
    from saekit.sae import SparseAutoencoder

OPTIONS = (
    *("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases", "refactor_factored_attn_matrices"),
)
KWARGS = "model_from_pretrained_kwargs"
_ATTENTION = "refactor_factored_attn_matrices"  # changes queries, keys, values and what is mixed of them
_LOGITS = "center_unembed"  # changes a constant over the vocabulary, and no hook point before it


def asked_for(metadata: Mapping[str, Any], hook: str) -> tuple[str, ...]:
    """The processing of the model that a dictionary was trained on, as far as it may matter at a hook point."""
    kwargs = metadata.get(KWARGS)
    asked = [option for option in OPTIONS if isinstance(kwargs, Mapping) and kwargs.get(option) is True]
    return tuple(option for option in asked if option != _ATTENTION or ".attn." in hook)


def applied_to(model: Any) -> tuple[str, ...] | None:
    """The processing of a model; None where something was done that it does not tell."""
    if isinstance(applied := getattr(model, "processing", None), tuple):  # what ``load_model`` leaves there
        return applied
    return None if getattr(model, "_weights_processed", False) else ()


def warn_of_processing(sae: SparseAutoencoder, model: Any, hook: str, stacklevel: int = 3) -> None:
    """Warn where a dictionary was trained on a model processed otherwise than this one, if this one can tell."""
    asked, applied = asked_for(sae.cfg.metadata, hook), applied_to(model)
    if applied is None:
        return
    nothing = {_LOGITS}
    if str(getattr(getattr(model, "cfg", None), "normalization_type", "")).startswith("RMS"):
        nothing.add("center_writing_weights")
    for options, told in (
        (set(asked) - set(applied), "was trained on a model with {}, which this one lacks"),
        (set(applied) - set(asked), "was not trained on a model with {}, which this one has"),
    ):
        if names := ", ".join(sorted(options - nothing)):
            warnings.warn(
                f"the dictionary {told.format(names)}: activations may differ; "
                f"load_model(..., processing={list(asked)!r}) gives its own",
                SaekitWarning,
                stacklevel=stacklevel,
            )
