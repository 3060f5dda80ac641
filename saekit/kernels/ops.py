"""Operations by name: a plain reference each, and implementations chosen by the device of their first argument.

A backend is a file that registers implementations, ``@sum_by_token.on("cuda")``, and one line in ``BACKENDS``. With the
environment variable ``SAEKIT_KERNELS=reference`` every operation is its reference; ``auto`` chooses, as without it.
``tests/core/test_kernels.py`` compares all that is registered with its reference.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any, Generic, ParamSpec, TypeVar, cast

from saekit.errors import SaekitError, did_you_mean

VARIABLE = "SAEKIT_KERNELS"
ANY = "any"  # in place of the type of a device
BACKENDS = ("pairs", "decode", "select", "adam")  # files beside this one

P = ParamSpec("P")
R = TypeVar("R")
OPERATIONS: dict[str, Operation[..., Any]] = {}


class Operation(Generic[P, R]):
    """One operation; call it as its reference.

    Attributes:
        reference: what it is by definition: plain PyTorch, on any device and in any dtype.
        implementations: by the type of a device (``cpu``, ``cuda``, ...), or ``any`` for all others.
    """

    def __init__(self, reference: Callable[P, R]) -> None:
        self.reference = reference
        self.__doc__, self.__name__ = reference.__doc__, reference.__name__
        self.implementations: dict[str, Callable[P, R]] = {}
        OPERATIONS[self.__name__] = cast("Operation[..., Any]", self)

    def on(self, *devices: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Register an implementation for these types of devices, or ``any``."""

        def register(implementation: Callable[P, R]) -> Callable[P, R]:
            self.implementations.update(dict.fromkeys(devices, implementation))
            return implementation

        return register

    def chosen(self, device: str) -> Callable[P, R]:
        """What runs on a type of device.

        Raises:
            SaekitError: the environment variable asks for what there is not.
        """
        asked = os.environ.get(VARIABLE, "auto")
        if asked == "auto":
            return self.implementations.get(device) or self.implementations.get(ANY, self.reference)
        if asked != "reference":
            raise SaekitError(f"{VARIABLE} = '{asked}' is unknown{did_you_mean(asked, ('auto', 'reference'))}")
        return self.reference

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run what the device of the first argument takes."""
        first: Any = args[0]
        return self.chosen(first.device.type)(*args, **kwargs)


def operation(reference: Callable[P, R]) -> Operation[P, R]:
    """Name an operation by its reference."""
    return Operation(reference)


def load_backends() -> dict[str, Operation[..., Any]]:
    """All operations, with what every backend has registered."""
    for name in BACKENDS:
        import_module(f"saekit.kernels.{name}")
    return OPERATIONS
