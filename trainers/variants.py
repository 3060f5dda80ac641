"""The registry of variants: a new one is a file with its class, and one line here.

Packages outside saekit add theirs by ``VARIANTS["name"] = Class``, or, so that the command line knows them too, by an
entry point of the group ``saekit.variants``.
"""

from __future__ import annotations

from saekit.plugins import add_from_packages
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

add_from_packages(VARIANTS, "saekit.variants", "variant")  # last: they import from here
