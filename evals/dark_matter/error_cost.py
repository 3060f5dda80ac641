"""What each part of a dictionary's error costs the model: cross-entropy with it put back."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.activations import ContextBatch
from saekit.evals.costs import costs
from saekit.evals.dark_matter.least_squares import LinearMap
from saekit.evals.dark_matter.splits import in_test_half
from saekit.evals.passage import Edit

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

PARTS = ("linear", "nonlinear")
_LEAST = 1e-4  # nats; shares of less are noise
MASK = "spliced and scored at the kept positions of documents that b* was not fitted on"


def error_downstream(
    model: TransformerBridge,
    hook: str,
    contexts: Iterable[ContextBatch],
    reconstruct: Edit,
    b: LinearMap,
) -> dict[str, Any]:
    """Cross-entropy with x̂, with x̂ + linear error and with x̂ + nonlinear error spliced in (arXiv 2410.14670).

    Args:
        model: the hooked model.
        hook: the hook point.
        contexts: text that b was not fitted on, see ``only_tested``.
        reconstruct: x ↦ x̂ on [m, d].
        b: the map from x to the linear error.

    Returns:
        tokens, documents: predictions scored, and documents they are of; mask: which those are. What follows has its
        standard error over documents beside it, as NAME_se; b is taken as it is.
        ce_clean, ce_reconstructed, ce_linear, ce_nonlinear: nats a token of the model as it is, with x̂, with
        x̂ + linear, with x̂ + nonlinear.
        recovered_linear, recovered_nonlinear: (CE_x̂ − CE) / (CE_x̂ − CE_clean) with that part of the error put back;
        None where x̂ costs less than a ten-thousandth of a nat.

    Raises:
        SaekitError: the model has no such hook, or there is no text to score.
    """

    def linear(x: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
        return b(x.float()).to(x)

    edits: dict[str, Edit | None] = {
        "clean": None,
        "reconstructed": reconstruct,
        "linear": lambda x: reconstruct(x).to(x) + linear(x),
        "nonlinear": lambda x: x - linear(x),
    }
    found = costs(model, hook, contexts, edits)

    def figures(sums: Tensor) -> dict[str, Tensor]:
        nats = found.means(sums)
        lost = nats["ce_reconstructed"] - nats["ce_clean"]
        lost = lost.where(lost > _LEAST, math.nan)
        shares = {f"recovered_{part}": (nats["ce_reconstructed"] - nats[f"ce_{part}"]) / lost for part in PARTS}
        return {**nats, **shares}

    result = {name: _or_none(value) for name, value in found.sums.figures(figures).items()}
    return {"tokens": found.tokens, "documents": found.sums.documents, "mask": MASK, **result}


def _or_none(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def only_tested(contexts: ContextBatch, seed: int = 0) -> ContextBatch:
    """The contexts with only those positions kept whose documents are in the half to test on."""
    return contexts._replace(
        kept=contexts.kept & in_test_half(contexts.documents.flatten(), seed).reshape(contexts.kept.shape)
    )


def without_start(contexts: ContextBatch, share: float = 0.2) -> ContextBatch:
    """The contexts with the positions kept that the paper keeps: not the first fifth, nor the last one.

    The paper keeps 200 to 1022 of 1024; here the same shares of any length. The last position has no next token.

    Args:
        contexts: packed text.
        share: of the context to leave out at its start.
    """
    length = contexts.kept.shape[1]
    positions = torch.arange(length)
    return contexts._replace(kept=contexts.kept & (positions >= share * length) & (positions < length - 1))
