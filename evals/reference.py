"""What a model makes of held-out text at a hook point, whatever dictionary is judged there: found once for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.activations import ContextBatch
from saekit.activations.gradients import not_causal
from saekit.evals.costs import Costs, costs_of
from saekit.evals.passage import Edit, Passage, passages

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

HELD = 2**32  # bytes of activations and predictions that are held from one dictionary to the next
QUICK = 8  # contexts in a pass: on a CPU more are slower, since what they make leaves its cache
PASSES = 2  # over the contexts, for the figures of the model alone


class Reference:
    """Held-out contexts in a model, in batches, and what it makes of them.

    Activations and predictions are held in main memory up to a limit; what is beyond it is computed again for each
    dictionary.

    Attributes:
        model, hook, contexts: what it is of.
        batch: contexts in a batch of evaluations that go over them in their own way.
        batches: the contexts as passages; iterating over the reference holds what they find.
        no_downstream: why the model predicts no next tokens, None where it does.
    """

    def __init__(
        self, model: TransformerBridge, hook: str, contexts: ContextBatch, *, batch: int = 16, held: int = HELD
    ) -> None:
        """Take contexts, in passes of at most ``batch``; nothing is computed yet.

        Raises:
            SaekitError: the model has no such hook.
        """
        self.model, self.hook, self.contexts, self.batch = model, hook, contexts, batch
        self.no_downstream = not_causal(model)
        self.batches = list(passages(model, hook, contexts.split(min(batch, QUICK)), causal=self.no_downstream is None))
        self._limit = self._room = held
        self._held: set[Passage] = set()
        self._costs: Costs | None = None

    def __iter__(self) -> Iterator[Passage]:
        """The batches, each of which is held or forgotten when the next is asked for.

        Raises:
            SaekitError: an activation is NaN or infinite (its token is named).
        """
        for number, passage in enumerate(self.batches):
            if passage not in self._held:
                passage.check(f"batch {number} of contexts")
            yield passage
            size = passage.hold()
            if passage not in self._held and size <= self._room:
                self._room -= size
                self._held.add(passage)
            elif passage not in self._held:
                passage.forget()

    def forget(self) -> None:
        """Let go of the activations until it is used again; figures stay."""
        for passage in self._held:
            passage.forget()
        self._held.clear()
        self._room = self._limit

    @property
    def holds(self) -> bool:
        """Whether there are activations here that need not be computed again."""
        return bool(self._held)

    @property
    def passes(self) -> int:
        """How often ``costs`` still has to go through the contexts."""
        return PASSES if self._costs is None and self.no_downstream is None else 0

    def costs(self, on_batch: Callable[[int], object] | None = None) -> Costs:
        """What predictions cost with x as it is (``clean``), and with 0 and x̄ in its place (``zero``, ``mean``).

        x̄ is the mean activation of the kept positions. ``on_batch`` is called with the number of contexts done, in
        each of ``passes``.

        Raises:
            SaekitError: there is no text to score.
        """
        if self._costs is None:
            mean = self._mean(on_batch)
            edits: dict[str, Edit | None] = {
                "clean": None,
                "zero": torch.zeros_like,
                "mean": lambda x: mean.to(x).expand_as(x),
            }
            self._costs = costs_of(self._told(on_batch), edits)
        return self._costs

    def _mean(self, on_batch: Callable[[int], object] | None) -> Float[Tensor, "d"]:
        total, count = torch.zeros(1, dtype=torch.float64), 0
        for passage in self._told(on_batch):
            x = passage.x
            total, count = total + x.double().sum(0).cpu(), count + len(x)
        return total / count

    def _told(self, on_batch: Callable[[int], object] | None) -> Iterator[Passage]:
        for passage in self:
            yield passage
            if on_batch is not None:
                on_batch(len(passage.contexts.tokens))
