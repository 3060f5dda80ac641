"""Next-token predictions in pieces: 16 contexts of 256 tokens and a vocabulary of 256,000 make 4 GiB of logits.

A pass stops before the unembedding, which is then applied to some rows at a time. Where a model does more to its logits
than that (or than Gemma 2's soft cap), a pass gives the logits, of few contexts at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saekit.activations.placement import device_of, dtype_of

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_PASS = 2**28  # bytes of what a pass ends in, unless one context alone has more
_PIECE = 2**26  # bytes of the logits that are worked on at a time
_HOOK = "unembed.hook_in"
_ends: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # whether the unembedding ends the model
_linear: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # whether it is linear, in float32


@dataclass(frozen=True)
class Unembedding:
    """The end of a model: what turns rows [m, w], in which a pass ends, into logits [m, v].

    Attributes:
        model: the hooked model.
        whole: whether the rows are the logits themselves.
    """

    model: TransformerBridge
    whole: bool

    @staticmethod
    def of(model: TransformerBridge, *hooks: str) -> Unembedding:
        """How to end passes of a model in which these hook points are used; call it while nothing is hooked."""
        if model not in _ends:
            _ends[model] = _is_the_end(model)
        points = [point for point in model.unembed.modules() if hasattr(point, "fwd_hooks")] if _ends[model] else []
        used = any(point.fwd_hooks for point in points) or any(model.hook_dict.get(hook) in points for hook in hooks)
        return Unembedding(model, whole=used or not _ends[model])

    def at_once(self, length: int) -> int:
        """Contexts of this many tokens in one pass."""
        width = int(self.model.cfg.d_vocab if self.whole else self.model.cfg.d_model)
        return max(1, _PASS // (4 * width * length))

    def before(
        self, tokens: Int[Tensor, "b t"], hooks: Sequence[tuple[str, Callable[..., Any]]] = ()
    ) -> Float[Tensor, "b t w"]:
        """Run the model with some hooks, up to the rows."""
        if self.whole:
            with self.model.hooks(fwd_hooks=list(hooks)):
                return torch.as_tensor(self.model(tokens, return_type="logits"))
        from transformer_lens.model_bridge.exceptions import StopAtLayerException

        found: list[Tensor] = []

        def stop(activation: Tensor, hook: Any) -> None:
            found.append(activation)
            raise StopAtLayerException(activation)  # the bridge catches it

        with self.model.hooks(fwd_hooks=[*hooks, (_HOOK, stop)]):
            self.model(tokens, return_type=None)
        return found[0]

    def logits(self, rows: Float[Tensor, "m w"]) -> Float[Tensor, "m v"]:
        """The logits of some rows, in float32, where the rows lie."""
        if self.whole:
            return rows.float()
        return _capped(self.model, self.model.unembed(rows[None])[0]).float().to(rows.device)

    def pieces(self, places: Int[Tensor, "m"]) -> Iterator[Int[Tensor, "p"]]:
        """The places of rows in pieces whose logits can be worked on."""
        return iter(torch.split(places, max(1, _PIECE // (4 * int(self.model.cfg.d_vocab)))))

    def nats(
        self, rows: Float[Tensor, "b t w"], places: Int[Tensor, "m"], targets: Int[Tensor, "m"]
    ) -> Float[Tensor, "m"]:
        """What the target at each of these (flat) places costs."""
        places, targets = places.to(rows.device), targets.to(rows.device)
        found = [
            nn.functional.cross_entropy(self.logits(rows.flatten(0, 1)[piece]), wanted, reduction="none")
            for piece, wanted in zip(self.pieces(places), self.pieces(targets), strict=True)
        ]
        return torch.cat(found)

    @property
    def linear(self) -> bool:
        """Whether logits follow from rows by a product with a matrix, in float32."""
        if self.whole:
            return False
        if self.model not in _linear:
            _linear[self.model] = _is_linear(self)
        return _linear[self.model]

    def sloped(
        self, rows: Float[Tensor, "b t w"], places: Int[Tensor, "m"], targets: Int[Tensor, "m"]
    ) -> tuple[Float[Tensor, "m"], Float[Tensor, "m w"]]:
        """``nats``, and their gradients at the rows."""
        places, targets = places.to(rows.device), targets.to(rows.device)
        found = []
        for piece, wanted in zip(self.pieces(places), self.pieces(targets), strict=True):
            with torch.enable_grad():
                at = rows.flatten(0, 1)[piece].detach().requires_grad_()
                nats = nn.functional.cross_entropy(self.logits(at), wanted, reduction="none")
                (slope,) = torch.autograd.grad(nats.sum(), at)
            found.append((nats.detach(), slope))
        before, slopes = (torch.cat(column) for column in zip(*found, strict=True))
        return before, slopes

    def compared(
        self,
        rows: Float[Tensor, "b t w"],
        other: Float[Tensor, "b t w"],
        places: Int[Tensor, "m"],
        targets: Int[Tensor, "m"],
    ) -> tuple[Float[Tensor, "m"], Float[Tensor, "m"], Float[Tensor, "m"]]:
        """What the target at each of these (flat) places costs by ``rows`` and by ``other``, and KL(rows ‖ other)."""
        places, targets = places.to(rows.device), targets.to(rows.device)
        found = []
        for piece, wanted in zip(self.pieces(places), self.pieces(targets), strict=True):
            log_p, log_q = (self.logits(each.flatten(0, 1)[piece]).log_softmax(-1) for each in (rows, other))
            nats = [-each.gather(1, wanted[:, None])[:, 0] for each in (log_p, log_q)]
            found.append((*nats, (log_q.neg_().add_(log_p).mul_(log_p.exp_())).sum(-1)))
        before, after, divergence = (torch.cat(column) for column in zip(*found, strict=True))
        return before, after, divergence


def next_tokens(tokens: Int[Tensor, "b t"]) -> tuple[Int[Tensor, "m"], Int[Tensor, "m"]]:
    """The flat places of all tokens but each context's last, and the tokens that follow there."""
    places = torch.arange(tokens.numel(), device=tokens.device).reshape(tokens.shape)[:, :-1].flatten()
    return places, tokens.flatten()[places + 1]


