"""What a dictionary is, apart from its weights; nothing here imports torch."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field
from operator import index
from typing import Any, Literal

from saekit.errors import SaekitError
from saekit.reading import check_json

Architecture = Literal["topk", "jumprelu", "standard"]
AffinityScale = Literal["none", "token_norm"]
InputNormalization = Literal["none", "layer_norm"]


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
