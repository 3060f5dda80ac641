"""Losses as terms: a variant names those that it is trained by, and each adds its gradients to the parameters.

Most ideas are an ``AutogradTerm``: the loss alone, in ordinary PyTorch on the sparse code. A term whose speed matters
writes its gradients by hand, as ``Reconstruction`` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.code import SparseCode
from saekit.kernels.pairs import sum_by_token
from saekit.kernels.workspace import Workspace
from saekit.sae import SparseAutoencoder
from saekit.trainers.backward import add_through_encoder, reconstruction_gradients
from saekit.trainers.losses import total_variance
from saekit.trainers.statistics import Statistics


@dataclass(frozen=True, eq=False)
class Step:
    """What a term sees of one training step, in the run's units; nothing carries gradients.

    Attributes:
        sae: the dictionary in training; its parameters have a ``grad`` each.
        x: [n, d] activations.
        centred: [n, d] x − b_dec.
        code: the matches of the batch with their values relu((x − b_dec) W_enc + b_enc).
        token_norms: [n] ‖x − b_dec‖ where the variant compares affinities in units of them, else None.
        statistics: of the features, up to the batch before.
        done: share of the training steps that lie behind.
        workspace: buffers to use again.
    """

    sae: SparseAutoencoder
    x: Float[Tensor, "n d"]
    centred: Float[Tensor, "n d"]
    code: SparseCode
    token_norms: Float[Tensor, "n"] | None
    statistics: Statistics
    done: float
    workspace: Workspace

    @cached_property
    def error(self) -> Float[Tensor, "n d"]:
        """x − x̂, x̂ = z W_dec + b_dec of all matches."""
        return self.centred - sum_by_token(self.sae.W_dec.detach(), self.code.values, self.code)

    @cached_property
    def variance(self) -> Float[Tensor, ""]:
        """Σ ‖x − mean‖², by which losses are divided, so that weights mean the same for every model."""
        return total_variance(self.x)

    @cached_property
    def fvu(self) -> Float[Tensor, ""]:
        """‖x − x̂‖² over the variance: the figure by which every run is watched, whatever it is trained by."""
        return self.error.square().sum() / self.variance


class Term:
    """One part of a loss.

    Attributes:
        name: its key in ``metrics.jsonl`` and its curve in the report.
        weight: of it in the loss, and of its gradients.
        overwrites: whether it writes gradients rather than adds them; such a term comes first.
    """

    name: str
    weight: float = 1.0
    overwrites = False

    def add(self, step: Step) -> Float[Tensor, ""]:
        """Add the gradients, times ``weight``, to the parameters' ``grad``; returns the loss without the weight."""
        raise NotImplementedError

    def figures(self) -> dict[str, float]:
        """What else a line of metrics should tell of the last step, by its key."""
        return {}


class Reconstruction(Term):
    """‖x − x̂‖² over the batch's total variance: its FVU (``saekit.trainers.backward`` has the gradients)."""

    name = "fvu"
    overwrites = True

    def add(self, step: Step) -> Float[Tensor, ""]:
        """Write the gradients of all four parameters."""
        reconstruction_gradients(step.sae, step.centred, step.code, step.error, -2 / step.variance)
        return step.fvu


class AutogradTerm(Term):
    """A loss written with autograd; define ``name`` and ``loss``.

    Gradients reach the decoder as they come; those of the code's values flow on into the encoder and b_dec through
    z = relu((x − b_dec) W_enc + b_enc); learned parameters of the variant that the loss uses receive their own.
    """

    def code(self, step: Step) -> SparseCode:
        """The pairs that the loss is about: the step's matches, or others whose values are pre-activations."""
        return step.code

    def loss(
        self, step: Step, code: SparseCode, W_dec: Float[Tensor, "F d"], b_dec: Float[Tensor, "d"]
    ) -> Float[Tensor, ""]:
        """The loss of a batch, a scalar.

        Args:
            step: the batch, without gradients.
            code: the pairs; ``code.values`` [m] carries gradients. ``saekit.kernels.decode.decode`` decodes them.
            W_dec, b_dec: the decoder, which carries gradients too.
        """
        raise NotImplementedError

    def add(self, step: Step) -> Float[Tensor, ""]:
        """Differentiate the loss and hand its gradients on."""
        sae, code = step.sae, self.code(step)
        values, W_dec, b_dec = (t.detach().requires_grad_() for t in (code.values, sae.W_dec, sae.b_dec))
        with torch.enable_grad():
            loss = self.loss(step, code.with_values(values), W_dec, b_dec)
            if loss.requires_grad:
                (self.weight * loss).backward()  # type: ignore[no-untyped-call]
        for parameter, leaf in ((sae.W_dec, W_dec), (sae.b_dec, b_dec)):
            if leaf.grad is not None:
                assert parameter.grad is not None
                parameter.grad.add_(leaf.grad)
        if values.grad is not None:
            add_through_encoder(sae, step.centred, code, values.grad)
        return loss.detach()
