"""Several runs in one folder: every combination of settings that have several values, and the file that tells them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_origin

import yaml

from saekit.errors import SaekitError
from saekit.files import replace_file, writable_folder
from saekit.reading import is_plain, read_yaml
from saekit.trainers.config import PARTS, TrainConfig

PLAN = "sweep.yaml"
_LARGEST = 1 << 24  # bytes of it
_LISTS = {
    key for kind in PARTS.values() for key, field in kind.model_fields.items() if get_origin(field.annotation) is list
}


def combined(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of each run by the name of its folder; of one alone, whose name is empty, where nothing varies.

    Args:
        values: settings, a list where a setting has several values; ``runs``: a list of settings, each a run (or a
            grid) of its own, that go before the others.

    Raises:
        SaekitError: ``runs`` is no list of settings, a list is empty, or two runs would be the same.
    """
    shared = {key: value for key, value in values.items() if key != "runs"}
    runs = values.get("runs", [{}])
    if not isinstance(runs, list) or not runs or not all(isinstance(run, dict) for run in runs):
        raise SaekitError("runs: is not a list of settings, such as '- {k: 32, seed: 1}'")
    if any("out" in run for run in runs):
        raise SaekitError("runs: names an out; each run has its folder below the out of all")
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        settings = {**shared, **run}
        several = {key: value for key, value in settings.items() if isinstance(value, list) and key not in _LISTS}
        if empty := [key for key, value in several.items() if not value]:
            raise SaekitError(f"{empty[0]}: is a list without values")
        for key, chosen in several.items():
            if twice := [value for number, value in enumerate(chosen) if value in chosen[:number]]:
                raise SaekitError(f"the {key} '{twice[0]}' is named twice")
        varied = list(dict.fromkeys([*several, *run]))
        for values_of_one in itertools.product(*several.values()):
            one = {**settings, **dict(zip(several, values_of_one, strict=True))}
            name = name_of({key: one[key] for key in varied})
            if name in found:
                raise SaekitError(f"two of the runs are the same: {name or 'both are without a setting of their own'}")
            found[name] = one
    return found


def name_of(settings: Mapping[str, Any]) -> str:
    """The folder of a run that differs from others in these settings: ``k=16,seed=1``; of a hook alone, the hook."""
    if list(settings) == ["hook"]:
        return str(settings["hook"])
    return ",".join(f"{key}={_plain(value)}" for key, value in settings.items())


def _plain(value: Any) -> str:
    text = format(value, "g") if isinstance(value, float) else str(value)
    return "".join("_" if character in '/\\,=:*?"<>| ' else character for character in text)


def write_plan(home: Path, configs: Mapping[str, TrainConfig], *, resume: bool) -> None:
    """Write down what all runs are; with ``resume``, beside those that the folder tells already, which stay."""
    writable_folder(home, overwrite=True)
    told = read_plan(home) if resume and (home / PLAN).is_file() else {}
    runs = {name: config.to_dict(config.given - {"out"}) for name, config in configs.items()}
    if not told.keys() >= runs.keys():
        text = yaml.safe_dump({"runs": {**runs, **told}}, sort_keys=False)
        replace_file(home / PLAN, lambda path: path.write_text(text))


def read_plan(home: Path) -> dict[str, dict[str, Any]]:
    """The settings of each run that was begun in a folder, by its name there.

    Raises:
        SaekitError: the file is damaged.
    """
    found = read_yaml(home / PLAN, _LARGEST).get("runs")
    if not isinstance(found, dict) or not found or not all(map(_is_run, found, found.values())):
        raise SaekitError(f"'{home / PLAN}' is damaged; --overwrite begins anew")
    return found


def _is_run(name: object, settings: object) -> bool:
    if not isinstance(name, str) or not is_plain(name) or Path(name).name != name or name in ("", ".", ".."):
        return False
    return isinstance(settings, dict) and all(isinstance(key, str) for key in settings) and "out" not in settings
