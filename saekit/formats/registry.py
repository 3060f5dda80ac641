"""The registry of formats: a new one is a file with its class, and one line here.

Packages outside saekit add theirs by ``FORMATS["name"] = MyFormat()``, or, so that the command line knows them too, by
an entry point of the group ``saekit.formats`` that names the object. Names are known without importing any of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, MutableMapping
from importlib.metadata import EntryPoint, entry_points
from itertools import islice
from pathlib import Path

from saekit.errors import SaekitError, SaekitWarning, did_you_mean, first_line
from saekit.formats.format import Dictionary, Format
from saekit.reading import check_inside

GROUP = "saekit.formats"
ABOUT = ("eval.json", "statistics.safetensors")  # of a run, beside its dictionary
_WRITABLE = ("saelens", "dictionary_learning", "sparsify")  # of saekit's own; those of others tell when imported
_OWN = (*_WRITABLE, "gemma_scope", "openai", "saekit_checkpoint")


class Formats(MutableMapping[str, Format]):
    """Formats by name, in the order in which they are tried; each is imported when it is first asked for."""

    def __init__(self) -> None:
        self._formats: dict[str, Format | EntryPoint] = {
            name: EntryPoint(name, f"saekit.formats.{name}:FORMAT", GROUP) for name in _OWN
        }
        for point in entry_points(group=GROUP):
            self._formats.setdefault(point.name, point)

    def __getitem__(self, name: str) -> Format:
        known = self._formats[name]
        if isinstance(known, EntryPoint):
            known = self._formats[name] = known.load()
        return known

    def __setitem__(self, name: str, value: Format) -> None:
        self._formats[name] = value

    def __delitem__(self, name: str) -> None:
        del self._formats[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._formats)

    def __len__(self) -> int:
        return len(self._formats)

    def writable(self) -> list[str]:
        """Names of those that can be written, as far as they tell without being imported."""
        return [
            name
            for name, known in self._formats.items()
            if (known.writable if isinstance(known, Format) else name in _WRITABLE or name not in _OWN)
        ]

    def each(self) -> Iterator[tuple[str, Format]]:
        """All that can be imported; one of another package that cannot is left out from then on, with a warning."""
        for name in list(self._formats):
            try:
                yield name, self[name]
            except Exception as error:  # whatever a stranger's module raises
                if name in _OWN:
                    raise
                del self[name]
                told = f"the format '{name}' cannot be loaded: {first_line(error)}"
                warnings.warn(told, SaekitWarning, stacklevel=2)


FORMATS = Formats()


def format_of(folder: Path, called: str | Path | None = None) -> tuple[str, Path]:
    """The name of a dictionary's format and its file of weights, in a folder or in a run's ``sae/``.

    Args:
        folder: or file.
        called: what the user called it, if not that.

    Raises:
        SaekitError: there is none in a known format.
    """
    if match := _match(folder):
        return match
    inside = sorted(folder.glob("*")) if folder.is_dir() else []
    hint = "".join(f"; name what is in it, such as '{path}'" for path in islice(filter(_match, inside), 1))
    raise SaekitError(f"'{called or folder}' holds no dictionary in a known format ({', '.join(FORMATS)}){hint}")


def _match(path: Path) -> tuple[str, Path] | None:
    for folder in (path, path / "sae"):
        for name, known in FORMATS.each():
            if (file := known.find(folder)) is not None:
                return name, file
    return None


def writer(name: str) -> Format:
    """The format of this name, which can be written.

    Raises:
        SaekitError: there is none.
    """
    known = dict(FORMATS.each())
    names = [each for each in known if known[each].writable]
    if name in known and name not in names:
        raise SaekitError(f"the format '{name}' is read, not written{did_you_mean(name, names)}")
    if name not in known:
        raise SaekitError(f"unknown format '{name}'{did_you_mean(name, names)}")
    return known[name]


def save(sae: Dictionary, folder: Path, to: str = "saelens", *, overwrite: bool = False) -> Path:
    """Write a dictionary in a format; returns the folder.

    Args:
        sae: the dictionary.
        folder: where.
        to: the format's name.
        overwrite: whether the folder may hold something already, though no dictionary of another format: it would be
            neither.

    Raises:
        SaekitError: as ``Format.write`` and ``writer``; or the folder holds a dictionary of another format.
    """
    chosen = writer(to)
    other = next((name for name in weight_names() if name not in chosen.weights and (folder / name).is_file()), None)
    if other is not None and overwrite:
        raise SaekitError(f"'{folder}' holds a dictionary of another format ({other}); choose another folder")
    return chosen.write(sae, folder, overwrite=overwrite)


def weight_names() -> list[str]:
    """The names that files of weights have, in any format."""
    return list(dict.fromkeys(name for _, known in FORMATS.each() for name in known.weights if "*" not in name))


def config_names() -> list[str]:
    """The names that files beside the weights have, in any format."""
    names = (name for _, known in FORMATS.each() for name in (*known.requires, *known.optional))
    return list(dict.fromkeys(name for name in names if "/" not in name))


def files_of(folder: Path) -> dict[str, Path]:
    """The files that belong to a dictionary, in its own or its run's folder, by their name on the hub.

    Raises:
        SaekitError: there is none, or one is a link that leads out of its folder.
    """
    name, weights = format_of(folder)
    home = weights.parent
    run = home.parent if home.name == "sae" and (home.parent / "config.yaml").is_file() else home
    names = (*FORMATS[name].requires, *FORMATS[name].optional, weights.name)
    files = {each: home / each for each in names if "/" not in each and (home / each).is_file()}
    files |= {each: folder / each for folder in (run, home) for each in ABOUT if (folder / each).is_file()}
    for file in files.values():
        check_inside(file, file.parent)
    return files
