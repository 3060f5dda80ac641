"""Thresholds of a saved dictionary, set on held-out activations so that they match as often as was asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.allocation import mutual_choice
from saekit.errors import SaekitError
from saekit.sae import SparseAutoencoder

Batches = Callable[[], Iterable[Float[Tensor, "n d"]]]
_CHUNK = 1 << 26  # pre-activations held at a time
_STRIDE = 16  # one token of so many is in the sample of the first look


class Heldout:
    """Activations that a run does not train on, in its units, and the inference rules that they call for."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __call__(self) -> Iterable[Float[Tensor, "n d"]]:
        """The activations, the same ones each time."""
        return self.batches()

    def global_threshold(self, sae: SparseAutoencoder, k: int) -> float:
        """As the function ``global_threshold``."""
        return global_threshold(sae, self, k)

    def feature_thresholds(self, sae: SparseAutoencoder, rates: Float[Tensor, "F"]) -> Float[Tensor, "F"]:
        """As the function ``feature_thresholds``."""
        return feature_thresholds(sae, self, rates)


def _affinities(
    sae: SparseAutoencoder, x: Float[Tensor, "n d"], columns: Int[Tensor, "f"] | None = None
) -> Float[Tensor, "n f"]:
    """What the dictionary compares with its thresholds, of all features or some."""
    if columns is None:
        pre = sae.pre_activations(x)
    else:
        centred = x - sae.b_dec if sae.cfg.apply_b_dec_to_input else x
        pre = centred @ sae.W_enc[:, columns] + sae.b_enc[columns]
    norms = sae.token_norms(x)
    return pre if norms is None else pre / norms.clamp_min(1e-12)[:, None]


