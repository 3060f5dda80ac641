"""Evaluations: one file a question asked of a dictionary, all on held-out text and by the inference rule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saekit.lazy import lazy

if TYPE_CHECKING:
    from saekit.evals.evaluation import Context, Evaluation, Figure, Seen
    from saekit.evals.gradient_pursuit import encode_by_pursuit
    from saekit.evals.heldout import heldout_contexts
    from saekit.evals.registry import EVALUATIONS
    from saekit.evals.report import Report, table
    from saekit.evals.saved import Evaluator
    from saekit.evals.similarity import compare
    from saekit.evals.suite import evaluate, evaluate_activations

__all__ = [
    "EVALUATIONS",
    "Context",
    "Evaluation",
    "Evaluator",
    "Figure",
    "Report",
    "Seen",
    "compare",
    "encode_by_pursuit",
    "evaluate",
    "evaluate_activations",
    "heldout_contexts",
    "table",
]

_HOMES = {
    "EVALUATIONS": "registry",
    "Context": "evaluation",
    "Evaluation": "evaluation",
    "Evaluator": "saved",
    "Figure": "evaluation",
    "Report": "report",
    "Seen": "evaluation",
    "compare": "similarity",
    "encode_by_pursuit": "gradient_pursuit",
    "evaluate": "suite",
    "evaluate_activations": "suite",
    "heldout_contexts": "heldout",
    "table": "report",
}
__getattr__, __dir__ = lazy(__name__, _HOMES)
