"""Flags of a command from the settings of its parts, so that names, types, bounds and help stand in one place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

from saekit.errors import SaekitError
from saekit.settings import Settings, choices, fact

_KINDS: dict[Any, Any] = {int: int, float: float, int | None: int, float | None: float, bool: bool, bool | None: bool}


def flags(
    kind: type[Settings],
    panel: str,
    *,
    leave_out: Iterable[str] = (),
    repeated: Mapping[str, str] | None = None,
    old: Mapping[str, str] | None = None,
    several: bool = False,
) -> list[inspect.Parameter]:
    """One flag for each setting of a part; a flag that is not given is None, so that a YAML file or a default decides.

    Args:
        kind: the settings.
        panel: the heading under which ``--help`` shows them.
        leave_out: settings that are no flags of this command.
        repeated: flags that may be given again, with what to say of it.
        old: names that flags had before, by their new ones.
        several: whether a flag may have several values, with commas between them.
    """
    repeated, old, left_out = repeated or {}, old or {}, set(leave_out)
    return [
        flag(name, field, panel, repeated.get(name), old.get(name), several=several)
        for name, field in kind.model_fields.items()
        if name not in left_out
    ]


def flag(
    name: str,
    field: FieldInfo,
    panel: str,
    again: str | None = None,
    old: str | None = None,
    of: Sequence[str] = (),
    note: str = "",
    several: bool = False,
) -> inspect.Parameter:
    """The flag of one setting.

    Args:
        name: of the setting.
        field: what it is.
        panel: its heading.
        again: what to say of a flag that may be given several times.
        old: a name that it had before.
        of: the variants or losses that have it, where those are few.
        note: what to say at the end.
        several: whether it may have several values, with commas between them.
    """
    stated = field.default_factory is None and field.default is not None and field.default is not False
    default = f" [default: {field.default}]" if stated else ""
    owners = f"{', '.join(of)}: " if of else ""
    known, joins = choices(field), fact(field, "joined") is not None
    names = [f"--{old.replace('_', '-')}", f"--{name.replace('_', '-')}"] if old else []
    option = typer.Option(
        *names,
        help=f"{owners}{field.description}{default}{again or ''}{note}",
        show_default=False,
        autocompletion=among(*known) if known else None,
        rich_help_panel=panel,
    )
    plain = str if several and takes_several(name, field) else _KINDS.get(field.annotation, str)
    if plain is str and field.annotation in _KINDS:
        option.metavar = _KINDS[field.annotation].__name__.upper() + ",..."
    kind: Any = Annotated[(list[str] if joins or again is not None else plain) | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)


def takes_several(name: str, field: FieldInfo) -> bool:
    """Whether runs may differ in a setting by values with commas between them: numbers, names of a few, hooks."""
    number = _KINDS.get(field.annotation, bool) is not bool
    return name == "hook" or (name not in ("log", "device") and (number or bool(choices(field))))


def values_of(name: str, given: str | list[str] | None, field: FieldInfo | None = None) -> Any:
    """The values of a flag, with commas between them or given several times; a single one as it is.

    Raises:
        SaekitError: the setting is a number and one of them is none.
    """
    kind = _KINDS.get(field.annotation, str) if field is not None else str
    parts = [part.strip() for each in ([given] if isinstance(given, str) else given or []) for part in each.split(",")]
    try:
        values = [kind(part) for part in parts]
    except ValueError:
        wanted = "whole numbers" if kind is int else "numbers"
        raise SaekitError(f"--{name.replace('_', '-')} takes {wanted}, not '{given}'") from None
    return values if len(values) > 1 else values[0] if values else None


def joined(given: Mapping[str, Any], kind: type[Settings]) -> dict[str, Any]:
    """What was given for settings, those whose flag may be given several times for one value put together."""
    makers = {name: maker for name, field in kind.model_fields.items() if (maker := fact(field, "joined"))}
    return {
        name: (makers[name](value) if value else None) if name in makers and isinstance(value, list) else value
        for name, value in given.items()
    }


def named_flag(name: str, what: str, registry: Iterable[str], default: str, panel: str) -> inspect.Parameter:
    """The flag that chooses one entry of a registry."""
    option = typer.Option(
        help=f"{what}: {', '.join(registry)} [default: {default}]",
        show_default=False,
        autocompletion=among(*registry),
        rich_help_panel=panel,
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, option]
    )


def panel_of(parameter: inspect.Parameter) -> str:
    """The heading of a flag."""
    return str(parameter.annotation.__metadata__[0].rich_help_panel)


def with_flags(command: Callable[..., Any], parameters: list[inspect.Parameter], own_panel: str | None = None) -> None:
    """Let Typer see these parameters beside the command's own; the command takes them by ``**given``.

    Args:
        command: it is changed in place.
        parameters: flags of settings.
        own_panel: a heading for the flags that stand in the command's signature.
    """
    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
    for each in own if own_panel else ():
        each.default.rich_help_panel = own_panel
    every = sorted([*parameters, *own], key=lambda parameter: parameter.kind)
    command.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in every}


def among(*values: str) -> Callable[[str], list[str]]:
    """For a flag's ``autocompletion``: those of some values that begin with what is typed."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]
