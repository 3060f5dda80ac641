"""The page: data, style and scripts in one file.

All text of the data reaches the page as JSON, which a script puts into text nodes; none of it is ever read as HTML.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from saekit.evals.features import FeatureStudy
from saekit.evals.html.overview import Subject, comparison, overview
from saekit.evals.html.packed import pack
from saekit.files import replace_file

_SCRIPTS = ("elements.js", "charts.js", "overview.js", "list.js", "feature.js", "report.js")


def write_report(
    path: str | Path, subjects: Sequence[Subject], study: FeatureStudy | None = None, why_not: str | None = None
) -> int:
    """Write the report of one dictionary, or of several: a table of all, and the first in detail.

    Args:
        path: the file; what it holds is replaced.
        subjects: the dictionaries, at least one.
        study: of the first one's features.
        why_not: why there is no study, where there is none.

    Returns:
        Its size in bytes.

    Raises:
        WriteError: it cannot be written.
    """
    text = page(subjects, study, why_not).encode()
    replace_file(Path(path), lambda part: part.write_bytes(text))
    return len(text)


def page(subjects: Sequence[Subject], study: FeatureStudy | None = None, why_not: str | None = None) -> str:
    """The report as HTML; arguments as for ``write_report``."""
    data: dict[str, Any] = {"overview": overview(subjects[0], study), "why_not": why_not, "features": None}
    if len(subjects) > 1:
        data["comparison"] = comparison(subjects)
    lines: list[str] = []
    if study is not None:
        data["features"], lines = pack(study)
    style, script = _part("style.css"), "\n".join(map(_part, _SCRIPTS))
    return Template(_part("template.html")).substitute(
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        data=_inert(_json(data)),
        lines=_inert("\n".join(lines)),
    )


def _part(name: str) -> str:
    return files("saekit.evals.html").joinpath(name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _inert(text: str) -> str:
    """JSON without the characters that could end the element it stands in; in its strings, they become escapes."""
    text = text.encode("utf-8", "backslashreplace").decode()  # halves of pairs of surrogates
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    """How a content security policy names a script or style."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
