"""Which activations: of which model, at which hook point, on which text. One class for every command that asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import field_validator, model_validator
from typing_extensions import Self

from saekit.activations.mixture import from_yaml, mix
from saekit.errors import did_you_mean
from saekit.settings import MANY, Settings, setting

DEVICES = ("auto", "cpu", "cuda", "mps")


def known_device(value: str) -> str:
    """The name of a device, as it is: ``cpu``, ``cuda:1``. ValueError where there is no such kind."""
    if value.split(":")[0] not in DEVICES:
        raise ValueError(f"unknown device '{value}'{did_you_mean(value, DEVICES)}")
    return value


class SourceSettings(Settings):
    """Where activations come from, for training, caching, evaluation and repair alike."""

    model: str = setting("embedded", description="'embedded', a Hugging Face folder, a GGUF file, or a name on the hub")
    hook: str | None = setting(
        None, own=True, description="TransformerLens hook point; the residual after half of the blocks if not given"
    )
    dataset: str = setting(
        "python",
        joined=mix,
        description="'python', a local text/JSONL/CSV/Parquet file, or a name on the hub; given several times as "
        "NAME=WEIGHT, a mix by tokens",
    )
    column: str = setting("text", description="column of the dataset that holds the text")
    tokens_column: str | None = setting(None, description="column that holds lists of token ids, read in place of text")
    messages_column: str | None = setting(
        None, description="column that holds conversations, read in place of text by the tokenizer's chat template"
    )
    train_on: Literal["all", "assistant", "user"] = setting(
        "all", description="whose messages count; all for everything that the chat template writes"
    )
    group_column: str | None = setting(
        None, description="column whose value divides the documents: all of one value are trained on, or held out"
    )
    split: str = setting("train", description="split of a dataset of the hub")
    dataset_config: str | None = setting(None, description="configuration of a dataset that has several")
    streaming: bool = setting(True, description="read a dataset of the hub as it downloads")
    context_length: int | None = setting(
        None, gt=2, lt=MANY, description="tokens a context; 256 or the model's most if not given"
    )
    skip_first: int = setting(
        1, ge=1, lt=MANY, description="positions at the start of each context that are not used: attention sinks"
    )
    max_norm: float | None = setting(
        None,
        gt=1,
        description="leave out tokens of more than so many times the median norm (attention sinks), and count them",
    )
    prepend_bos: bool | None = setting(
        None, description="whether contexts begin with BOS; the model's own if not given"
    )
    model_dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", description="in which the model runs; auto is bfloat16 on a card that has it, else float32"
    )
    model_quantization: Literal["none", "8bit", "4bit"] = setting(
        "none", description="whether bitsandbytes quantises the model's weights as it is loaded"
    )
    model_device: str | None = setting(
        None, decides=False, description="where the model runs, if not where the dictionary is: cpu, cuda:1"
    )
    model_device_map: Literal["auto"] | None = setting(
        None, decides=False, description="auto lays the model's layers over all cards"
    )

    @field_validator("dataset", mode="before")
    @classmethod
    def _mix(cls, value: Any) -> Any:
        return from_yaml(value)  # {wiki: 0.7, code: 0.3}

    @field_validator("model_device")
    @classmethod
    def _known_device(cls, value: str | None) -> str | None:
        return None if value is None else known_device(value)

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.model_device is not None and self.model_device_map is not None:
            raise ValueError("--model-device and --model-device-map both say where the model is; give one of them")
        return self

    @model_validator(mode="after")
    def _one_column(self) -> Self:
        own = self.column if self.column not in (None, "text") else None
        named = {"column": own, "tokens-column": self.tokens_column, "messages-column": self.messages_column}
        flags = [f"--{flag} {name}" for flag, name in named.items() if name is not None]
        if len(flags) > 1:
            raise ValueError(f"documents are read from one column, {' or '.join(flags)}")
        if self.train_on not in (None, "all") and self.messages_column is None:
            raise ValueError(f"--train-on {self.train_on} needs --messages-column, the column of the conversations")
        return self


class StreamSettings(SourceSettings):
    """Where activations come from, and in which order the contexts of the training text reach the model."""

    pool: int | None = setting(
        None,
        ge=0,
        lt=2**50,
        description="tokens of text that contexts are drawn from at random (9 bytes each); as many as are trained on, "
        "at most 8M, if not given; 0 keeps the order of the text",
    )
    data_seed: int = setting(0, ge=0, lt=2**31, description="of the order in which contexts are drawn")
    harvest_batch: int | None = setting(
        None,
        ge=0,
        lt=2**20,
        decides=False,
        description="contexts that the model takes at a time; on a card as many as half of its free memory holds, if "
        "not given; 0, as on a CPU: 32, or 8 where gradients are taken",
    )

    def pooled(self, tokens: int) -> StreamSettings:
        """The same, with the pool that so many training tokens decide where none is given."""
        return self if self.pool is not None else self.model_copy(update={"pool": min(_POOL, tokens)})

    @classmethod
    def of(cls, provenance: Mapping[str, Any]) -> StreamSettings | None:
        """The settings that made activations of this provenance; None where they were not harvested by saekit."""
        provenance = {**BEFORE, **provenance}
        names = {field: FACTS.get(field, field) for field in cls.model_fields}
        told = {field: provenance[name] for field, name in names.items() if provenance.get(name) is not None}
        needed = {"model", "hook", "dataset", "column", "split", "context_length", "model_dtype"}
        return cls(**told) if needed <= told.keys() and provenance.get("part") == "train" else None


BEFORE = {"pool": 0, "harvest_batch": 0}  # before 0.2 the text came in its own order, 32 contexts at a time
_POOL = 8_000_000
FACTS = {"split": "dataset_split"}  # settings that a provenance calls otherwise


class HarvestPlan(StreamSettings):
    """What a cache is to hold. Every field is a flag of ``saekit cache``."""

    tokens: int = setting(2_000_000, gt=0, lt=2**62, description="tokens to store")
    dtype: str = setting(
        "bfloat16", values=("float32", "bfloat16", "float16"), description="how activations are stored"
    )
    gradients: bool = setting(False, description="store the gradients of the next-token loss too, for gradient_topk")
    skip_bad_tokens: bool = setting(False, description="leave out tokens that are NaN or infinite, and count them")

    @property
    def source(self) -> StreamSettings:
        """Where the activations come from."""
        return StreamSettings(**self.model_dump(include=set(StreamSettings.model_fields))).pooled(self.tokens)
