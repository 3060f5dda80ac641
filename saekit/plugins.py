"""What other installed packages add to a registry, by entry points."""

from __future__ import annotations

import warnings
from collections.abc import MutableMapping
from importlib.metadata import entry_points
from typing import Any

from saekit.errors import SaekitWarning


def add_from_packages(registry: MutableMapping[str, Any], group: str, noun: str) -> None:
    """Register what installed packages offer; one that cannot be loaded is left out, with a warning.

    Args:
        registry: where a name that is taken keeps its meaning.
        group: of entry points, such as ``saekit.variants``.
        noun: what each is, for the warning.
    """
    for point in entry_points(group=group):
        try:
            registry.setdefault(point.name, point.load())
        except Exception as error:  # whatever a stranger's module raises
            warnings.warn(
                f"the {noun} '{point.name}' ({point.value}) cannot be loaded: {error}", SaekitWarning, stacklevel=2
            )
