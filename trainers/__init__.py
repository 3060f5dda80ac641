"""Training: the loop, one file a variant, losses, optimiser, checkpoints."""

from saekit.trainers.config import TrainConfig
from saekit.trainers.trainer import Run, train
from saekit.trainers.variants import VARIANTS, Variant

__all__ = ["VARIANTS", "Run", "TrainConfig", "Variant", "train"]
