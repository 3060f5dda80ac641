"""A study of features as a table for the list, and one line of JSON a feature that is read when it is opened."""

from __future__ import annotations

import json
from typing import Any

import torch

from saekit.evals.features import LOGITS, Example, FeatureStudy

_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_"
_FIRES_ON = 3  # tokens that the list names
_BARS = 48  # of a histogram


def pack(study: FeatureStudy) -> tuple[dict[str, Any], list[str]]:
    """What the list of features needs, and a line for the page of each, in the order of ``study.features``.

    Pieces of text are numbered once. Of the text only the passages are kept, each token as the number of its piece in
    base 64; a passage is a place in it. Activations are whole hundredths of the feature's peak, which is enough for
    colours; the one that a passage was chosen for has four digits.
    """
    examples = [study.examples(feature) for feature in study.features]
    text = _Text(study, [example for some in examples for example in some])
    rows, lines = [], []
    logits, neighbours = study.logits_of(study.features), study.neighbours_of(study.features)
    for feature, some, (raised, lowered), near in zip(study.features, examples, logits, neighbours, strict=True):
        peak, mean = study.peak(feature), study.mean(feature)
        fires_on = dict.fromkeys(text.number(example.tokens[example.at]) for example in some if example.kind == "top")
        first = text.of(raised[0][0]) if raised else -1
        rows.append([feature, study.fired(feature), _short(mean), _short(peak), list(fires_on)[:_FIRES_ON], first])
        edges, counts = study.histogram(feature)
        while len(counts) > _BARS:
            counts = [sum(counts[i : i + 2]) for i in range(0, len(counts), 2)]
            edges = edges[::2]
        line = {
            "h": [_short(edges[1]) if counts else 0, counts],
            "n": [[other, round(cosine, 3)] for other, cosine in near],
            "r": [[text.of(name), round(value, 2)] for name, value in raised],
            "l": [[text.of(name), round(value, 2)] for name, value in lowered],
            "e": [_passage(text, example, peak) for example in some],
        }
        lines.append(json.dumps(line, separators=(",", ":"), allow_nan=False))
    columns = ["id", "fired", "mean", "peak", "fires_on", "raises"]
    return {
        "width": study.sae.cfg.d_sae,
        "tokens": study.tokens,
        "no_logits": study.no_logits,
        "how_logits": LOGITS,
        **dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True)),
        "ranks": _ranks(study),
        **text.packed(),
    }, lines


class _Text:
    """The pieces of text that the page knows by number, and the passages."""

    def __init__(self, study: FeatureStudy, examples: list[Example]) -> None:
        tokens = study.contexts.tokens.flatten()
        used = torch.zeros(len(tokens), dtype=torch.bool)
        for example in examples:
            used[example.place : example.place + len(example.tokens)] = True
        self.place = (used.cumsum(0) - 1).tolist()
        self.pieces: dict[str, int] = {}
        ids = torch.unique(tokens[used]).tolist()
        self._numbers = {token: self.of(piece) for token, piece in zip(ids, study.pieces(ids), strict=True)}
        self.text = [self._numbers[token] for token in tokens[used].tolist()]

    def of(self, piece: str) -> int:
        """The number of a piece."""
        return self.pieces.setdefault(piece, len(self.pieces))

    def number(self, token: int) -> int:
        """The number of the piece that a token of a passage stands for."""
        return self._numbers[token]

    def packed(self) -> dict[str, Any]:
        """All pieces, and the text in so many digits a token."""
        digits = 1
        while 64**digits < len(self.pieces):
            digits += 1
        shifts = range(6 * (digits - 1), -1, -6)
        text = "".join(_DIGITS[number >> shift & 63] for number in self.text for shift in shifts)
        return {"pieces": list(self.pieces), "digits": digits, "text": text}


def _passage(text: _Text, example: Example, peak: float) -> list[Any]:
    """Place, length, the token it was chosen for, band, that token's value, [offset, hundredths of the peak, ...]."""
    levels: list[int] = []
    for offset, value in enumerate(example.values):
        if value > 0:
            levels += [offset, max(1, round(100 * value / peak))]
    value = _short(example.values[example.at])
    return [text.place[example.place], len(example.tokens), example.at, example.band, value, levels]


def _ranks(study: FeatureStudy) -> list[int]:
    """The density rank of each feature among all, 1 the densest."""
    order = study.density.sort(descending=True, stable=True).indices
    ranks = torch.empty_like(order).scatter_(0, order, torch.arange(1, len(order) + 1))
    return ranks[torch.tensor(study.features)].tolist()


def _short(value: float) -> float:
    return float(f"{value:.4g}")