def _cap(model: TransformerBridge) -> float | None:
    config = model.original_model.config
    cap: float | None = getattr(getattr(config, "text_config", None) or config, "final_logit_softcapping", None)
    return cap


def _capped(model: TransformerBridge, logits: Float[Tensor, "*m v"]) -> Float[Tensor, "*m v"]:
    cap = _cap(model)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _is_linear(end: Unembedding) -> bool:
    if dtype_of(end.model) != torch.float32 or _cap(end.model) is not None:
        return False
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 4, int(end.model.cfg.d_model), generator=generator).to(device_of(end.model))
    with torch.no_grad():
        found = end.logits(one + other) - end.logits(other)
        expected = end.logits(one) - end.logits(torch.zeros_like(one))
    return float((found - expected).norm()) <= 1e-4 * float(expected.norm())


def _is_the_end(model: TransformerBridge) -> bool:
    """Whether the unembedding of what a pass has before it gives the model's own logits."""
    tokens = torch.arange(min(int(model.cfg.n_ctx), 8), device=device_of(model))[None]
    tokens %= int(model.cfg.d_vocab)
    split = Unembedding(model, whole=False)
    try:
        with torch.no_grad():
            expected = Unembedding(model, whole=True).before(tokens).float()
            found = split.logits(split.before(tokens)[0])[None]
    except Exception:  # models that no adapter knows fail in many ways, and then give all logits
        return False
    tolerance = max(1e-5, 2 * torch.finfo(dtype_of(model)).eps)
    return found.shape == expected.shape and float((found - expected).norm()) <= tolerance * float(expected.norm())
