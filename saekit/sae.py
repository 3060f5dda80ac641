"""What a dictionary is: a sparse autoencoder with its inference rule."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saekit.allocation import threshold_choice, token_choice
from saekit.code import SparseCode, TokenScale
from saekit.display import table
from saekit.errors import SaekitError
from saekit.files import expanded
from saekit.finite import not_finite, place_of
from saekit.formats.registry import save
from saekit.kernels.decode import decode
from saekit.sae_config import AffinityScale, Architecture, InputNormalization, SAEConfig

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["AffinityScale", "Architecture", "InputNormalization", "SAEConfig", "SparseAutoencoder"]

_EPS = 1e-5  # of the layer norm; OpenAI's and SAELens'
_CHUNK = 1 << 26  # pre-activations held at a time
_FACTS = {  # of the metadata, what a notebook shows
    "model": "model_name",
    "hook point": "hook_name",
    "text": "dataset_path",
    "context length": "context_size",
    "trained by": "variant",
    "training tokens": "training_tokens",
    "L0": "l0",
    "FVU": "fvu",
}


class SparseAutoencoder(nn.Module):
    """A dictionary: features f = rule((x − b_dec) W_enc + b_enc), reconstruction x̂ = f W_dec + b_dec.

    Attributes:
        W_enc: [d_in, d_sae]; stored so that a feature's column is contiguous.
        b_enc: [d_sae].
        W_dec: [d_sae, d_in].
        b_dec: [d_in].
        threshold: [d_sae], for ``jumprelu`` alone, else None.
    """

    threshold: Tensor | None

    def __init__(self, cfg: SAEConfig, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> None:
        super().__init__()
        self.cfg = cfg
        like: dict[str, Any] = {"dtype": dtype, "device": device}
        # A transposed view: the sparse kernels read the encoder a feature at a time.
        self.W_enc = nn.Parameter(torch.zeros(cfg.d_sae, cfg.d_in, **like).T)
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae, **like))
        self.W_dec = nn.Parameter(torch.zeros(cfg.d_sae, cfg.d_in, **like))
        self.b_dec = nn.Parameter(torch.zeros(cfg.d_in, **like))
        self.register_buffer("threshold", torch.zeros(cfg.d_sae, **like) if cfg.architecture == "jumprelu" else None)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are kept in, and reconstructions come in."""
        return self.W_dec.dtype

    def pre_activations(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Affinities of tokens and features, before the inference rule and relu."""
        return self._affine(self.normalised(x)[0])

    def normalised(self, x: Float[Tensor, "*batch d_in"]) -> tuple[Float[Tensor, "*batch d_in"], TokenScale | None]:
        """What is encoded of x, and what decoding puts back ([..., 1] each), None where that is x itself."""
        if self.cfg.input_normalization == "none":
            return x, None
        mean = x.mean(-1, keepdim=True)
        centred = x - mean
        scale = centred.std(-1, keepdim=True)
        return centred / (scale + _EPS), TokenScale(mean, scale)

    def _affine(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        centred = x - self.b_dec if self.cfg.apply_b_dec_to_input else x
        flat = torch.addmm(self.b_enc, centred.reshape(-1, self.cfg.d_in), self.W_enc)  # no second pass for the bias
        return flat.reshape(*x.shape[:-1], self.cfg.d_sae)

    def encode_sparse(self, x: Float[Tensor, "*batch d_in"]) -> SparseCode:
        """The code of the tokens of x, its leading dimensions flattened to n tokens.

        Raises:
            SaekitError: the last dimension of x is not d_in, or x holds NaN or infinite numbers.
        """
        return self.encode_finite(self._checked(x).reshape(-1, self.cfg.d_in))

    def encode_finite(self, x: Float[Tensor, "n d_in"]) -> SparseCode:
        """``encode_sparse`` without its checks: of finite activations in the dictionary's dtype."""
        rows = max(1, _CHUNK // self.cfg.d_sae)
        return SparseCode.concatenate([self._select(part) for part in torch.split(x, rows)])

    def _select(self, x: Float[Tensor, "n d_in"]) -> SparseCode:
        """The inference rule."""
        encoded, scale = self.normalised(x)
        pre = self._affine(encoded)
        if self.cfg.k is not None:
            code = token_choice(pre, self.cfg.k)
        elif self.threshold is None:
            code = threshold_choice(pre, pre.new_zeros(1))
        else:
            code = threshold_choice(pre, self.threshold, self.token_norms(x))
        return code if scale is None else replace(code, token_scale=scale)

    def token_norms(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n"] | None:
        """‖x − b_dec‖ where affinities are compared in units of it, else None."""
        return (x - self.b_dec).norm(dim=1) if self.cfg.affinity_scale == "token_norm" else None

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Feature activations as a dense tensor, with gradients.

        Raises:
            SaekitError: as ``encode_sparse``.
        """
        return self.encode_sparse(x).to_dense().reshape(*x.shape[:-1], self.cfg.d_sae)

    def decode(
        self, f: Float[Tensor, "*batch d_sae"] | SparseCode, x: Float[Tensor, "*batch d_in"] | None = None
    ) -> Float[Tensor, "*batch d_in"]:
        """Reconstructions of feature activations, [n, d_in] from a sparse code of n tokens.

        Args:
            f: a dense code, or a sparse one.
            x: the activations that f is the code of, where the dictionary normalises them and f is dense.

        Raises:
            SaekitError: the code is not one of d_sae features, or the dictionary normalises its input and neither x nor
                the code tells by how much.
        """
        if not isinstance(f, Tensor | SparseCode):
            raise SaekitError(f"a code is a SparseCode or a tensor [..., {self.cfg.d_sae}], not {type(f).__name__}")
        if (width := f.shape[-1] if len(f.shape) else 0) != self.cfg.d_sae:
            raise SaekitError(f"a code of {width} features does not fit a dictionary of {self.cfg.d_sae}")
        if isinstance(f, SparseCode):
            x_hat, scale = decode(f, self.W_dec, self.b_dec), f.token_scale
            x = None if x is None else x.reshape(-1, x.shape[-1])
        else:
            x_hat, scale = f.to(self.W_dec.dtype) @ self.W_dec + self.b_dec, None
        if self.cfg.input_normalization == "none":
            return x_hat
        if x is not None:
            scale = self.normalised(self._checked(x))[1]
        if scale is None:
            raise SaekitError(
                "this dictionary normalises each token: decode what encode_sparse gives, or decode(f, x) with x itself"
            )
        return x_hat * scale.scale + scale.mean

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Reconstructions x̂, the shape of x, in the dictionary's dtype.

        Raises:
            SaekitError: as ``encode_sparse``.
        """
        return self.decode(self.encode_sparse(x)).reshape(x.shape)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the dictionary to ``folder`` in the format of SAELens (thresholds by token norm, which it lacks, under
        an architecture name that SAELens refuses).

        Raises:
            SaekitError: the folder holds something and ``overwrite`` is not set, or JSON does not hold the metadata.
        """
        return save(self, expanded(folder), overwrite=overwrite)

    def with_metadata(self, **facts: Any) -> SparseAutoencoder:
        """This dictionary with further facts in its metadata; changes it in place and returns it.

        Raises:
            SaekitError: a fact is nothing that JSON holds.
        """
        self.cfg = replace(self.cfg, metadata={**self.cfg.metadata, **facts})
        return self

    def _checked(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise SaekitError(f"activations are a torch tensor [..., {self.cfg.d_in}], not of type {type(x).__name__}")
        if x.ndim == 0 or x.shape[-1] != self.cfg.d_in:
            width = x.shape[-1] if x.ndim else 0
            raise SaekitError(f"activations of width {width} do not fit a dictionary of d_in = {self.cfg.d_in}")
        x = x.to(self.W_dec.dtype)
        if (bad := not_finite(x)) is not None:
            kind = str(x.dtype).removeprefix("torch.")
            raise SaekitError(
                f"activations with NaN or infinite numbers, in {kind}, have no code: the first of {int(bad.sum())} "
                f"such tokens is at {place_of(bad)}"
            )
        return x

    def extra_repr(self) -> str:
        """One line for ``print(sae)``."""
        rule = f", k={self.cfg.k}" if self.cfg.k is not None else ""
        return f"{self.cfg.architecture}, d_in={self.cfg.d_in}, d_sae={self.cfg.d_sae}{rule}"

    def _repr_html_(self) -> str:
        """What it is, where it comes from, and how good it is, as far as its metadata say."""
        facts = self.cfg.metadata
        own = facts.get("saekit")
        facts = {**facts, **own} if isinstance(own, dict) else facts
        k = f", k = {self.cfg.k}" if self.cfg.k is not None else ""
        weights = f"W_enc [{self.cfg.d_in}, {self.cfg.d_sae}], W_dec [{self.cfg.d_sae}, {self.cfg.d_in}]"
        rows = [
            ("features", f"{self.cfg.d_sae:,}"),
            ("inference", self.cfg.architecture + k),
            ("weights", f"{weights}, {str(self.dtype).removeprefix('torch.')} on {self.device}"),
            *(
                (name, _shown(facts[key]))
                for name, key in _FACTS.items()
                if isinstance(facts.get(key), str | int | float)
            ),
        ]
        return table("SparseAutoencoder", rows)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
