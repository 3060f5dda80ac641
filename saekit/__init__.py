"""saekit: sparse autoencoders of language-model activations, trained, loaded and judged.

    import saekit
    sae = saekit.load("runs/demo/sae")
    f = sae.encode(x)
    with saekit.splice(model, sae, steer={123: 8.0}, add_error=True):
        ...

Loading a dictionary needs torch and safetensors alone; ``saekit.activations``, ``saekit.trainers`` and ``saekit.evals``
bring in the rest.
"""

from saekit.code import SparseCode
from saekit.errors import SaekitError
from saekit.formats import load
from saekit.sae import SAEConfig, SparseAutoencoder
from saekit.splice import splice

__version__ = "0.1.0"
__all__ = ["SAEConfig", "SaekitError", "SparseAutoencoder", "SparseCode", "load", "splice"]
