"""Settings: each part of saekit has a class of its own beside its code, strict and frozen; flags and help follow.

Nothing here, and no file that only declares settings, imports torch, so that the command line helps and completes at
once.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, create_model, field_validator
from pydantic.fields import FieldInfo

from saekit.errors import SaekitError, did_you_mean
from saekit.reading import is_plain

MANY = 2**31  # no count of features, tokens a batch or positions is as large
S = TypeVar("S", bound="Settings")


class Settings(BaseModel):
    """Base of every part's settings.

    Raises:
        SaekitError: a value is impossible or a key unknown; the message names the nearest right one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SaekitError(one_line(error, type(self).model_fields)) from None

    @field_validator("*")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, (str, Path)) and not is_plain(str(value)):
            raise ValueError(f"{info.field_name} = {reprlib.repr(str(value))} has characters that no name has")
        return value


def setting(
    default: Any = ...,
    *,
    description: str,
    values: tuple[str, ...] = (),
    resumable: bool = False,
    own: bool = False,
    decides: bool = True,
    within_width: bool = False,
    joined: Callable[[Sequence[str]], str] | None = None,
    **bounds: Any,
) -> Any:
    """One field of a ``Settings`` class.

    Args:
        default: its value where it is not given; with ``default_factory`` leave it out.
        description: what ``--help`` says of it.
        values: the values that it may have, where they are few; those of a ``Literal`` are known without.
        resumable: whether a run may go on with another value.
        own: whether runs that share a stream may differ in it.
        decides: whether the result of a run depends on it.
        within_width: whether it counts features, so that it is at most the width of the dictionary.
        joined: makes one value of those of a flag that is given several times.
        bounds: what pydantic's ``Field`` takes: ``gt``, ``le``, ``default_factory``, ...
    """
    facts: Any = {"values": values, "resumable": resumable, "own": own, "decides": decides}
    facts |= {"within_width": within_width, "joined": joined}
    given = {} if "default_factory" in bounds else {"default": default}
    return Field(**given, description=description, json_schema_extra=facts, **bounds)


def fact(field: FieldInfo, name: str) -> Any:
    """What ``setting`` was told of a field: ``values``, ``resumable``, ...; None for one made otherwise."""
    facts = field.json_schema_extra
    return facts.get(name) if isinstance(facts, dict) else None


def choices(field: FieldInfo) -> tuple[str, ...]:
    """The values that a setting may have, where they are few, else none."""
    annotation = field.annotation
    if get_origin(annotation) is Union:
        annotation = next((each for each in get_args(annotation) if get_origin(each) is Literal), annotation)
    return fact(field, "values") or (get_args(annotation) if get_origin(annotation) is Literal else ())


def partial(kind: type[S]) -> type[S]:
    """The same settings, each None where it is not given: for what something else names where the user does not."""
    fields: dict[str, Any] = {}
    for name, field in kind.model_fields.items():
        bare = FieldInfo.merge_field_infos(field, default=None, default_factory=None)
        fields[name] = (field.annotation | None if field.annotation is not None else None, bare)
    return create_model(f"Partial{kind.__name__}", __base__=kind, **fields)


def one_line(error: ValidationError, known: Any) -> str:
    """What is wrong with some settings, of which these keys are known."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown setting '{name}'{did_you_mean(name, known)}"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    return f"{name} = {reprlib.repr(first['input'])}: {first['msg'][0].lower()}{first['msg'][1:]}"
