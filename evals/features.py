"""What each feature of a dictionary responds to, and what it writes: found in one pass over text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import index
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.activations import ContextBatch, harvest
from saekit.activations.gradients import not_causal
from saekit.activations.padding import as_contexts
from saekit.code import SparseCode
from saekit.errors import SaekitError, first_line
from saekit.evals.activity import Activity, Found
from saekit.evals.pieces import pieces
from saekit.evals.reference import Reference
from saekit.processing import warn_of_processing
from saekit.sae import SparseAutoencoder

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_RESIDUAL = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "hook_embed")
LOGITS = (
    "unembed(ln_final(d)) − unembed(ln_final(0)) for the feature's decoder row d, less its mean over the vocabulary"
)

Logits = list[tuple[str, float]]  # tokens, readable, and by how much


class Example(NamedTuple):
    """A passage in which a feature fires.

    Attributes:
        tokens: their ids, all of one document.
        values: the feature's activation on each, 0 where it does not fire.
        at: index of the token that the passage was chosen for.
        kind: ``top`` for the strongest passages, ``quantile`` for one of a random sample.
        band: 0 for ``top``; of a quantile, its number from 1, the strongest.
        place: index of the first token in the contexts, flattened.
    """

    tokens: list[int]
    values: list[float]
    at: int
    kind: Literal["top", "quantile"]
    band: int
    place: int


class Histogram(NamedTuple):
    """How often a feature's activation falls between ``edges`` [b + 1], b counts, exact."""

    edges: list[float]
    counts: list[int]


