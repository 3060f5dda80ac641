"""Activations together with the gradient of the model's next-token loss at them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from saekit.activations.attention import quick_attention, try_quick_attention
from saekit.activations.model import check_hook
from saekit.activations.placement import device_of, dtype_of
from saekit.activations.unembedding import Unembedding, next_tokens
from saekit.errors import SaekitError, first_line

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

LOSS = "next-token cross-entropy, summed over the context"
Labels = Literal["true", "sampled"]
_why: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()  # models that were asked whether they are causal


def with_gradients(
    model: TransformerBridge, hook: str, labels: Labels = "true", seed: int = 0
) -> Callable[[Int[Tensor, "b t"]], tuple[Float[Tensor, "b t d"], Float[Tensor, "b t d"]]]:
    """A forward and backward pass that gives the activations at a hook point and the loss's gradients there.

    The loss is the cross-entropy of each next token, summed over every position of the context (arXiv 2411.10397; the
    sum over the sequence is our reading). Nothing before the hook is differentiated.

    Args:
        model: the hooked model.
        hook: the hook point.
        labels: ``true`` next tokens of the text, or ``sampled`` from the model's own predictions.
        seed: of the sampling.

    Returns:
        A function from tokens [b, t] to activations and gradients [b, t, d], without a graph; further dimensions
        (heads) are flattened into d.

    Raises:
        SaekitError: there is no such hook, the model is not causal, or its loss does not depend on the hook.
    """
    check_hook(model, hook)
    try_quick_attention(model)
    check_causal(model)
    device = device_of(model)
    end = Unembedding.of(model, hook)
    generator = torch.Generator(device).manual_seed(seed)
    found: list[Tensor] = []

    def capture(activation: Tensor, hook: Any) -> Tensor:
        leaf = activation.detach().requires_grad_(True)
        found.append(leaf)
        return leaf

    def run(tokens: Tensor) -> tuple[Tensor, Tensor]:
        parts = [one_pass(part.to(device)) for part in torch.split(tokens, end.at_once(tokens.shape[1]))]
        x, gradient = (torch.cat(column) for column in zip(*parts, strict=True))
        return x, gradient

    def one_pass(tokens: Tensor) -> tuple[Tensor, Tensor]:
        found.clear()
        with torch.enable_grad(), quick_attention(model, hook):
            rows = end.before(tokens, [(hook, capture)])
            x = found[0] if found else None
            gradient = None
            if x is not None and rows.requires_grad:
                (gradient,) = torch.autograd.grad(rows, x, loss_gradient(rows, tokens), allow_unused=True)
        if x is None or gradient is None or x.shape[:2] != tokens.shape:
            raise SaekitError(f"the model's loss has no gradient for each token at the hook '{hook}'")
        return x.detach().flatten(2), gradient.flatten(2)

    def loss_gradient(rows: Tensor, tokens: Tensor) -> Tensor:
        """Of the loss with respect to the rows."""
        places, targets = next_tokens(tokens.to(rows.device))
        uniform = torch.rand(len(places), device=device, generator=generator, dtype=torch.float64).to(rows.device)
        flat = rows.detach().flatten(0, 1)
        gradient = torch.zeros_like(flat)
        for piece, wanted, draws in zip(*map(end.pieces, (places, targets, uniform)), strict=True):
            leaf = flat[piece].requires_grad_(True)
            logits = end.logits(leaf)
            if labels == "sampled":
                wanted = _sampled(logits.detach(), draws)
            (gradient[piece],) = torch.autograd.grad(cross_entropy(logits, wanted, reduction="sum"), leaf)
        return gradient.view_as(rows)

    return run


def _sampled(logits: Float[Tensor, "m v"], uniform: Float[Tensor, "m"]) -> Int[Tensor, "m"]:
    """A token drawn from each row's predictions, by a number from 0 to 1."""
    below = logits.softmax(-1).double().cumsum_(-1)
    return torch.searchsorted(below, uniform[:, None] * below[:, -1:], right=True)[:, 0].clamp_max(len(below[0]) - 1)


def check_causal(model: TransformerBridge) -> None:
    """Raise SaekitError where a prediction depends on later tokens, or the model predicts none (``not_causal``)."""
    if why := not_causal(model):
        raise SaekitError(f"{why}, so no gradients are taken")


def not_causal(model: TransformerBridge) -> str | None:
    """Why next-token figures mean nothing for this model; None where they do mean something.

    The model itself is asked, once: other tokens in the second half must leave the predictions in the first half as
    they are, but for what the rounding of its dtype explains.
    """
    if model not in _why:
        _why[model] = _ask(model)
    return _why[model]


def _ask(model: TransformerBridge) -> str | None:
    tokens = torch.arange(1, 9, device=device_of(model))[None] % int(model.cfg.d_vocab)
    other = torch.cat([tokens[:, :4], tokens[:, 4:].flip(1)], dim=1)
    try:
        with torch.no_grad():
            first, second = (model(each, return_type="logits")[:, :4].float() for each in (tokens, other))
    except Exception as error:  # encoders and encoder-decoders fail in many ways
        return f"the model predicts no next tokens: {first_line(error)}"
    tolerance = max(1e-5, 4 * torch.finfo(dtype_of(model)).eps)
    if torch.allclose(first, second, rtol=0, atol=tolerance * float(first.abs().max())):
        return None
    return "the model is not causal: its predictions depend on later tokens"
