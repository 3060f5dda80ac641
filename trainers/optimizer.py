"""Adam for a dictionary whose decoder rows keep unit norm."""

from __future__ import annotations

import torch

from saekit.sae import SparseAutoencoder


def learning_rate(step: int, steps: int, peak: float, warmup: float, decay: float) -> float:
    """Linear warm-up over the first share of the steps, linear decay to zero over the last."""
    rise = (step + 1) / max(1.0, warmup * steps)
    fall = (steps - step) / max(1.0, decay * steps)
    return peak * min(1.0, rise, fall)


class DictionaryAdam:
    """Adam on all parameters; the decoder's gradient is projected and its rows are renormalised after each step."""

    def __init__(self, sae: SparseAutoencoder, lr: float, clip: float) -> None:
        self.sae, self.clip = sae, clip
        self.adam = torch.optim.Adam(sae.parameters(), lr=lr, fused=sae.W_dec.device.type in ("cpu", "cuda"))

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """One update; returns the gradient's norm after projection and before clipping."""
        W, grad = self.sae.W_dec, self.sae.W_dec.grad
        assert grad is not None
        grad.sub_((grad * W).sum(1, keepdim=True) * W)  # along a row there is nothing to learn: its norm is fixed
        norm = torch.nn.utils.clip_grad_norm_(self.sae.parameters(), self.clip)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        W.div_(W.norm(dim=1, keepdim=True))
        self.adam.zero_grad(set_to_none=True)
        return float(norm)
