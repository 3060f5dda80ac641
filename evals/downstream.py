"""What splicing the reconstruction into the model costs it in next-token prediction."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.activations import ContextBatch
from saekit.activations.attention import quick_attention, try_quick_attention
from saekit.activations.model import check_hook
from saekit.errors import SaekitError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Edit = Callable[[Float[Tensor, "m d"]], Float[Tensor, "m d"]]
MASK = "spliced at text positions, scored on the next tokens predicted there; the first, BOS and separators left out"


def edited_logits(
    model: TransformerBridge, hook: str, batch: ContextBatch, edit: Edit | None
) -> Float[Tensor, "b t v"]:
    """Logits of the model with ``edit`` applied to the activations at the kept positions of a hook point."""
    device = next(model.parameters()).device
    kept = batch.kept.to(device)

    def replace(activation: Tensor, hook: Any) -> Tensor:
        assert edit is not None
        changed = activation.clone()
        changed[kept] = edit(activation[kept].flatten(1)).to(activation.dtype).reshape(activation[kept].shape)
        return changed

    hooks = [] if edit is None else [(hook, replace)]
    try_quick_attention(model)
    with torch.no_grad(), quick_attention(model, hook), model.hooks(fwd_hooks=hooks):
        logits: Tensor = model(batch.tokens.to(device), return_type="logits")
    return logits.float()


def scored_positions(batch: ContextBatch) -> Bool[Tensor, "b t-1"]:
    """Positions whose next token counts: kept ones that are not the last; the target may be a true end of text."""
    return batch.kept[:, :-1]


def scored_predictions(
    logits: Float[Tensor, "b t v"], batch: ContextBatch
) -> tuple[Float[Tensor, "m v"], Int[Tensor, "m"]]:
    """Log-probabilities at the scored positions, and the tokens that follow there."""
    scored = scored_positions(batch)
    log_p = logits[:, :-1][scored.to(logits.device)].log_softmax(-1)
    return log_p, batch.tokens[:, 1:][scored].to(logits.device)


class Costs(NamedTuple):
    """Nats a token, by edit.

    Attributes:
        tokens: predictions scored.
        ce: cross-entropy under each edit.
        kl: mean KL(clean ‖ edited), for the edits that were asked for.
    """

    tokens: int
    ce: dict[str, float]
    kl: dict[str, float]


def costs(
    model: TransformerBridge,
    hook: str,
    contexts: Iterable[ContextBatch],
    edits: Mapping[str, Edit | None],
    divergence: Sequence[str] = (),
) -> Costs:
    """Cross-entropy of next tokens under several edits of the activations at the kept positions.

    Args:
        model: the hooked model.
        hook: the hook point.
        contexts: held-out text.
        edits: what is put in place of x; None, under the name ``clean`` and first, leaves the model as it is.
        divergence: of which edits to take KL too.

    Raises:
        SaekitError: the model has no such hook, or there is no text to score.
    """
    check_hook(model, hook)
    ce, kl = dict.fromkeys(edits, 0.0), dict.fromkeys(divergence, 0.0)
    tokens = 0
    for batch in contexts:
        tokens += int(scored_positions(batch).sum())
        clean: Tensor | None = None
        for name, edit in edits.items():
            log_p, targets = scored_predictions(edited_logits(model, hook, batch, edit), batch)
            ce[name] -= float(log_p.gather(1, targets[:, None]).cpu().double().sum())
            if name == "clean":
                clean = log_p
            elif name in kl:
                assert clean is not None
                kl[name] += float((clean.exp() * (clean - log_p)).sum(-1).cpu().double().sum())
    if not tokens:
        raise SaekitError("there is no held-out text to score")
    return Costs(tokens, *({name: total / tokens for name, total in sums.items()} for sums in (ce, kl)))


def downstream(
    model: TransformerBridge,
    hook: str,
    contexts: Iterable[ContextBatch],
    reconstruct: Edit,
    mean: Float[Tensor, "d"],
) -> dict[str, float | int | str]:
    """Next-token cross-entropy of the model as it is and with the hooked activations replaced.

    Args:
        model: the hooked model.
        hook: the hook point.
        contexts: held-out text.
        reconstruct: x ↦ x̂ on [m, d].
        mean: [d] what mean ablation puts in place of the activations.

    Returns:
        tokens: predictions scored; mask: which those are.
        ce_clean, ce_reconstructed, ce_zero, ce_mean: nats a token, with x, x̂, 0 and the mean activation.
        ce_increase: ce_reconstructed − ce_clean.
        recovered_share: (ce_zero − ce_reconstructed) / (ce_zero − ce_clean).
        recovered_share_mean: the same against mean ablation, the stricter baseline.
        kl: mean KL(clean ‖ spliced) in nats a token.

    Raises:
        SaekitError: the model has no such hook, or there is no text to score.
    """
    edits: dict[str, Edit | None] = {
        "clean": None,
        "reconstructed": reconstruct,
        "zero": torch.zeros_like,
        "mean": lambda x: mean.to(x).expand_as(x),
    }
    tokens, ce, kl = costs(model, hook, contexts, edits, ["reconstructed"])
    increase = ce["reconstructed"] - ce["clean"]
    return {
        "tokens": tokens,
        "mask": MASK,
        "ce_clean": ce["clean"],
        "ce_reconstructed": ce["reconstructed"],
        "ce_zero": ce["zero"],
        "ce_mean": ce["mean"],
        "ce_increase": increase,
        "recovered_share": _recovered(increase, ce["zero"] - ce["clean"]),
        "recovered_share_mean": _recovered(increase, ce["mean"] - ce["clean"]),
        "kl": kl["reconstructed"],
    }


def _recovered(increase: float, damage: float) -> float:
    """1 − increase / damage; NaN where ablation does the model no damage."""
    return 1 - increase / damage if damage else math.nan
