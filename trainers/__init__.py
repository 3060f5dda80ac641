"""Training: the loop, one file a variant, losses, optimiser, checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saekit.lazy import lazy

if TYPE_CHECKING:
    from saekit.trainers.config import TrainConfig
    from saekit.trainers.many import train, train_hooks, train_many
    from saekit.trainers.run_folder import Run
    from saekit.trainers.terms import AutogradTerm, Reconstruction, Step, Term
    from saekit.trainers.variant import Batch, Variant
    from saekit.trainers.variants import VARIANTS

__all__ = [
    "VARIANTS",
    "AutogradTerm",
    "Batch",
    "Reconstruction",
    "Run",
    "Step",
    "Term",
    "TrainConfig",
    "Variant",
    "train",
    "train_hooks",
    "train_many",
]

_HOMES = {
    "VARIANTS": "variants",
    "AutogradTerm": "terms",
    "Batch": "variant",
    "Reconstruction": "terms",
    "Run": "run_folder",
    "Step": "terms",
    "Term": "terms",
    "TrainConfig": "config",
    "Variant": "variant",
    "train": "many",
    "train_hooks": "many",
    "train_many": "many",
}
__getattr__, __dir__ = lazy(__name__, _HOMES)
