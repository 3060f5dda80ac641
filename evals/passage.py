"""A batch of contexts in a model: what the model itself makes of it, and what it predicts once x is replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.activations import ActivationBatch, ContextBatch
from saekit.activations.attention import quick_attention, try_quick_attention
from saekit.activations.finite import check_finite
from saekit.activations.model import activations_of, check_hook, truncated
from saekit.activations.placement import device_of
from saekit.activations.resuming import layers_before, recorded_start, resumed
from saekit.activations.tokens import PADDING
from saekit.activations.unembedding import Unembedding

if TYPE_CHECKING:
    from torch import nn
    from transformer_lens.model_bridge import TransformerBridge

Edit = Callable[[Float[Tensor, "m d"]], Float[Tensor, "m d"]]


class Scored(NamedTuple):
    """Of the scored positions: their places in the flattened batch, the tokens that follow, their documents."""

    places: Int[Tensor, "s"]
    targets: Int[Tensor, "s"]
    documents: Int[Tensor, "s"]


class Passage:
    """A batch of contexts in a model.

    The model's own pass is run when it is first asked for and remembered, so that edited ones start at the hook
    (``saekit.activations.resuming``); without it they run all of the model.

    Attributes:
        contexts: them.
        end: how passes of the model end.
        hook: the hook point.
        causal: whether passes go on after the hook, to predictions.
    """

    def __init__(
        self, end: Unembedding, hook: str, layers: list[nn.Module], contexts: ContextBatch, causal: bool = True
    ) -> None:
        self.end, self.hook, self.contexts, self.causal = end, hook, contexts, causal
        self._layers = layers
        self._x: Tensor | None = None  # at all positions
        self._start: Tensor | None = None
        self._rows: Tensor | None = None
        self._nats: Tensor | None = None  # of the model itself, at the scored positions
        self._slopes: Tensor | None = None  # their gradients at its rows
        self._spliced: tuple[Tensor, Tensor] | None = None

    @property
    def x(self) -> Float[Tensor, "m d"]:
        """The activations at the kept positions.

        Raises:
            SaekitError: the hook gives none for each token.
        """
        if self._x is None:
            self._run()
        assert self._x is not None
        return self._x[self.contexts.kept.to(self._x.device)].to(self._device)

    @property
    def documents(self) -> Int[Tensor, "m"]:
        """The numbers of their documents."""
        return self.contexts.documents[self.contexts.kept]

    @property
    def rows(self) -> Float[Tensor, "b t w"]:
        """The rows before the unembedding of the model as it is."""
        if self._x is None:
            self._run()
        if self._rows is None:  # wide ones are not held
            self._rows = self._pass([])
        return self._rows.to(self._device)

    def check(self, where: str) -> None:
        """Raise SaekitError where an activation at a kept position is NaN or infinite, naming its token."""
        kept = self.contexts.kept
        positions = torch.arange(kept.shape[1]).expand(kept.shape)[kept]
        found = ActivationBatch(self.x, self.contexts.tokens[kept], self.documents, positions)
        check_finite(found, self.hook, where)

    def edited(self, edit: Edit | None) -> Float[Tensor, "b t w"]:
        """The rows with ``edit`` applied to the activations at the kept positions; None: as they are."""
        if edit is None:
            return self.rows

        def replace(activation: Tensor, hook: Any) -> Tensor:
            kept, changed = self.contexts.kept.to(activation.device), activation.clone()
            changed[kept] = edit(activation[kept].flatten(1)).to(activation).reshape(activation[kept].shape)
            return changed

        return self._pass([(self.hook, replace)])

    def spliced(self, x_hat: Float[Tensor, "m d"]) -> Float[Tensor, "b t w"]:
        """The rows with x̂ in the place of x; computed once for all who ask with the same x̂."""
        if self._spliced is None or self._spliced[0] is not x_hat:
            self._spliced = (x_hat, self.edited(lambda x: x_hat.to(x.device)))
        return self._spliced[1]

    def nats(self, edit: Edit | None) -> Float[Tensor, "s"]:
        """What the next token at each scored position costs after an edit."""
        places, targets, _ = self.scored()
        if edit is not None:
            return self.end.nats(self.edited(edit), places, targets)
        if self._nats is None:
            self._nats = self.end.nats(self.rows, places, targets)
        return self._nats

    def compared(self, edited: Float[Tensor, "b t w"]) -> tuple[Float[Tensor, "s"], Float[Tensor, "s"]]:
        """What the next token at each scored position costs by edited rows, and KL(the model itself ‖ those).

        Where logits are linear in the rows r, log Σ exp and the cost differ by what is linear too, and the divergence
        of two softmaxes is the Bregman divergence of log Σ exp: KL = cost(r′) − cost(r) − (r′ − r)·∇cost(r), and what
        belongs to the model itself is found once, not for each dictionary.
        """
        places, targets, _ = self.scored()
        if not self.end.linear:
            self._nats, nats, divergence = self.end.compared(self.rows, edited, places, targets)
            return nats, divergence
        if self._slopes is None:
            self._nats, slopes = self.end.sloped(self.rows, places, targets)
            self._slopes = slopes
        assert self._nats is not None
        nats = self.end.nats(edited, places, targets)
        moved = (edited - self.rows).flatten(0, 1)[places.to(edited.device)]
        linear = (moved * self._slopes.to(moved.device)).sum(1, dtype=torch.float64)
        return nats, nats.double() - self._nats.to(nats.device).double() - linear

    def scored(self) -> Scored:
        """The scored positions."""
        batch = self.contexts
        places = torch.nn.functional.pad(scored_positions(batch), (0, 1)).flatten().nonzero()[:, 0]
        targets, documents = batch.tokens.flatten()[places + 1], batch.documents.flatten()[places]
        return Scored(places.to(self._device), targets.to(self._device), documents)

    def hold(self) -> int:
        """Keep what the model's own pass found, in main memory; how many bytes that is."""
        self._spliced = None
        if self.end.whole:  # as wide as the vocabulary
            self._rows = None
        self._slopes = None if self._slopes is None else self._slopes.cpu()
        x, start, rows = (None if part is None else part.cpu() for part in (self._x, self._start, self._rows))
        self._x, self._start, self._rows = start if self._x is self._start else x, start, rows
        return sum(
            part.nbytes
            for part in {id(part): part for part in (self._x, start, rows, self._slopes) if part is not None}.values()
        )

    def forget(self) -> None:
        """Let go of it."""
        self._x = self._start = self._rows = self._spliced = self._slopes = None

    @property
    def _device(self) -> torch.device:
        return device_of(self.end.model)

    def _pass(self, hooks: list[tuple[str, Callable[..., Any]]]) -> Float[Tensor, "b t w"]:
        start = None if self._start is None else self._start.to(self._device)
        with torch.no_grad(), quick_attention(self.end.model, self.hook), resumed(self._layers, start):
            return self.end.before(self.contexts.tokens.to(self._device), hooks)

    def _run(self) -> None:
        """The model's own pass."""
        tokens = self.contexts.tokens.to(self._device)
        if not self.causal:
            with truncated(self.end.model, [self.hook]) as forward:
                [self._x] = forward(tokens)
            return
        seen: dict[str, Tensor] = {}

        def record(activation: Tensor, hook: Any) -> None:
            seen[self.hook] = activation.clone() if isinstance(activation, Tensor) else activation

        with recorded_start(self._layers) as starts:
            self._rows = self._pass([(self.hook, record)])
        [self._x] = activations_of(seen, [self.hook], tokens)
        if starts:
            [self._start] = starts
            if self._start.shape == self._x.shape and torch.equal(self._start, self._x):
                self._x = self._start


def passages(
    model: TransformerBridge, hook: str, contexts: Iterable[ContextBatch], *, causal: bool = True
) -> Iterator[Passage]:
    """Passages of these batches, or of smaller ones where the logits of a model are large.

    Raises:
        SaekitError: the model has no such hook.
    """
    check_hook(model, hook)
    try_quick_attention(model)
    end = Unembedding.of(model, hook) if causal else Unembedding(model, whole=True)
    layers = layers_before(model, hook) if causal else []
    for batch in contexts:
        for part in batch.split(end.at_once(batch.tokens.shape[1]) if causal else len(batch.tokens)):
            yield Passage(end, hook, layers, part, causal)


def scored_positions(batch: ContextBatch) -> Bool[Tensor, "b t-1"]:
    """Positions whose next token counts: kept ones that are not the last; the target may be a true end of text.

    Padding is no target.
    """
    return batch.kept[:, :-1] & (batch.documents[:, 1:] != PADDING)
