"""One update by Adam (arXiv 1412.6980), in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from saekit.kernels.ops import ANY, operation

if TYPE_CHECKING:
    from jaxtyping import Float

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


@operation
def adam_update(
    W: Float[Tensor, "*shape"],
    grad: Float[Tensor, "*shape"],
    first: Float[Tensor, "*shape"],
    second: Float[Tensor, "*shape"],
    steps: int,
    lr: float,
    scale: Float[Tensor, ""] | None = None,
) -> None:
    """Change W and its moments by a gradient, which may be scaled in place.

    Args:
        W, grad, first, second: the numbers, their gradient, its first and second moment.
        steps: taken before this one.
        lr: the learning rate.
        scale: what the gradient is divided by first.
    """
    g = grad if scale is None else grad / scale
    first.mul_(BETA1).add_(g, alpha=1 - BETA1)
    second.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
    mean, square = first / (1 - BETA1 ** (steps + 1)), second / (1 - BETA2 ** (steps + 1))
    W.sub_(lr * mean / (square.sqrt() + EPS))


@adam_update.on("cpu", "cuda")
def _fused(
    W: Tensor, grad: Tensor, first: Tensor, second: Tensor, steps: int, lr: float, scale: Tensor | None = None
) -> None:
    _torchs(W, grad, first, second, steps, lr, fused=True, grad_scale=scale)


@adam_update.on(ANY)
def _unfused(
    W: Tensor, grad: Tensor, first: Tensor, second: Tensor, steps: int, lr: float, scale: Tensor | None = None
) -> None:
    _torchs(W, grad if scale is None else grad / scale, first, second, steps, lr, fused=False, grad_scale=None)


def _torchs(W: Tensor, grad: Tensor, first: Tensor, second: Tensor, steps: int, lr: float, **how: Any) -> None:
    settings: dict[str, Any] = {"amsgrad": False, "beta1": BETA1, "beta2": BETA2, "eps": EPS, "weight_decay": 0.0}
    adam(
        [W],
        [grad],
        [first],
        [second],
        [],
        [torch.tensor(float(steps), device=W.device)],  # torch counts this step in it
        found_inf=None,
        lr=lr,
        maximize=False,
        **settings,
        **how,
    )
