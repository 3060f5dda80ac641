"""What a dictionary is: a sparse autoencoder with its inference rule."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field, replace
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from saekit import display
from saekit.allocation import threshold_choice, token_choice
from saekit.code import SparseCode, TokenScale
from saekit.errors import SaekitError
from saekit.files import expanded
from saekit.finite import not_finite, place_of
from saekit.kernels.decode import decode
from saekit.reading import check_json

if TYPE_CHECKING:
    from jaxtyping import Float

Architecture = Literal["topk", "jumprelu", "standard"]
AffinityScale = Literal["none", "token_norm"]
InputNormalization = Literal["none", "layer_norm"]
_EPS = 1e-5  # of the layer norm; OpenAI's and SAELens'
_CHUNK = 1 << 26  # pre-activations held at a time


@dataclass(frozen=True)
class SAEConfig:
    """What a dictionary is, apart from its weights.

    Attributes:
        d_in: width of the activations.
        d_sae: number of features.
        architecture: inference rule: ``topk`` (the k largest pre-activations of each token), ``jumprelu`` (those above
            a threshold) or ``standard`` (the positive ones).
        k: features a token, for ``topk`` alone.
        apply_b_dec_to_input: whether b_dec is subtracted from the input.
        affinity_scale: for ``jumprelu`` alone: ``token_norm`` compares thresholds with pre-activations divided by their
            token's ‖x − b_dec‖ (our reading of a batch rule's inference), ``none`` with pre-activations.
        input_normalization: ``layer_norm`` encodes x' = (x − μ) / (σ + 1e-5), with each token's mean μ and (unbiased)
            standard deviation σ over its entries, and decodes to x̂' σ + μ; as OpenAI's dictionaries do.
        metadata: where the dictionary comes from (``model_name``, ``hook_name``, ``dataset_path``, ...), of what JSON
            holds.
    """

    d_in: int
    d_sae: int
    architecture: Architecture
    k: int | None = None
    apply_b_dec_to_input: bool = True
    affinity_scale: AffinityScale = "none"
    input_normalization: InputNormalization = "none"
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("d_in", "d_sae", "k"):
            value: Any = getattr(self, name)
            if value is not None or name != "k":
                try:
                    object.__setattr__(self, name, index(value))  # numpy's whole numbers are none of JSON
                except TypeError:
                    raise SaekitError(f"{name} = {reprlib.repr(value)} is no whole number") from None
        if self.d_in < 1 or self.d_sae < 1:
            raise SaekitError(f"a dictionary of d_in = {self.d_in} and d_sae = {self.d_sae} has no features")
        if self.architecture not in ("topk", "jumprelu", "standard"):
            raise SaekitError(
                f"unknown architecture {reprlib.repr(self.architecture)}; choose from topk, jumprelu, standard"
            )
        if self.architecture == "topk" and not (self.k is not None and 1 <= self.k <= self.d_sae):
            raise SaekitError(f"k = {self.k} is not between 1 and the {self.d_sae} features of the dictionary")
        if self.architecture != "topk" and self.k is not None:
            raise SaekitError(f"k = {self.k} means nothing for '{self.architecture}'; it is for topk alone")
        if self.affinity_scale not in ("none", "token_norm"):
            raise SaekitError(f"unknown affinity_scale '{self.affinity_scale}'; choose from none, token_norm")
        if self.affinity_scale != "none" and self.architecture != "jumprelu":
            raise SaekitError(f"affinity_scale '{self.affinity_scale}' means nothing for '{self.architecture}'")
        if self.input_normalization not in ("none", "layer_norm"):
            raise SaekitError(f"unknown input_normalization '{self.input_normalization}'; choose from none, layer_norm")
        if self.input_normalization == "layer_norm" and (self.affinity_scale != "none" or self.d_in < 2):
            raise SaekitError("layer_norm is for activations of width 2 or more, without thresholds by token norm")
        if not isinstance(self.metadata, dict):
            raise SaekitError(f"metadata are a dict of facts, not of type {type(self.metadata).__name__}")
        check_json(self.metadata, "metadata")


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
        from saekit.formats import saelens

        return saelens.write(self, expanded(folder), overwrite=overwrite)

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
        return display.dictionary(self)
