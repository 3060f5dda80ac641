"""The registry of variants: a new one is a file with its class, and one line here.

Packages outside saekit add theirs by ``VARIANTS["name"] = Class``, or, so that the command line knows them too, by an
entry point of the group ``saekit.variants``.
"""

from __future__ import annotations

import warnings
from importlib.metadata import entry_points

from saekit.errors import SaekitWarning
from saekit.trainers.feature_choice import FeatureChoice
from saekit.trainers.frequency_control import FrequencyControl
from saekit.trainers.gated import Gated
from saekit.trainers.gradient_topk import GradientTopK
from saekit.trainers.hierarchical_topk import HierarchicalTopK
from saekit.trainers.jumprelu import JumpReLU
from saekit.trainers.matryoshka import Matryoshka
from saekit.trainers.mutual_choice import MutualChoice
from saekit.trainers.relu import ReLU
from saekit.trainers.topk import TopK
from saekit.trainers.variant import Variant

VARIANTS: dict[str, type[Variant]] = {
    "topk": TopK,
    "mutual_choice": MutualChoice,
    "batch_topk": MutualChoice,  # the same rule under its other name
    "feature_choice": FeatureChoice,
    "gradient_topk": GradientTopK,
    "frequency_control": FrequencyControl,
    "relu": ReLU,
    "jumprelu": JumpReLU,
    "gated": Gated,
    "matryoshka": Matryoshka,
    "hierarchical_topk": HierarchicalTopK,
}


def add_from_packages() -> None:
    """Register what installed packages offer; one that cannot be loaded is left out, with a warning."""
    for point in entry_points(group="saekit.variants"):
        try:
            VARIANTS.setdefault(point.name, point.load())
        except Exception as error:  # whatever a stranger's module raises
            warnings.warn(
                f"the variant '{point.name}' ({point.value}) cannot be loaded: {error}", SaekitWarning, stacklevel=2
            )


add_from_packages()  # last: they import from here
