"""Public names of a package that are imported when they are first asked for, so that naming it costs nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package (PEP 562).

        __getattr__, __dir__ = lazy(__name__, {"SAEConfig": "config", "load": "formats"})

    Args:
        package: its ``__name__``.
        homes: for each public name the module of the package that has it. No public name may be that of a module:
            Python puts an imported module in its package, where it would stand in place of the name.
    """
    if clash := set(homes) & set(homes.values()):
        raise ValueError(f"{package}: {', '.join(sorted(clash))} would be a module and a public name")

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module '{package}' has no attribute '{name}'", name=name, obj=sys.modules[package])
        value = getattr(import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, names
