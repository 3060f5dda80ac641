"""Settings of a run that hold whatever its variant is; nothing here imports torch."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator, model_validator

from saekit.activations.settings import DEVICES, known_device
from saekit.errors import did_you_mean
from saekit.files import expanded
from saekit.settings import MANY, Settings, setting
from saekit.trainers.loggers import LOGGERS


class DataSettings(Settings):
    """How activations reach the trainer."""

    cache: Path | None = setting(
        None, decides=False, description="train on this activation cache instead of a live harvest"
    )
    buffer: int = setting(131_072, gt=0, lt=MANY, description="tokens that are shuffled together")
    skip_bad_tokens: bool = setting(
        False, resumable=True, description="leave out tokens that are NaN or infinite, and count them"
    )
    calibration_tokens: int = setting(
        262_144, gt=0, lt=2**50, description="tokens on which inference thresholds are set"
    )

    @field_validator("cache")
    @classmethod
    def _home(cls, value: Path | None) -> Path | None:
        return None if value is None else expanded(value)


class DictionarySettings(Settings):
    """How wide the dictionary is, and what it starts from."""

    width: int | None = setting(None, gt=0, lt=MANY, own=True, description="number of features (d_sae)")
    expansion: float = setting(16, gt=0, lt=1e6, description="width as a multiple of d_in, where no width is given")
    init: str | None = setting(
        None, own=True, description="dictionary to start from, in any format that is read; its width, if none is given"
    )


class OptimizerSettings(Settings):
    """How long and how fast it is trained."""

    tokens: int = setting(2_000_000, gt=0, lt=2**50, description="training tokens")
    batch_size: int = setting(4096, gt=0, lt=MANY, description="tokens a step")
    lr: float | None = setting(
        None, gt=0, description="peak learning rate of Adam; 4e-3 for up to 1,000 steps, falling with their root beyond"
    )
    warmup: float = setting(0.05, ge=0, le=1, description="share of the steps in which the learning rate rises")
    decay: float = setting(0.3, ge=0, le=1, description="share of the steps, at the end, in which it falls to zero")
    clip: float = setting(1.0, gt=0, description="largest norm of the gradient")
    dead_after: int | None = setting(
        None,
        gt=0,
        lt=2**50,
        description="tokens without firing that make a feature count as dead; a tenth of the run, at most 10M",
    )
    precision: Literal["fp32", "bf16_select"] | None = setting(
        None,
        description="bf16_select finds candidates by a bfloat16 product and decides in float32: the same matches, "
        "quicker where the processor has such instructions, which decides if not given",
    )

    @model_validator(mode="after")
    def _fits(self) -> OptimizerSettings:
        if self.tokens < self.batch_size:
            raise ValueError(f"tokens = {self.tokens} are fewer than one batch of batch_size = {self.batch_size}")
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup = {self.warmup} and decay = {self.decay} overlap: together they are at most 1")
        return self

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""
        return self.tokens // self.batch_size

    @property
    def peak_lr(self) -> float:
        """``lr``, or 4e-3 · √(1000 / steps), at most 4e-3: short runs need large steps (our reading)."""
        return self.lr or 4e-3 * min(1.0, (1000 / self.steps) ** 0.5)


class RunSettings(Settings):
    """Where a run lives, and what it tells."""

    out: Path | None = setting(
        None, own=True, decides=False, description="folder of the run; runs/VARIANT if not given"
    )
    seed: int = setting(0, ge=0, lt=2**31, description="of every random choice")
    device: str = setting("auto", values=DEVICES, decides=False, description="auto, cpu, cuda, cuda:1, mps")
    log_every: int = setting(10, gt=0, lt=2**50, decides=False, description="steps between lines of metrics.jsonl")
    checkpoint_every: int = setting(500, gt=0, lt=2**50, decides=False, description="steps between checkpoints")
    log: list[str] = setting(
        default_factory=list,
        values=(*LOGGERS, "none"),
        resumable=True,
        description="where metrics go beside metrics.jsonl: "
        + ", ".join(LOGGERS)
        + "; none for nowhere, when resuming",
    )

    @field_validator("log", mode="before")
    @classmethod
    def _loggers(cls, value: Any) -> Any:
        names = [value] if isinstance(value, str) else value
        if isinstance(names, list):
            known = (*LOGGERS, "none")
            for name in names:
                if name not in known:
                    raise ValueError(f"unknown logger {reprlib.repr(name)}{did_you_mean(str(name), known)}")
            return [name for name in dict.fromkeys(names) if name != "none"]
        return value

    @field_validator("device")
    @classmethod
    def _known(cls, value: str) -> str:
        return known_device(value)

    @field_validator("out")
    @classmethod
    def _home(cls, value: Path | None) -> Path | None:
        return None if value is None else expanded(value)
