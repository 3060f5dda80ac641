"""From text to activations: tokens, hooked models, caches, and shuffled batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saekit.lazy import lazy

if TYPE_CHECKING:
    from saekit.activations.batch import ActivationBatch
    from saekit.activations.cache import ActivationCache
    from saekit.activations.harvesting import Harvest, harvest, harvest_hooks
    from saekit.activations.model import load_model
    from saekit.activations.padding import contexts_of
    from saekit.activations.settings import SourceSettings
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
    "SourceSettings",
    "TextSource",
    "contexts_of",
    "harvest",
    "harvest_hooks",
    "load_model",
    "open_text",
    "pack",
]

_HOMES = {
    "ActivationBatch": "batch",
    "ActivationCache": "cache",
    "ActivationSource": "source",
    "ContextBatch": "tokens",
    "Harvest": "harvesting",
    "ShuffledStream": "stream",
    "SourceSettings": "settings",
    "TextSource": "text",
    "contexts_of": "padding",
    "harvest": "harvesting",
    "harvest_hooks": "harvesting",
    "load_model": "model",
    "open_text": "text",
    "pack": "tokens",
}
__getattr__, __dir__ = lazy(__name__, _HOMES)
