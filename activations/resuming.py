"""Passes that start in the middle of a model: the layers before a hook give what an earlier pass had there.

What is put in place of an activation changes nothing before it, so many passes over the same text need the layers
before the hook once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.activations.placement import device_of, dtype_of

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_before: WeakKeyDictionary[nn.Module, dict[str, list[nn.Module]]] = WeakKeyDictionary()


def layers_before(model: TransformerBridge, hook: str) -> list[nn.Module]:
    """The model's own layers that end before the hook point is reached, where passes can start after them.

    That is seen once, by whether the model predicts the same; call it while nothing is hooked. None where they cannot:
    a model may look at its early layers again.
    """
    known = _before.setdefault(model, {})
    if hook not in known:
        known[hook] = _found(model, hook)
    return known[hook]


@contextmanager
def recorded_start(layers: Sequence[nn.Module]) -> Iterator[list[Float[Tensor, "b t d"]]]:
    """While it is entered, what passes have after these layers is left in the list."""
    found: list[Tensor] = []
    handles = [layers[-1].register_forward_hook(lambda *call: found.append(call[-1]))] if layers else []
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def resumed(layers: Sequence[nn.Module], start: Float[Tensor, "b t d"] | None) -> Iterator[None]:
    """While it is entered, passes do not run these layers and have ``start`` after them; with None they run all.

    So they do where somebody, as accelerate does, has replaced what one of the layers runs.
    """
    replaced = [] if start is None or any("forward" in vars(layer) for layer in layers) else layers
    try:
        for layer in replaced:
            vars(layer)["forward"] = lambda *args, **kwargs: start
        yield
    finally:
        for layer in replaced:
            vars(layer).pop("forward", None)


def _found(model: TransformerBridge, hook: str) -> list[nn.Module]:
    wrapped = (getattr(block, "original_component", None) for block in getattr(model, "blocks", []))
    layers = [layer for layer in wrapped if layer is not None]
    ended: list[nn.Module] = []
    before: list[list[nn.Module]] = []
    outputs: list[Any] = []

    def ends(layer: nn.Module, args: Any, output: Any) -> None:
        ended.append(layer)
        outputs.append(output)

    def reached(activation: Any, hook: Any) -> None:
        before.append(list(ended))

    length = min(int(model.cfg.n_ctx), 64)
    tokens = torch.arange(length, device=device_of(model))[None] % int(model.cfg.d_vocab)

    def logits(tokens: Tensor, *hooks: tuple[str, Callable[..., None]]) -> Tensor:
        with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
            return torch.as_tensor(model(tokens, return_type="logits")).float()

    handles = [layer.register_forward_hook(ends) for layer in layers]
    try:
        expected = logits(tokens, (hook, reached))
    except Exception:  # models that no adapter knows fail in many ways, and then run all of it
        return []
    finally:
        for handle in handles:
            handle.remove()
    if not before or not before[0] or not all(isinstance(output, Tensor) for output in outputs):
        return []
    found = before[0]
    try:
        logits(tokens.flip(1))  # what layers may remember of the pass before
        with resumed(found, outputs[len(found) - 1]):
            again = logits(tokens)
    except Exception:
        return []
    tolerance = max(1e-5, 2 * torch.finfo(dtype_of(model)).eps)
    return found if float((again - expected).norm()) <= tolerance * float(expected.norm()) else []