@dataclass(frozen=True)
class FeatureStudy:
    """What ``study_features`` found.

    Attributes:
        sae, model, contexts: what was studied on what.
        features: the features studied, ascending; methods take these. ``density`` is of all.
        tokens: text tokens seen.
        l0_counts: [largest L0 + 1] on how many tokens 0, 1, 2, ... features fire.
        no_logits: why there are no logits, None where there are.
    """

    sae: SparseAutoencoder
    model: TransformerBridge
    contexts: ContextBatch
    features: list[int]
    tokens: int
    l0_counts: Int[Tensor, "l"]
    no_logits: str | None
    _activity: Activity = field(repr=False)
    _quantiles: int = field(repr=False)

    def __repr__(self) -> str:
        return f"FeatureStudy({len(self.features):,} of {self.sae.cfg.d_sae:,} features on {self.tokens:,} tokens)"

    @property
    def density(self) -> Float[Tensor, "F"]:
        """Share of the text tokens on which each feature fires, in float64."""
        return self._activity.fired.double() / max(self.tokens, 1)

    def fired(self, feature: int) -> int:
        """On how many tokens a feature fires."""
        return int(self._activity.fired[feature])

    def mean(self, feature: int) -> float:
        """Mean activation where the feature fires; 0 where it never does."""
        return float(self._activity.sums[self._row(feature)]) / max(self.fired(feature), 1)

    def peak(self, feature: int) -> float:
        """Largest activation; 0 where the feature never fires."""
        return float(self._activity.histogram.peaks[self._row(feature)])

    def histogram(self, feature: int) -> Histogram:
        """The feature's positive activations in bins of equal width, a power of two; 32 to 64 up to the peak."""
        return Histogram(*self._activity.histogram.of(self._row(feature)))

    def examples(self, feature: int) -> list[Example]:
        """The strongest passages, strongest first, then one from each quantile band of its activations.

        The passage of a context is around its strongest token; of passages that read the same up to there, the first
        of the strongest counts. The bands are those of a random sample of the activations, equally many in each.
        """
        row = self._row(feature)
        top = self._activity.top.of(row)
        contexts = {self._context(found) for found in top}
        groups = {found.group for found in top}
        examples = [self._example(found, "top", 0) for found in top]
        sample = sorted(self._activity.sample.of(row), key=lambda found: -found.value)
        for band in range(self._quantiles):
            part = sample[band * len(sample) // self._quantiles : (band + 1) * len(sample) // self._quantiles]
            for found in sorted(part, key=lambda found: found.score):
                if found.group not in groups and self._context(found) not in contexts:
                    groups.add(found.group)
                    contexts.add(self._context(found))
                    examples.append(self._example(found, "quantile", band + 1))
                    break
        return examples

    def pieces(self, tokens: Iterable[int]) -> list[str]:
        """Readable text of each token."""
        return pieces(self.model.tokenizer, tokens)

    def neighbours(self, feature: int, count: int = 8) -> list[tuple[int, float]]:
        """The features whose decoder rows point the same way most nearly, with the cosine, nearest first."""
        [found] = self.neighbours_of([feature], count)
        return found

    def neighbours_of(self, features: Sequence[int], count: int = 8) -> list[list[tuple[int, float]]]:
        """``neighbours`` of several features, in fewer products."""
        found: list[list[tuple[int, float]]] = []
        for part in torch.split(self._existing(features), 256):
            part = part.to(self._directions.device)
            cosines = self._directions[part] @ self._directions.T
            cosines.scatter_(1, part[:, None], -2)  # not itself
            best = cosines.topk(min(count, cosines.shape[1] - 1))
            found += [
                list(zip(*each, strict=True)) for each in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
        return found

    def logits(self, feature: int, count: int = 10) -> tuple[Logits, Logits]:
        """The tokens whose logits the feature's decoder row raises most and lowers most, with by how much (``LOGITS``).

        Both are empty where ``no_logits`` says why.
        """
        [found] = self.logits_of([feature], count)
        return found

    @torch.no_grad()
    def logits_of(self, features: Sequence[int], count: int = 10) -> list[tuple[Logits, Logits]]:
        """``logits`` of several features, in fewer products."""
        if self.no_logits is not None:
            return [([], []) for _ in features]
        found: list[tuple[Logits, Logits]] = []
        for part in torch.split(self._existing(features), 256):
            effect = logit_effects(self.model, self.sae.W_dec[part.to(self.sae.W_dec.device)])
            found += zip(self._largest(effect, count), self._largest(effect, count, -1), strict=True)
        return found

    def _largest(self, effect: Float[Tensor, "n v"], count: int, sign: int = 1) -> list[Logits]:
        """Of each row, the tokens with the largest effects or, with sign −1, the smallest."""
        best = (sign * effect).topk(min(count, effect.shape[1]))
        return [
            list(zip(self.pieces(tokens), values, strict=True))
            for tokens, values in zip(best.indices.tolist(), (sign * best.values).tolist(), strict=True)
        ]

    @cached_property
    def _directions(self) -> Float[Tensor, "F d"]:
        W_dec = self.sae.W_dec.detach()
        W_dec = W_dec.to(torch.promote_types(W_dec.dtype, torch.float32))
        unit: Tensor = W_dec / W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(W_dec.dtype).tiny)
        return unit

    @cached_property
    def _rows(self) -> dict[int, int]:
        return {feature: row for row, feature in enumerate(self.features)}

    def _existing(self, features: Sequence[int]) -> Int[Tensor, "n"]:
        """The features as a tensor, where the dictionary has them all."""
        for feature in features:
            if not 0 <= feature < self.sae.cfg.d_sae:
                raise SaekitError(
                    f"there is no feature {feature}: the dictionary has features 0 to {self.sae.cfg.d_sae - 1}"
                )
        return torch.tensor(list(features))

    def _row(self, feature: int) -> int:
        if feature not in self._rows:
            raise SaekitError(f"feature {feature} is not among the {len(self.features)} that were studied")
        return self._rows[feature]

    def _context(self, found: Found) -> int:
        return found.place // self.contexts.tokens.shape[1]

    def _example(self, found: Found, kind: Literal["top", "quantile"], band: int) -> Example:
        tokens = self.contexts.tokens.flatten()[found.start : found.stop].tolist()
        values = found.values[: len(tokens)]
        return Example(tokens, values, found.place - found.start, kind, band, found.start)


def study_features(
    sae: SparseAutoencoder,
    model: TransformerBridge,
    contexts: ContextBatch | Int[Tensor, "c t"] | Reference,
    *,
    hook: str | None = None,
    attention_mask: Bool[Tensor, "c t"] | None = None,
    features: Sequence[int] | None = None,
    top: int = 8,
    quantiles: int = 5,
    window: int = 24,
    batch: int = 16,
    on_batch: Callable[[int], object] | None = None,
) -> FeatureStudy:
    """See where the features of a dictionary fire in text, in one pass.

    Memory does not grow with the text: of each feature studied, ``top`` passages and a random sample of 32 activations
    are kept (about 10 kB), and 64 counts.

    Args:
        sae: the dictionary.
        model: the hooked model (``saekit.activations.load_model``).
        contexts: the text; plain token ids too, or a ``Reference``, whose activations are used where it holds them.
        hook: hook point; what the dictionary's metadata names if not given.
        attention_mask: [c, t] which of plain token ids are no padding (``contexts_of``).
        features: which to study; all if not given.
        top: strongest passages of each.
        quantiles: bands of activation, from each of which a further passage is shown.
        window: tokens of a passage, where its document has so many.
        batch: contexts in one forward pass.
        on_batch: called with the number of contexts done, for a progress bar.

    Raises:
        SaekitError: no hook is known, the dictionary does not fit the model, its activations or decoder are not finite,
            a feature does not exist, a number is too small, or there is no text.
    """
    known = contexts if isinstance(contexts, Reference) else None
    hook = hook or (known.hook if known is not None else sae.cfg.metadata.get("hook_name"))
    if not hook:
        raise SaekitError("the dictionary does not name its hook point; give one")
    contexts = as_contexts(model, contexts if known is None else known.contexts, attention_mask=attention_mask)
    warn_of_processing(sae, model, hook)
    if not contexts.kept.any():
        raise SaekitError("there is no text to study features on")
    try:
        studied = sorted(set(range(sae.cfg.d_sae) if features is None else map(index, features)))
    except TypeError as error:
        raise SaekitError(f"features are a sequence of whole numbers: {first_line(error)}") from None
    if not studied or not 0 <= studied[0] <= studied[-1] < sae.cfg.d_sae:
        raise SaekitError(f"the dictionary has features 0 to {sae.cfg.d_sae - 1}; choose from those")
    if min(top, window, batch, quantiles + 1) < 1:
        raise SaekitError("top, window and batch are at least 1, and quantiles at least 0")
    if not torch.isfinite(sae.W_dec).all():
        raise SaekitError("the dictionary has decoder rows that are NaN or infinite; there is nothing to show")
    found = Activity(sae.cfg.d_sae, studied, top=top, window=window)
    passages: Iterator[tuple[ContextBatch, Tensor]]
    if known is not None and known.holds:
        passages = ((passage.contexts, passage.x) for passage in known)
    else:
        passages = _read(model, hook, contexts.split(batch))
    for part, code in codes(sae, hook, passages):
        found.update(part, code)
        if on_batch is not None:
            on_batch(len(part.tokens))
    return FeatureStudy(
        sae, model, contexts, studied, found.tokens, found.l0_counts, _no_logits(sae, model, hook), found, quantiles
    )


def spread_over_densities(
    sae: SparseAutoencoder, model: TransformerBridge, contexts: ContextBatch, count: int, *, hook: str
) -> list[int]:
    """So many features at even steps of density rank, the densest among them, by a pass over these contexts.

    All where there are no more than ``count``.
    """
    if sae.cfg.d_sae <= count:
        return list(range(sae.cfg.d_sae))
    fired = torch.zeros(sae.cfg.d_sae, dtype=torch.long)
    for _, code in codes(sae, hook, _read(model, hook, contexts.split(16))):
        fired += code.matches_per_feature().cpu()
    steps = torch.linspace(0, sae.cfg.d_sae - 1, count, dtype=torch.float64).round().long()
    return sorted(fired.sort(descending=True, stable=True).indices[steps].tolist())


@torch.no_grad()
def codes(
    sae: SparseAutoencoder, hook: str, passages: Iterable[tuple[ContextBatch, Float[Tensor, "m d"]]]
) -> Iterator[tuple[ContextBatch, SparseCode]]:
    """Contexts with the sparse codes of the activations at their text tokens.

    Raises:
        SaekitError: the dictionary does not fit the model.
    """
    for contexts, x in passages:
        if x.shape[1] != sae.cfg.d_in:
            raise SaekitError(
                f"the dictionary does not fit: it takes width {sae.cfg.d_in}, but '{hook}' has width {x.shape[1]}"
            )
        yield contexts, sae.encode_sparse(x.to(sae.W_dec.device))


def _read(
    model: TransformerBridge, hook: str, contexts: Iterable[ContextBatch]
) -> Iterator[tuple[ContextBatch, Float[Tensor, "m d"]]]:
    parts = list(contexts)
    return ((part, batch.x) for part, batch in zip(parts, harvest(model, hook, parts), strict=True))


@torch.no_grad()
def logit_effects(model: TransformerBridge, directions: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
    """What each direction in the residual stream does to the logits by itself, through final norm and unembedding.

    ``LOGITS`` says how: the norm makes the direction's length irrelevant (but for its epsilon), taking off what a zero
    gives takes off biases, and a constant over the vocabulary changes no probability.
    """
    weight = next(model.unembed.parameters())
    stream = torch.cat([directions.new_zeros(1, directions.shape[1]), directions]).to(weight)
    logits = model.unembed(model.ln_final(stream[None]))[0].float()
    effect: Tensor = logits[1:] - logits[:1]
    return (effect - effect.mean(1, keepdim=True)).cpu()


def _no_logits(sae: SparseAutoencoder, model: TransformerBridge, hook: str) -> str | None:
    """Why decoder rows cannot be put before the model's final norm, if they cannot."""
    if hook.rsplit(".", 1)[-1] not in _RESIDUAL or sae.cfg.d_in != int(model.cfg.d_model):
        return f"'{hook}' is not in the space of the residual stream, which the unembedding reads"
    if why := not_causal(model):
        return why
    if not all(hasattr(model, part) for part in ("ln_final", "unembed")):
        return "the model has no final norm and unembedding under the names ln_final and unembed"
    return None
