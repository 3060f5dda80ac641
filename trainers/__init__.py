"""Training: the loop, one file a variant, losses, optimiser, checkpoints."""

from saekit.trainers.config import TrainConfig
from saekit.trainers.multi_hook import train_hooks
from saekit.trainers.run import train
from saekit.trainers.run_folder import Run
from saekit.trainers.variant import Batch, Variant
from saekit.trainers.variants import VARIANTS, add_from_packages

__all__ = ["VARIANTS", "Batch", "Run", "TrainConfig", "Variant", "train", "train_hooks"]

add_from_packages()  # last: they import from here
