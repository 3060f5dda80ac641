"""Reading files that others may have made: bounded, without running anything, damage told in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from saekit.errors import SaekitError, first_line

SMALL = 1 << 20  # bytes; configs and manifests that are longer are refused unless a caller says otherwise
_DIGITS = 40  # of a whole number


def read_bounded(path: Path, limit: int = SMALL) -> bytes:
    """What a file holds.

    Raises:
        SaekitError: it cannot be read, or is longer than ``limit`` bytes.
    """
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise SaekitError(f"cannot read '{path}': {error.strerror}") from None
    if len(content) > limit:
        raise SaekitError(f"'{path}' is longer than the {limit:,} bytes that such a file may have")
    return content


def parse_json(content: bytes | str, path: Path | str) -> Any:
    """The value that JSON text holds.

    Args:
        content: the text.
        path: where it comes from, for the message.

    Raises:
        SaekitError: it is no JSON, nests too deeply, or has numbers of absurd length.
    """
    try:
        return json.loads(content, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        raise SaekitError(f"'{path}' is damaged: {first_line(error)}") from None


def read_json(path: Path, limit: int = SMALL) -> Any:
    """The value in a JSON file.

    Raises:
        SaekitError: as ``read_bounded`` and ``parse_json``.
    """
    return parse_json(read_bounded(path, limit), path)


def _whole(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def read_yaml(path: str | Path, limit: int = 1 << 16) -> dict[str, Any]:
    """The mapping in a YAML file: plain values only, no objects, and no aliases, by which a small file can hold much.

    Raises:
        SaekitError: it cannot be read, is too long, no YAML or no mapping.
    """
    import yaml

    class Plain(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("aliases (*) are not read")
            return super().compose_node(parent, index)

    content = read_bounded(Path(path), limit)
    try:
        loaded = yaml.load(content, Plain)
    except Exception as error:  # the loader raises many kinds for values that do not fit their tags
        raise SaekitError(f"the config '{path}' is not YAML: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(loaded, dict):
        raise SaekitError(f"the config '{path}' is not a mapping of keys to values")
    return {str(key): value for key, value in loaded.items()}


def check_inside(path: Path, folder: Path) -> None:
    """Make sure that a file of a folder is no link that leads out of it.

    In the cache of the Hugging Face hub, where ``snapshots/REVISION/`` links into ``blobs/`` beside it, both count as
    one folder.

    Raises:
        SaekitError: it does.
    """
    root = folder.resolve()
    for place in (root, *root.parents):
        if place.parent.name == "snapshots":
            root = place.parent.parent
            break
    if not path.resolve().is_relative_to(root):
        raise SaekitError(f"'{path}' is a link that leads out of its folder; saekit does not follow it")
