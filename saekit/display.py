"""What a notebook shows: tables and coloured tokens as small pieces of HTML, all text escaped, for light and dark."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from saekit.errors import SaekitError

_LONGEST = 200  # characters of a cell
_STRONG, _NEGATIVE = "255,140,0", "0,140,255"  # half transparent, they show on white and on black
_RULE = "border-left:3px solid rgba(128,128,128,.4)"
_PASSAGE = f"font-family:monospace;white-space:pre-wrap;margin:4px 0;padding-left:6px;{_RULE}"
_LEFT = ' style="text-align:left"'


def table(title: str, rows: Iterable[Sequence[Any]], columns: Sequence[str] = ()) -> str:
    """A table as HTML; cells are cut at 200 characters."""

    def row(cells: Sequence[Any], tag: str) -> str:
        texts = (str(cell) for cell in cells)
        cut = (text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…" for text in texts)
        return "<tr>" + "".join(f"<{tag}{_LEFT}>{escape(text)}</{tag}>" for text in cut) + "</tr>"

    head = f"<thead>{row(columns, 'th')}</thead>" if columns else ""
    body = "".join(row(cells, "td") for cells in rows)
    return f"<table><caption{_LEFT}><b>{escape(title)}</b></caption>{head}<tbody>{body}</tbody></table>"


@dataclass(frozen=True)
class Coloured:
    """Tokens on a ground that shows their values; a notebook displays it.

    Attributes:
        pieces: the text of each token.
        values: of each; shown when the pointer rests on it.
        peak: the value of the full colour.
    """

    pieces: Sequence[str]
    values: Sequence[float]
    peak: float

    def __repr__(self) -> str:
        return f"{len(self.pieces)} tokens, coloured up to {self.peak:.4g}"

    def _repr_html_(self) -> str:
        spans = "".join(map(self._span, self.pieces, self.values))
        return f'<div style="{_PASSAGE}">{spans}</div>'

    def _span(self, piece: str, value: float) -> str:
        text = re.sub("↵+", r"\g<0>\n", escape(piece))
        depth = 0.8 * min(abs(value) / self.peak, 1.0) if self.peak > 0 else 0.0
        if not depth > 0:  # zero or NaN
            return text
        colour = _STRONG if value > 0 else _NEGATIVE
        return f'<span title="{value:.4g}" style="background:rgba({colour},{depth:.2f})">{text}</span>'


def coloured(pieces: Sequence[str], values: Iterable[float], *, peak: float | None = None) -> Coloured:
    """Tokens on a ground that shows their values, orange above zero and blue below.

    Args:
        pieces: the text of each token.
        values: of each, such as one feature's activations [t].
        peak: the value of the full colour; the largest finite magnitude if not given. Give it to compare passages.

    Raises:
        SaekitError: there are not as many values as pieces.
    """
    numbers = [float(value) for value in values]
    if len(numbers) != len(pieces):
        raise SaekitError(f"{len(pieces)} tokens cannot be coloured by {len(numbers)} values")
    largest = max((abs(number) for number in numbers if math.isfinite(number)), default=0.0)
    return Coloured(list(pieces), numbers, largest if peak is None else peak)
