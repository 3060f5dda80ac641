"""What the formats share of reading configs of others."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saekit.errors import SaekitError, first_line
from saekit.reading import check_inside, read_json


@contextmanager
def understanding(path: Path) -> Iterator[None]:
    """While it is entered, what a config lacks, or has of the wrong kind, becomes one line that names the file.

    Raises:
        SaekitError: in place of a KeyError, ValueError, TypeError or AttributeError.
    """
    try:
        yield
    except SaekitError:
        raise
    except KeyError as error:
        raise SaekitError(f"'{path}' lacks or does not know {first_line(error)}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise SaekitError(f"'{path}' is damaged: {first_line(error)}") from None


def mapping(value: Any) -> dict[str, Any]:
    """The value, once it is sure that it is a mapping; otherwise a TypeError."""
    if not isinstance(value, dict):
        raise TypeError("it is no mapping")
    return value


def positive_int(cfg: Mapping[str, Any], key: str) -> int:
    """A size or count in a config; otherwise a KeyError or ValueError."""
    value = cfg[key]
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError(f"{key} = {reprlib.repr(value)}")
    return value


def flag(cfg: Mapping[str, Any], key: str, default: bool) -> bool:
    """A yes or no (or null) in a config, ``default`` where it is missing; otherwise, as for "false", a ValueError."""
    value = cfg.get(key, default)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{key} = {reprlib.repr(value)}")
    return bool(value)


def refuse(asked: bool, path: Path, what: str) -> None:
    """Raise SaekitError where a file asks for something that would silently change the features."""
    if asked:
        raise SaekitError(f"'{path}' asks for {what}, which saekit does not read")


def own_metadata(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What saekit has written into the config of another package."""
    return mapping(mapping(cfg.get("saekit", {})).get("metadata", {}))


def optional_json(path: Path) -> dict[str, Any]:
    """What a small JSON file beside a dictionary tells; nothing where it is missing, or no mapping that can be read."""
    try:
        if not path.is_file():
            return {}
        check_inside(path, path.parent)
        return mapping(read_json(path))
    except (SaekitError, TypeError):
        return {}


def known(**facts: Any) -> dict[str, Any]:
    """Metadata without what is unknown or of the wrong kind; texts and whole numbers alone are kept."""
    return {name: value for name, value in facts.items() if (isinstance(value, str) and value) or type(value) is int}


def length(value: Any) -> int | None:
    """A context's length, where it can be one."""
    return value if type(value) is int and 0 < value < 2**31 else None
