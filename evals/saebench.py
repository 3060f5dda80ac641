"""A dictionary as SAEBench takes one of another package: a config that it writes to, with metadata by attribute."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from saekit.activations.model import model_path
from saekit.code import SparseCode
from saekit.errors import SaekitError
from saekit.sae import SAEConfig, SparseAutoencoder

if TYPE_CHECKING:
    from jaxtyping import Float


class Facts(dict[str, Any]):
    """Metadata that is also read and written by attribute; what is not there is None, as in SAELens."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)

    __setattr__ = dict.__setitem__


class SAEBenchConfig(SAEConfig):
    """A config on which SAEBench keeps what it found out about the dictionary.

    Attributes:
        dtype: name of the weights' dtype.
        normalize_activations: always ``none``: the dictionary takes raw activations.
    """

    dtype: str
    normalize_activations = "none"

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """What SAEBench writes into its results."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"dtype": self.dtype}


class SAEBenchDictionary(SparseAutoencoder):
    """A dictionary whose dense codes decode without further arguments, and whose heads are flat already."""

    hook_z_reshaping_mode = False
    _encoded: Tensor | None = None

    def turn_off_forward_pass_hook_z_reshaping(self) -> None:
        """Nothing: SAEBench flattens heads itself after this."""

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Feature activations; x is kept where decoding needs it."""
        self._encoded = x if self.cfg.input_normalization != "none" else None
        return super().encode(x)

    def decode(
        self, f: Float[Tensor, "*batch d_sae"] | SparseCode, x: Float[Tensor, "*batch d_in"] | None = None
    ) -> Float[Tensor, "*batch d_in"]:
        """Reconstructions; tokens that were normalised get back the scale of those that were encoded last."""
        return super().decode(f, self._encoded if x is None and isinstance(f, Tensor) else x)


def for_saebench(sae: SparseAutoencoder) -> SAEBenchDictionary:
    """The same dictionary, ready for SAEBench's evaluations; shares its weights.

    SAEBench 0.6.0 asks of a dictionary ``encode``, ``decode``, ``W_enc``, ``b_enc``, ``W_dec``, ``device``, ``dtype``
    and ``to``, which it has anyway, and of its ``cfg`` ``to_dict``, ``dtype``, ``normalize_activations`` and metadata
    that it reads by attribute, completes and copies onto ``cfg``. A model that is a local folder, the embedded one too,
    is named by its full path.

    Raises:
        SaekitError: the dictionary does not name its model or its hook point.
    """
    facts = Facts(sae.cfg.metadata)
    for name in ("model_name", "hook_name"):
        if not facts.get(name):
            raise SaekitError(f"SAEBench needs the dictionary's {name}; give it by sae.with_metadata({name}=...)")
    folder = Path(model_path(facts["model_name"]))
    if folder.is_dir():
        facts["model_name"] = str(folder.resolve())
    if facts.get("prepend_bos") is None:
        facts["prepend_bos"] = True  # SAEBench's default
    cfg = SAEBenchConfig(**{f.name: getattr(sae.cfg, f.name) for f in fields(sae.cfg)} | {"metadata": facts})
    cfg.dtype = str(sae.dtype).removeprefix("torch.")
    evaluated = SAEBenchDictionary(cfg, sae.dtype, "meta")  # no memory
    evaluated.load_state_dict(sae.state_dict(), assign=True)
    return evaluated.train(sae.training)
