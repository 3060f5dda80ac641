"""What a training run is asked to do: one flat config, from YAML, flags, or Python."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from saekit.errors import SaekitError, did_you_mean
from saekit.files import expanded
from saekit.kernels.scores import has_fast_bfloat16
from saekit.reading import is_plain, read_yaml
from saekit.trainers.auxiliary import POOLS
from saekit.trainers.loggers import LOGGERS
from saekit.trainers.variants import VARIANTS

_MANY = 2**31


class TrainConfig(BaseModel):
    """A training run. Every field is a key of ``config.yaml`` and a flag of ``saekit train``.

    Raises:
        SaekitError: a value is impossible or a key unknown; the message names the nearest right one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    variant: str = Field("mutual_choice", description="allocation rule: " + ", ".join(VARIANTS))
    out: Path = Field(
        default_factory=lambda data: Path("runs") / data.get("variant", "run"),
        description="folder of the run; runs/VARIANT if not given",
    )
    # where activations come from
    model: str = Field("embedded", description="'embedded', a Hugging Face folder, a GGUF file, or a name on the hub")
    hook: str | None = Field(
        None, description="TransformerLens hook point; the residual after half of the blocks if not given"
    )
    dataset: str = Field("python", description="'python', a local text/JSONL/Parquet file, or a name on the hub")
    column: str = Field("text", description="column of the dataset that holds the text")
    split: str = Field("train", description="split of a dataset of the hub")
    dataset_config: str | None = Field(None, description="configuration of a dataset that has several")
    streaming: bool = Field(True, description="read a dataset of the hub as it downloads")
    context_length: int | None = Field(None, gt=2, lt=_MANY, description="tokens a context; 256 or the model's most")
    skip_first: int = Field(
        1, ge=1, lt=_MANY, description="positions at the start of each context that are not used: attention sinks"
    )
    max_norm: float | None = Field(
        None,
        gt=1,
        description="leave out tokens of more than so many times the median norm (attention sinks), and count them",
    )
    cache: Path | None = Field(None, description="train on this activation cache instead of a live harvest")
    buffer: int = Field(131_072, gt=0, lt=_MANY, description="tokens that are shuffled together")
    # the dictionary
    width: int | None = Field(None, gt=0, lt=_MANY, description="number of features (d_sae)")
    expansion: float = Field(16, gt=0, lt=1e6, description="width as a multiple of d_in, where no width is given")
    k: int = Field(32, gt=0, lt=_MANY, description="mean number of active features a token")
    # what variants and losses take
    affinity_scale: Literal["none", "token_norm"] = Field(
        "token_norm", description="what batch rules compare: pre-activations, or those over the token's norm"
    )
    feature_choice_fraction: float = Field(
        0.1, gt=0, le=1, description="feature_choice: share of the steps, at the end, after mutual choice"
    )
    budgets: Literal["zipf", "uniform"] = Field("zipf", description="feature_choice: how features share the matches")
    zipf_exponent: float | None = Field(None, ge=0, description="feature_choice: of the law; fitted if not given")
    zipf_shift: float | None = Field(None, ge=0, description="feature_choice: of the law; fitted if not given")
    beta: float = Field(1.0, ge=0, description="gradient_topk: weight of the gradient in the selection; 0 is TopK")
    aux: str = Field("none", description="auxiliary loss: " + ", ".join(POOLS))
    aux_alpha: float = Field(1 / 32, ge=0, description="weight of the auxiliary loss")
    k_aux: int | None = Field(None, gt=0, lt=_MANY, description="auxiliary features a token; half of d_in if not given")
    tau: float = Field(
        0.1, ge=0, description="aux_zipf: below this share of the Zipf curve is underutilised; 0 is aux_k"
    )
    # the optimisation
    tokens: int = Field(2_000_000, gt=0, lt=2**50, description="training tokens")
    batch_size: int = Field(4096, gt=0, lt=_MANY, description="tokens a step")
    lr: float | None = Field(
        None, gt=0, description="peak learning rate of Adam; 4e-3 for up to 1,000 steps, falling with their root beyond"
    )
    warmup: float = Field(0.05, ge=0, le=1, description="share of the steps in which the learning rate rises")
    decay: float = Field(0.3, ge=0, le=1, description="share of the steps, at the end, in which it falls to zero")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    dead_after: int | None = Field(
        None,
        gt=0,
        lt=2**50,
        description="tokens without firing that make a feature count as dead; a tenth of the run, at most 10M",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="of every random choice")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    precision: Literal["fp32", "bf16_select"] = Field(
        default_factory=lambda data: "bf16_select" if has_fast_bfloat16(data.get("device", "auto")) else "fp32",
        description="bf16_select finds candidates by a bfloat16 product and decides in float32: the same matches, "
        "quicker where the processor has such instructions, which decides if not given",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of the language model")
    # housekeeping
    skip_bad_tokens: bool = Field(False, description="leave out tokens that are NaN or infinite, and count them")
    calibration_tokens: int = Field(262_144, gt=0, lt=2**50, description="tokens on which inference thresholds are set")
    log_every: int = Field(10, gt=0, lt=2**50, description="steps between lines of metrics.jsonl")
    checkpoint_every: int = Field(500, gt=0, lt=2**50, description="steps between checkpoints")
    log: list[str] = Field(
        default_factory=list,
        description="where metrics go beside metrics.jsonl: "
        + ", ".join(LOGGERS)
        + "; none for nowhere, when resuming",
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SaekitError(_one_line(error)) from None

    @field_validator("*")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, (str, Path)) and not is_plain(str(value)):
            raise ValueError(f"{info.field_name} = {reprlib.repr(str(value))} has characters that no name has")
        return value

    @field_validator("log", mode="before")
    @classmethod
    def _loggers(cls, value: Any) -> Any:
        names = [value] if isinstance(value, str) else value
        if isinstance(names, list):
            for name in names:
                if name not in choices("log"):
                    raise ValueError(f"unknown logger {reprlib.repr(name)}{did_you_mean(str(name), choices('log'))}")
            return [name for name in dict.fromkeys(names) if name != "none"]
        return value

    @field_validator("variant", "aux", "device")
    @classmethod
    def _known(cls, value: str, info: ValidationInfo) -> str:
        known = choices(info.field_name or "")
        what = "auxiliary loss" if info.field_name == "aux" else info.field_name
        name = value.split(":")[0] if what == "device" else value  # cuda:1
        if name not in known:
            raise ValueError(f"unknown {what} '{value}'{did_you_mean(value, known)}")
        return value

    @field_validator("out", "cache")
    @classmethod
    def _home(cls, value: Path | None) -> Path | None:
        return None if value is None else expanded(value)

    @model_validator(mode="after")
    def _fits(self) -> TrainConfig:
        if self.width is not None:
            self.check_width(self.width)
        if self.tokens < self.batch_size:
            raise ValueError(f"tokens = {self.tokens} are fewer than one batch of batch_size = {self.batch_size}")
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup = {self.warmup} and decay = {self.decay} overlap: together they are at most 1")
        return self

    def check_width(self, width: int) -> None:
        """Raise SaekitError where more features a token are asked for than there are."""
        for name in ("k", "k_aux"):
            value = getattr(self, name)
            if value is not None and value > width:
                raise SaekitError(f"{name} = {value} is larger than the width of {width} features")

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""
        return self.tokens // self.batch_size

    @property
    def peak_lr(self) -> float:
        """``lr``, or 4e-3 · √(1000 / steps), at most 4e-3: short runs need large steps (our reading)."""
        return self.lr or 4e-3 * min(1.0, (1000 / self.steps) ** 0.5)

    @classmethod
    def from_yaml(cls, path: str | Path | None, **flags: Any) -> TrainConfig:
        """A config from a YAML file (or none) and flags that win over it; flags of None are left out.

        Raises:
            SaekitError: the file is missing, is no mapping of keys, or names what is impossible.
        """
        values = {} if path is None else read_yaml(path)
        if flags.get("expansion") is not None and flags.get("width") is None:
            values.pop("width", None)  # both name the width
        return cls(**{**values, **{key: value for key, value in flags.items() if value is not None}})

    def to_yaml(self) -> str:
        """The config as YAML; ``from_yaml`` reads it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def choices(setting: str) -> tuple[str, ...]:
    """The values that a setting may have, where they are few; a device may have a number after a colon."""
    if setting == "device":
        return ("auto", "cpu", "cuda", "mps")
    if setting in ("variant", "aux", "log"):
        return {"variant": tuple(VARIANTS), "aux": tuple(POOLS), "log": (*LOGGERS, "none")}[setting]
    annotation = TrainConfig.model_fields[setting].annotation
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown setting '{name}'{did_you_mean(name, TrainConfig.model_fields)}"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    return f"{name} = {reprlib.repr(first['input'])}: {first['msg'][0].lower()}{first['msg'][1:]}"
