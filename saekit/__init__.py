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

from pathlib import Path
from typing import TYPE_CHECKING

from saekit.lazy import lazy
from saekit.version import __version__

if TYPE_CHECKING:
    from saekit.code import SparseCode
    from saekit.errors import SaekitError
    from saekit.loading import load
    from saekit.sae import SparseAutoencoder
    from saekit.sae_config import SAEConfig
    from saekit.splicing import splice

__all__ = ["SAEConfig", "SaekitError", "SparseAutoencoder", "SparseCode", "__version__", "load", "splice"]

__getattr__, __dir__ = lazy(  # the command line helps and completes without torch
    __name__,
    {
        "SAEConfig": "sae_config",
        "SaekitError": "errors",
        "SparseAutoencoder": "sae",
        "SparseCode": "code",
        "load": "loading",
        "splice": "splicing",
    },
)

_checkout = Path(__file__).parents[1]
if (_checkout / "pyproject.toml").is_file() and not (Path(__file__).parent / "activations").exists():
    __path__.append(str(_checkout))  # where activations, trainers and evals stand beside this folder
