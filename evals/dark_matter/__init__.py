"""The dark matter of a dictionary: what it fails to explain, taken apart (arXiv 2410.14670)."""

from saekit.evals.dark_matter.decomposition import DarkMatter, ErrorBatch, dark_matter
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
