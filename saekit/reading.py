"""Reading files that others may have made: bounded, without running anything, damage told in one line."""

from __future__ import annotations

import json
import math
import re
import reprlib
from pathlib import Path
from typing import Any

from saekit.errors import SaekitError, first_line

SMALL = 1 << 20  # bytes; configs and manifests that are longer are refused unless a caller says otherwise
_DIGITS = 40  # of a whole number
_HASHED = re.compile("[0-9a-f]{64}")


def read_bounded(path: Path, limit: int = SMALL, *, pipe: bool = False) -> bytes:
    """What a file holds.

    Args:
        path: the file.
        limit: bytes.
        pipe: whether it may be a pipe, at which one waits for its other end.

    Raises:
        SaekitError: it cannot be read, is no file, or is longer than ``limit`` bytes.
    """
    if path.exists() and not path.is_dir() and not path.is_file() and not pipe:
        raise SaekitError(f"cannot read '{path}': it is no ordinary file")
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise SaekitError(f"cannot read '{path}': {error.strerror}") from None
    if len(content) > limit:
        raise SaekitError(f"'{path}' is longer than the {limit:,} bytes that such a file may have")
    return content


def parse_json(content: bytes | str, path: Path | str) -> Any:
    """The value that JSON text holds; NaN and infinities, which are no JSON but which Python writes, become null.

    Args:
        content: the text.
        path: where it comes from, for the message.

    Raises:
        SaekitError: it is no JSON, nests too deeply, names a key twice, or has numbers of absurd length.
    """
    try:
        return json.loads(content, parse_int=_whole_number, parse_constant=lambda _: None, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise SaekitError(f"'{path}' is damaged: {first_line(error)}") from None


def read_json(path: Path, limit: int = SMALL) -> Any:
    """The value in a JSON file.

    Raises:
        SaekitError: as ``read_bounded`` and ``parse_json``.
    """
    return parse_json(read_bounded(path, limit), path)


def check_json(value: Any, name: str) -> None:
    """Make sure that JSON holds a value as it is.

    Raises:
        SaekitError: it does not; the part that is to blame is named.
    """
    if isinstance(value, dict):
        for key, part in value.items():
            if not isinstance(key, str):
                raise SaekitError(f"{name} has the key {reprlib.repr(key)}; the keys of JSON are texts")
            check_json(part, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            check_json(part, f"{name}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise SaekitError(f"{name} = {value} cannot be saved: JSON has no such number; give None or a text")
    elif value is not None and not isinstance(value, (str, int, float)):
        kind = type(value).__name__
        raise SaekitError(f"{name} is of type {kind}, which JSON does not hold; give a number, text, list or dict")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The mapping of some keys, where none is named twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {reprlib.repr(twice)} stands there twice")
    return values


def _whole_number(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def read_yaml(path: str | Path, limit: int = 1 << 16) -> dict[str, Any]:
    """The mapping in a YAML file: plain values only, no key twice, no aliases, by which a small file can hold much.

    Raises:
        SaekitError: it cannot be read, is too long, no YAML or no mapping.
    """
    import yaml

    class Plain(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("aliases (*) are not read")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            _once([(str(self.construct_object(key, deep=True)), None) for key, _ in node.value])
            return super().construct_mapping(node, deep)

        def construct_yaml_int(self, node: Any) -> int:
            if len(node.value) > _DIGITS:
                raise ValueError(f"a number of {len(node.value)} digits")
            return int(super().construct_yaml_int(node))

    Plain.add_constructor("tag:yaml.org,2002:int", Plain.construct_yaml_int)
    content = read_bounded(Path(path), limit, pipe=True)
    try:
        loaded = yaml.load(content, Plain)
    except Exception as error:  # the loader raises many kinds for values that do not fit their tags
        raise SaekitError(f"the config '{path}' is not YAML: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(loaded, dict):
        raise SaekitError(f"the config '{path}' is not a mapping of keys to values")
    return {str(key): value for key, value in loaded.items()}


def check_inside(path: Path, folder: Path) -> None:
    """Make sure that a file of a folder is no link that leads out of it.

    In the cache of the Hugging Face hub, where ``snapshots/REVISION/`` links into ``blobs/`` beside it, and that into a
    store of files by their hashes which all repositories share, they count as one folder.

    Raises:
        SaekitError: it does.
    """
    try:
        root, target = folder.resolve(), path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a link to itself, or no name of a file
        raise SaekitError(f"cannot read '{path}': {first_line(error)}") from None
    hub = next((each.parents[1] for each in (root, *root.parents) if each.parent.name == "snapshots"), None)
    shared = (
        hub is not None and target.parent.parent == hub.parent / "blobs" and _HASHED.fullmatch(target.name) is not None
    )
    if not (target.is_relative_to(root) or (hub is not None and target.is_relative_to(hub / "blobs")) or shared):
        raise SaekitError(f"'{path}' is a link that leads out of its folder; saekit does not follow it")


def is_plain(text: str) -> bool:
    """Whether a text can be a name or a path: it has no zero character and no half of a pair of surrogates."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)
