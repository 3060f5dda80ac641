"""The registry of evaluations: a new one is a file with its class, and one line here.

Packages outside saekit add theirs by ``EVALUATIONS["name"] = Class`` or, so that the command line knows them too, by an
entry point of the group ``saekit.evals``. Command line, tables, ``eval.json``, reports and cards ask the registry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, NamedTuple

from saekit.errors import SaekitError, did_you_mean
from saekit.evals.dark_matter.settings import DarkMatterSettings
from saekit.evals.evaluation import Evaluation, Figure
from saekit.plugins import add_from_packages
from saekit.settings import Settings


class Lazy(NamedTuple):
    """An evaluation that is imported when it is used, since it needs torch; its settings need none."""

    module: str
    name: str
    settings: type[Settings] = Settings

    def load(self) -> type[Evaluation]:
        """The class."""
        found: type[Evaluation] = getattr(import_module(self.module), self.name)
        return found


EVALUATIONS: dict[str, type[Evaluation] | Lazy] = {
    "sparsity": Lazy("saekit.evals.sparsity", "SparsityEvaluation"),
    "reconstruction": Lazy("saekit.evals.reconstruction", "ReconstructionEvaluation"),
    "downstream": Lazy("saekit.evals.downstream", "DownstreamEvaluation"),
    "gradient_selection": Lazy("saekit.evals.gradient_selection", "GradientSelectionEvaluation"),
    "dark_matter": Lazy("saekit.evals.dark_matter.evaluation", "DarkMatterEvaluation", DarkMatterSettings),
}


def evaluations(suite: str | None = None) -> Iterator[tuple[str, Evaluation]]:
    """All evaluations by name, or those of one suite."""
    for name, entry in EVALUATIONS.items():
        evaluation = (entry.load() if isinstance(entry, Lazy) else entry)()
        if suite in (None, evaluation.suite):
            yield name, evaluation


def settings_of(name: str) -> type[Settings]:
    """The settings of an evaluation, without its code where that is imported later."""
    entry = EVALUATIONS[name]
    return entry.settings if isinstance(entry, Lazy) else entry.Config


def shown_figures(*, details: bool = False) -> list[tuple[str, Figure]]:
    """The figures of all groups in the order of the tables, with the names of their groups; or only the details."""
    every = [(name, figure) for name, each in evaluations() for figure in each.figures if figure.detail is details]
    return [each for each in every if not each[1].last] + [each for each in reversed(every) if each[1].last]


def routed(given: Mapping[str, Any]) -> dict[str, Settings]:
    """The settings of each evaluation, from flat ones.

    Raises:
        SaekitError: a value is impossible, or a key belongs to none of them.
    """
    kinds = {name: settings_of(name) for name in EVALUATIONS}
    known = [key for kind in kinds.values() for key in kind.model_fields]
    for key in given:
        if key not in known:
            raise SaekitError(f"unknown setting '{key}'{did_you_mean(key, known)}")
    return {
        name: kind(**{key: value for key, value in given.items() if key in kind.model_fields})
        for name, kind in kinds.items()
    }


add_from_packages(EVALUATIONS, "saekit.evals", "evaluation")  # last: they import from here
