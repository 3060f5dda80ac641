"""Evaluations: one file a question asked of a dictionary, all on held-out text and by the inference rule."""

from saekit.evals.gradient_pursuit import encode_by_pursuit
from saekit.evals.heldout import heldout_contexts
from saekit.evals.report import Report, table
from saekit.evals.saved import Evaluator
from saekit.evals.similarity import compare
from saekit.evals.suite import evaluate, evaluate_activations

__all__ = [
    "Evaluator",
    "Report",
    "compare",
    "encode_by_pursuit",
    "evaluate",
    "evaluate_activations",
    "heldout_contexts",
    "table",
]
