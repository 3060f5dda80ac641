"""The dark matter of a dictionary: what it fails to explain, taken apart (arXiv 2410.14670)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saekit.lazy import lazy

if TYPE_CHECKING:
    from saekit.evals.dark_matter.decomposition import DarkMatter, dark_matter
    from saekit.evals.dark_matter.error_batch import ErrorBatch
    from saekit.evals.dark_matter.error_cost import error_downstream, without_start
    from saekit.evals.dark_matter.least_squares import LinearMap, Moments, fit_linear
    from saekit.evals.dark_matter.scaling import WidthLaw, fit_width_law
    from saekit.evals.dark_matter.study import ErrorStudy

__all__ = [
    "DarkMatter",
    "ErrorBatch",
    "ErrorStudy",
    "LinearMap",
    "Moments",
    "WidthLaw",
    "dark_matter",
    "error_downstream",
    "fit_linear",
    "fit_width_law",
    "without_start",
]

_HOMES = {
    "DarkMatter": "decomposition",
    "ErrorBatch": "error_batch",
    "ErrorStudy": "study",
    "LinearMap": "least_squares",
    "Moments": "least_squares",
    "WidthLaw": "scaling",
    "dark_matter": "decomposition",
    "error_downstream": "error_cost",
    "fit_linear": "least_squares",
    "fit_width_law": "scaling",
    "without_start": "error_cost",
}
__getattr__, __dir__ = lazy(__name__, _HOMES)
