"""Options that take one value are given once: of two values one would be lost without a word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from saekit.errors import SaekitError


def once(command: Any) -> Any:
    """Let a command, and those below it, refuse an option that is given again, unless it takes several values.

    Args:
        command: as Typer makes it; it is changed in place and returned.
    """
    make_parser = command.make_parser

    def strict(ctx: Any) -> Any:
        parser = make_parser(ctx)
        parse = parser.parse_args

        def parse_args(args: list[str]) -> Any:
            given = list(args)  # the parser takes them away
            values, rest, order = parse(args=args)
            for option in dict.fromkeys(order):
                may = getattr(option, "multiple", True) or option.is_eager  # arguments have no such attribute
                if order.count(option) > 1 and not may:
                    raise SaekitError(_told(option, given))
            return values, rest, order

        parser.parse_args = parse_args
        return parser

    command.make_parser = strict
    for each in getattr(command, "commands", {}).values():
        once(each)
    return command


def _told(option: Any, given: Sequence[str]) -> str:
    """The option and what it was given each time."""
    found = []
    for i, word in enumerate(given):
        name, assigned, _ = word.partition("=")
        if name in (*option.opts, *option.secondary_opts):
            found.append(word if option.is_flag or assigned else f"{word} {' '.join(given[i + 1 : i + 2])}")
    return f"{option.opts[0]} is given {len(found)} times ({', '.join(found)}), of which one would count; give it once"