def _pieces(sae: SparseAutoencoder, batches: Batches) -> Iterator[Float[Tensor, "n d"]]:
    for batch in filter(len, batches()):
        yield from torch.split(batch, max(1, _CHUNK // sae.cfg.d_sae))


@torch.no_grad()
def global_threshold(sae: SparseAutoencoder, batches: Batches, k: int) -> float:
    """The θ for which exactly k pairs a token have affinities above it (fewer where fewer are positive).

    θ lies halfway between the k·n-th and the next largest affinity of all n tokens. Each piece of the data keeps its
    4·k largest a token as candidates; where a piece could hide a larger entry than the θ found, a second pass keeps
    twice as many.

    Args:
        sae: the dictionary, whose own threshold plays no part.
        batches: makes the activations, the same ones each time.
        k: mean number of matches a token.

    Raises:
        SaekitError: there are no activations.
    """
    share = min(4 * k, sae.cfg.d_sae)
    while True:
        candidates, hidden, n = [], 0.0, 0
        for x in _pieces(sae, batches):
            n += len(x)
            values = mutual_choice(_affinities(sae, x), share * len(x)).values
            candidates.append(values)
            if values.numel() == share * len(x):
                hidden = max(hidden, float(values.min()))
        if not n:
            raise SaekitError("no held-out activations to calibrate the threshold on")
        every = torch.cat(candidates)
        theta = 0.0
        if every.numel() > k * n:
            theta = float(every.topk(k * n + 1).values[-2:].cpu().double().mean())
        if hidden <= theta or share == sae.cfg.d_sae:
            return theta
        share = min(2 * share, sae.cfg.d_sae)


@torch.no_grad()
def feature_thresholds(sae: SparseAutoencoder, batches: Batches, rates: Float[Tensor, "F"]) -> Float[Tensor, "F"]:
    """The θ_j above which each feature's affinity lies on a share ``rates[j]`` of the tokens, to the nearest token.

    θ_j lies halfway between the neighbouring affinities; it is 0 where fewer are positive. A first look at tokens from
    all over the data finds bounds that surely lie lower; a second one keeps every affinity above its bound.

    Args:
        sae: the dictionary, whose own thresholds play no part.
        batches: makes the activations, the same ones each time.
        rates: [F] shares of the tokens, 0 to 1.

    Raises:
        SaekitError: there are no activations.
    """
    n, sample = 0, []
    for x in _pieces(sae, batches):
        sample.append(x[-n % _STRIDE :: _STRIDE])
        n += len(x)
    if not n:
        raise SaekitError("no held-out activations to calibrate the thresholds on")
    rates = rates.cpu().double()  # exact, also where the device has no float64
    counts = (rates * n).round().long().to(sae.W_dec.device)
    bounds = _lower_bounds(sae, torch.cat(sample), rates)
    theta = _thresholds(*_above(sae, batches, bounds), counts, bounds)
    missed = theta.isnan()
    if missed.any():  # the sample misled about these: look at all that is positive
        bounds = torch.where(missed, 0.0, math.inf).to(bounds)
        theta = torch.where(missed, _thresholds(*_above(sae, batches, bounds), counts, bounds), theta)
    return theta


@torch.no_grad()
def with_plain_thresholds(sae: SparseAutoencoder, batches: Batches) -> SparseAutoencoder:
    """The nearest dictionary whose thresholds do not follow the tokens' norms: each feature fires as often as before.

    Args:
        sae: a ``jumprelu`` dictionary.
        batches: makes activations that it was not trained on, the same ones each time.

    Raises:
        SaekitError: there are no activations.
    """
    fired, n = torch.zeros(sae.cfg.d_sae, dtype=torch.float64), 0
    for x in batches():
        code = sae.encode_sparse(x)
        fired += code.matches_per_feature().cpu()
        n += code.n_tokens
    plain = SparseAutoencoder(replace(sae.cfg, affinity_scale="none"), sae.W_dec.dtype, sae.W_dec.device)
    plain.load_state_dict(sae.state_dict())
    assert plain.threshold is not None
    plain.threshold.copy_(feature_thresholds(plain, batches, (fired / max(n, 1)).to(plain.threshold)))
    return plain.eval()


def _lower_bounds(sae: SparseAutoencoder, x: Float[Tensor, "n d"], rates: Float[Tensor, "F"]) -> Float[Tensor, "F"]:
    """Values, at least 0, that almost surely lie below each feature's threshold, from a sample of the tokens."""
    n = len(x)
    rank = (rates * n + 6 * (rates * n).sqrt() + 10).ceil().long().to(sae.W_dec.device)
    bounds = torch.zeros_like(sae.b_enc)
    for columns in torch.split(torch.arange(len(rates), device=rank.device), max(1, _CHUNK // n)):
        largest = _affinities(sae, x, columns).sort(dim=0, descending=True).values
        found = largest.gather(0, rank[columns].clamp(max=n)[None] - 1)[0]
        bounds[columns] = torch.where(rank[columns] < n, found.clamp(min=0), 0.0)
    return bounds


def _above(
    sae: SparseAutoencoder, batches: Batches, bounds: Float[Tensor, "F"]
) -> tuple[Int[Tensor, "m"], Float[Tensor, "m"]]:
    """Features and values of all affinities above their feature's bound, by feature and then the largest first."""
    parts = []
    for x in _pieces(sae, batches):
        affinities = _affinities(sae, x)
        tokens, features = (affinities > bounds).nonzero().unbind(1)
        parts.append((features.int(), affinities[tokens, features]))
    features, values = (torch.cat(part) for part in zip(*parts, strict=True))
    values, order = values.sort(descending=True)
    features, by_feature = features[order].sort(stable=True)
    return features.long(), values[by_feature]


def _thresholds(
    features: Int[Tensor, "m"], values: Float[Tensor, "m"], counts: Int[Tensor, "F"], bounds: Float[Tensor, "F"]
) -> Float[Tensor, "F"]:
    """Halfway between the counts[j]-th and the next largest; 0 where fewer are positive, NaN where a bound hid them.

    Where none shall match it lies beyond the largest by a thousandth, which no order of sums makes up for.
    """
    found = torch.bincount(features, minlength=len(counts))
    starts = found.cumsum(0) - found
    values = torch.cat([values, values.new_zeros(1)])
    following = (starts + counts).clamp(max=len(values) - 1)
    before = torch.where(counts > 0, values[following - 1], 1.002 * values[following])
    halfway = (before + values[following]) / 2
    short = torch.where(bounds > 0, math.nan, 0.0).to(values)
    return torch.where(found > counts, halfway, short)
