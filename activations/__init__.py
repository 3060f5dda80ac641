"""From text to activations: tokens, hooked models, caches, and shuffled batches."""

from saekit.activations.cache import ActivationCache
from saekit.activations.harvest import ActivationBatch, Harvest, harvest, harvest_hooks
from saekit.activations.model import load_model
from saekit.activations.padding import contexts_of
from saekit.activations.source import ActivationSource
from saekit.activations.stream import ShuffledStream
from saekit.activations.text import TextSource, open_text
from saekit.activations.tokens import ContextBatch, pack

__all__ = [
    "ActivationBatch",
    "ActivationCache",
    "ActivationSource",
    "ContextBatch",
    "Harvest",
    "ShuffledStream",
    "TextSource",
    "contexts_of",
    "harvest",
    "harvest_hooks",
    "load_model",
    "open_text",
    "pack",
]
