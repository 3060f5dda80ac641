"""Adam for a dictionary whose decoder rows keep unit norm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from saekit.kernels.adam import adam_update
from saekit.kernels.devices import rows_in_cache
from saekit.sae import SparseAutoencoder

DICTIONARY = ("W_enc", "b_enc", "W_dec", "b_dec")


def learning_rate(step: int, steps: int, peak: float, warmup: float, decay: float) -> float:
    """Linear warm-up over the first share of the steps, linear decay to zero over the last."""
    rise = (step + 1) / max(1.0, warmup * steps)
    fall = (steps - step) / max(1.0, decay * steps)
    return peak * min(1.0, rise, fall)


class DictionaryAdam:
    """Adam on all parameters, learned ones of the variant too; the decoder's rows keep unit norm.

    Its gradient is projected, and its rows are renormalised after each step.

    The arithmetic is torch's own. Matrices are updated in blocks of rows, so that what is read again is still in the
    cache: as fast as compiled code, without a compiler.

    Attributes:
        steps: taken so far.
        parameters: all that it updates, by name.
        moments: first and second moment of every parameter, by its name.
    """

    def __init__(self, sae: SparseAutoencoder, clip: float, learned: Mapping[str, Tensor] | None = None) -> None:
        """Begin with moments of zero.

        Args:
            sae: the dictionary.
            clip: largest norm of the gradient of all parameters together.
            learned: further parameters by name, none of the dictionary's.
        """
        self.sae, self.clip = sae, clip
        self.steps = 0
        self.parameters: dict[str, Tensor] = {**dict(sae.named_parameters()), **(learned or {})}
        self.moments = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in self.parameters.items()}

    @torch.no_grad()
    def begin_step(self, *, overwritten: bool) -> None:
        """Make every ``grad`` ready for a step.

        Args:
            overwritten: whether the first term writes those of the dictionary, so that they need no zeros.
        """
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            if not (overwritten and name in DICTIONARY):
                parameter.grad.zero_()

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """One update from every parameter's ``grad``; returns the norm after projection and before clipping.

        A norm that is not finite is returned without an update.
        """
        norm = float(self._project())
        if not norm < float("inf"):
            return norm
        scale = torch.tensor(norm / self.clip, device=self.parameters["W_dec"].device) if norm > self.clip else None
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None
            for W, grad, first, second in _blocks(parameter, parameter.grad, *self.moments[name]):
                adam_update(W, grad, first, second, self.steps, lr, scale)
                if name == "W_dec":
                    W.div_(torch.linalg.vector_norm(W, dim=1, keepdim=True))
        self.steps += 1
        return norm

    def _project(self) -> Tensor:
        """Take from the decoder's gradient what lies along its rows, whose norm is fixed; returns the norm of all."""
        squares = self.parameters["W_dec"].new_zeros(())
        for name, parameter in self.parameters.items():
            for W, grad in _blocks(parameter, parameter.grad):
                if name == "W_dec":
                    grad.addcmul_((grad * W).sum(1, keepdim=True), W, value=-1)
                squares += grad.flatten().dot(grad.flatten())
        return squares.sqrt()

    def state_dict(self) -> dict[str, Any]:
        """Steps and moments, for a checkpoint."""
        return {"steps": self.steps, "moments": self.moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
        self.steps = int(state["steps"])
        for name, moments in state["moments"].items():
            for mine, other in zip(self.moments[name], moments, strict=True):
                mine.copy_(other)


def _blocks(*tensors: Tensor | None) -> Iterator[list[Tensor]]:
    """Tensors of one shape in the same blocks of rows; a matrix that is stored transposed is taken by its columns."""
    rows = [t if t is None or t.is_contiguous() else t.T for t in tensors]
    first = rows[0]
    assert first is not None
    step = rows_in_cache(first.device, len(first), first[0].numel()) if first.ndim > 1 else len(first)
    for start in range(0, len(first), step):
        yield [t[start : start + step] for t in rows if t is not None]
