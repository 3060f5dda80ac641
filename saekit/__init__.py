"""saekit: sparse autoencoders of language-model activations, trained, loaded and judged.

    import saekit
    sae = saekit.load("runs/demo/sae")
    f = sae.encode(x)
    with saekit.splice(model, sae, steer={123: 8.0}, add_error=True):
        ...

Loading a dictionary needs torch and safetensors alone (its seal is compared where xxhash is there too);
``saekit.activations``, ``saekit.trainers`` and ``saekit.evals`` bring in the rest.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saekit.code import SparseCode
    from saekit.errors import SaekitError
    from saekit.formats import load
    from saekit.sae import SAEConfig, SparseAutoencoder
    from saekit.splice import splice

__version__ = "0.1.0"
__all__ = ["SAEConfig", "SaekitError", "SparseAutoencoder", "SparseCode", "load", "splice"]

_HOMES = {
    "SAEConfig": "saekit.sae",
    "SaekitError": "saekit.errors",
    "SparseAutoencoder": "saekit.sae",
    "SparseCode": "saekit.code",
    "load": "saekit.formats",
    "splice": "saekit.splice",
}

_checkout = Path(__file__).parents[1]
if (_checkout / "pyproject.toml").is_file() and not (Path(__file__).parent / "activations").exists():
    __path__.append(str(_checkout))  # where activations, trainers and evals stand beside this folder


class _Package(ModuleType):
    """Imports what is public when it is first asked for: the command line helps and completes without torch."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'saekit' has no attribute '{name}'")
        value = getattr(import_module(_HOMES[name]), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):  # splice is the function, not the module it is in
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
