"""The manifest of an activation cache: its provenance, and name, size and checksum of each shard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from typing_extensions import NotRequired, TypedDict

from saekit.activations.division import Count, Division
from saekit.activations.tokens import MASK
from saekit.errors import SaekitError
from saekit.files import replace_file
from saekit.reading import parse_json, read_bounded
from saekit.seal import BLANK, stamp, unbroken

MANIFEST = "manifest.json"
FORMAT: Literal[3] = 3  # those before were never released
_LONGEST = 1 << 26  # bytes

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class Shard(TypedDict):
    """A file of a cache.

    ``batch`` and ``row`` tell where its first token comes from: the number of the batch of contexts, and the row of the
    activations that it gave. They are missing where the activations came ready-made.
    """

    file: Annotated[str, Field(pattern=r"^shard-\d{5,9}\.safetensors$")]
    rows: Annotated[int, Field(gt=0, lt=2**48)]
    bytes: Annotated[int, Field(gt=0, lt=2**62)]
    xxh3_128: Digest
    batch: NotRequired[Count]
    row: NotRequired[Count]


class Provenance(TypedDict, total=False):
    """Where the data comes from; other facts may stand beside these."""

    __pydantic_config__ = ConfigDict(extra="allow", strict=True)  # type: ignore[misc]
    model: str
    revision: str
    model_dtype: str
    model_quantization: str
    harvest_batch: Count
    hook: str
    dataset: str
    dataset_fingerprint: str
    dataset_split: str
    dataset_config: str | None
    column: str
    tokens_column: str | None
    messages_column: str | None
    train_on: str
    chat_template: str
    group_column: str | None
    part: str
    tokenizer: str
    context_length: Annotated[int, Field(gt=0, lt=2**31)]
    prepend_bos: bool
    skip_first: Count
    pool: Count
    data_seed: Count
    max_norm: Annotated[float, Field(gt=0)]
    norm_limit: Annotated[float, Field(gt=0)]
    mask: str
    gradients: str


class Manifest(BaseModel):
    """What stands in ``manifest.json``; see ``ActivationCache``."""

    model_config = ConfigDict(strict=True, frozen=True, validate_by_name=True)

    seal: str = ""
    format: Literal[3] = FORMAT
    # before 0.2 it was called the passport
    provenance: Annotated[Provenance, Field(validation_alias=AliasChoices("provenance", "passport"))]
    d_in: Annotated[int, Field(gt=0, lt=2**31)]
    dtype: Literal["float32", "bfloat16", "float16"]
    gradients: bool = False
    skipped: Count = 0
    division: Division
    shards: Annotated[list[Shard], Field(min_length=1)]

    @model_validator(mode="after")
    def _checked(self) -> Manifest:
        row = self.d_in * (4 if self.dtype == "float32" else 2) * (1 + self.gradients) + 16
        if any(shard["bytes"] < shard["rows"] * row for shard in self.shards):
            raise ValueError("a shard has more rows than its bytes can hold")
        if self.division.rows.total != sum(shard["rows"] for shard in self.shards):
            raise ValueError("its division is of another number of rows")
        return self

    def write(self, folder: Path) -> None:
        """Write it, with its seal.

        Raises:
            WriteError: the disk does not take it.
        """
        text = json.dumps({**self.model_dump(), "seal": BLANK}, indent=2) + "\n"
        replace_file(folder / MANIFEST, lambda path: path.write_bytes(stamp(text.encode())))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read it.

        Raises:
            SaekitError: it is damaged, or of a format that this saekit does not know.
        """
        path = folder / MANIFEST
        content = read_bounded(path, _LONGEST)
        whole = unbroken(content)
        if whole is False:
            raise SaekitError(f"'{path}' is damaged: its seal is broken; harvest the cache again (--overwrite)")
        facts = parse_json(content, path)
        number = facts.get("format") if isinstance(facts, dict) else None
        if type(number) is int and 1 <= number < FORMAT:
            raise SaekitError(f"'{folder}' was written before the first release; harvest the cache again (--overwrite)")
        found: Manifest = checked(cls, facts, path)
        if whole is None:
            raise SaekitError(f"'{path}' is damaged: it has no seal; harvest the cache again (--overwrite)")
        return found


def as_known(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance with the facts that older ones do not tell, or told otherwise: BOS is a first position."""
    same = {"mask": MASK} if provenance.get("prepend_bos") and "skip_first" not in provenance else {}
    named = dict.fromkeys(("dataset_config", "tokens_column", "messages_column", "group_column"))
    before = {**named, "train_on": "all", "model_quantization": "none", "skip_first": 1, "pool": 0, "data_seed": 0}
    return {**before, **provenance, **same}


def first_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first fact of a provenance that was another before, other than how many contexts a pass has."""
    before = as_known(before)
    return next((fact for fact, value in now.items() if before.get(fact) != value and fact != "harvest_batch"), None)


def check_provenance(provenance: dict[str, Any]) -> None:
    """Raise SaekitError where a fact of a provenance has the wrong kind."""
    try:
        TypeAdapter(Provenance).validate_python(provenance)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise SaekitError(f"the provenance's {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def checked(kind: Any, value: Any, path: Path | str) -> Any:
    """A value of a pydantic model made of what JSON held.

    Raises:
        SaekitError: it does not fit; the message names the first place that does not.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "it"
        raise SaekitError(f"'{path}' is damaged: {place}: {first['msg']}") from None
