"""Flags of a command from the settings of its parts, so that names, types, bounds and help stand in one place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

from saekit.settings import Settings, choices

_KINDS: dict[Any, Any] = {int: int, float: float, int | None: int, float | None: float, bool: bool, bool | None: bool}


def flags(
    kind: type[Settings], panel: str, *, leave_out: Iterable[str] = (), repeated: Mapping[str, str] | None = None
) -> list[inspect.Parameter]:
    """One flag for each setting of a part; a flag that is not given is None, so that a YAML file or a default decides.

    Args:
        kind: the settings.
        panel: the heading under which ``--help`` shows them.
        leave_out: settings that are no flags of this command.
        repeated: flags that may be given again, with what to say of it.
    """
    repeated, left_out = repeated or {}, set(leave_out)
    return [
        flag(name, field, panel, repeated.get(name))
        for name, field in kind.model_fields.items()
        if name not in left_out
    ]


def flag(name: str, field: FieldInfo, panel: str, again: str | None = None) -> inspect.Parameter:
    """The flag of one setting."""
    stated = field.default_factory is None and field.default is not None and field.default is not False
    default = f" [default: {field.default}]" if stated else ""
    known = choices(field)
    option = typer.Option(
        help=f"{field.description}{default}{again or ''}",
        show_default=False,
        autocompletion=among(*known) if known else None,
        rich_help_panel=panel,
    )
    kind: Any = Annotated[(list[str] if again is not None else _KINDS.get(field.annotation, str)) | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)


def with_flags(command: Callable[..., Any], parameters: list[inspect.Parameter]) -> None:
    """Let Typer see these parameters beside the command's own; the command takes them by ``**given``."""
    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
    command.__signature__ = inspect.Signature([*own, *parameters])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in (*own, *parameters)}


def among(*values: str) -> Callable[[str], list[str]]:
    """For a flag's ``autocompletion``: those of some values that begin with what is typed."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]
