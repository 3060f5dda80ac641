"""What a training run is asked to do: the settings of its parts, flat outside and each with its owner inside.

A key of ``config.yaml``, a flag of ``saekit train`` and a keyword of Python have the same names. Each goes to the part
that owns it; variants and auxiliary losses bring theirs along, those of other packages too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from saekit.activations.settings import BEFORE, StreamSettings
from saekit.errors import SaekitError, did_you_mean
from saekit.reading import read_yaml
from saekit.settings import Settings, fact
from saekit.trainers.auxiliary_losses import AUXILIARY
from saekit.trainers.settings import DataSettings, DictionarySettings, OptimizerSettings, RunSettings
from saekit.trainers.variants import VARIANTS

# parts that every run has, in the order in which they are shown
PARTS: dict[str, type[Settings]] = {
    "source": StreamSettings,
    "data": DataSettings,
    "dictionary": DictionarySettings,
    "optimizer": OptimizerSettings,
    "run": RunSettings,
}
OLD_NAMES = {"dtype": "model_dtype"}  # before 0.2


class TrainConfig:
    """A training run.

    Attributes:
        variant, aux: names of the allocation rule and the auxiliary loss.
        variant_settings, aux_settings: their own settings.
        source, data, dictionary, optimizer, run: those that every run has.
        given: the keys that were set rather than left to their defaults.

    Every setting is an attribute too: ``config.k``, ``config.out``.
    """

    variant: str
    aux: str
    source: StreamSettings
    data: DataSettings
    dictionary: DictionarySettings
    variant_settings: Settings
    aux_settings: Settings
    optimizer: OptimizerSettings
    run: RunSettings
    given: frozenset[str]

    def __init__(self, **values: Any) -> None:
        """Take the settings by their flat names.

        Raises:
            SaekitError: a value is impossible, a key unknown or of a part that this run does not have; the message
                names the nearest right thing.
        """
        values = _renamed(values)
        given = frozenset(values)
        names = {
            "variant": _known("variant", values.pop("variant", "mutual_choice"), VARIANTS),
            "aux": _known("auxiliary loss", values.pop("aux", "none"), AUXILIARY),
        }
        kinds = _kinds(**names)
        if foreign := [key for key in values if not any(key in kind.model_fields for kind in kinds.values())]:
            raise SaekitError(_belonging(foreign[0], names))
        parts = {
            part: kind(**{key: value for key, value in values.items() if key in kind.model_fields})
            for part, kind in kinds.items()
        }
        if parts["run"].out is None:  # type: ignore[attr-defined]
            parts["run"] = parts["run"].model_copy(update={"out": Path("runs") / names["variant"]})
        vars(self).update(names, **parts, given=given)
        if self.dictionary.width is not None:
            self.check_width(self.dictionary.width)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a TrainConfig is not changed; replace({name}=...) makes another")

    def __getattr__(self, key: str) -> Any:
        for part in self._parts():
            if key in type(part).model_fields:
                return getattr(part, key)
        raise AttributeError(f"this run has no setting '{key}'")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TrainConfig) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(self.to_yaml())

    def __repr__(self) -> str:
        return f"TrainConfig({', '.join(f'{key}={value!r}' for key, value in self.to_dict().items())})"

    def _parts(self) -> list[Settings]:
        return [value for value in vars(self).values() if isinstance(value, Settings)]

    @property
    def fields(self) -> dict[str, FieldInfo]:
        """Every setting of this run by its flat name, the names of variant and auxiliary loss apart."""
        return {key: field for part in self._parts() for key, field in type(part).model_fields.items()}

    def keys_with(self, name: str) -> set[str]:
        """The settings of which a fact holds: ``resumable``, ``own``, ``decides`` (``saekit.settings.setting``)."""
        return {key for key, field in self.fields.items() if fact(field, name)}

    @property
    def out(self) -> Path:
        """The run's folder."""
        assert self.run.out is not None
        return self.run.out

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""
        return self.optimizer.steps

    @property
    def peak_lr(self) -> float:
        """The highest learning rate, given or by the number of steps."""
        return self.optimizer.peak_lr

    @property
    def order(self) -> tuple[int, ...]:
        """What decides which rows a batch has: runs of one origin for which it is the same take the same batches."""
        return (self.run.seed, self.optimizer.batch_size, self.data.buffer, self.optimizer.tokens)

    def width_at(self, d_in: int) -> int:
        """Features of a dictionary of activations of this width.

        Raises:
            SaekitError: more features a token are asked for than there are.
        """
        width = self.dictionary.width or round(self.dictionary.expansion * d_in)
        self.check_width(width)
        return width

    def check_width(self, width: int) -> None:
        """Raise SaekitError where more features a token are asked for than there are."""
        for key in self.fields:
            value = getattr(self, key)
            if fact(self.fields[key], "within_width") and value is not None and value > width:
                raise SaekitError(f"{key} = {value} is larger than the width of {width} features")

    def replace(self, **changes: Any) -> TrainConfig:
        """The same run with other values of some of its settings, which are taken as they are."""
        new = object.__new__(TrainConfig)
        vars(new).update(vars(self), given=self.given | changes.keys())
        for part, held in vars(self).items():
            if isinstance(held, Settings):
                own = {key: value for key, value in changes.items() if key in type(held).model_fields}
                vars(new)[part] = held.model_copy(update=own) if own else held
        return new

    def to_dict(self, keys: Iterable[str] | None = None) -> dict[str, Any]:
        """All settings, or some, by their flat names, as JSON and YAML hold them."""
        flat: dict[str, Any] = {"variant": self.variant, "aux": self.aux}
        for part in self._parts():
            flat |= part.model_dump(mode="json")
        return flat if keys is None else {key: value for key, value in flat.items() if key in set(keys)}

    @classmethod
    def from_yaml(cls, path: str | Path | None, *, of_a_run: bool = False, **flags: Any) -> TrainConfig:
        """A config from a YAML file (or none) and flags that win over it; flags of None are left out.

        Args:
            path: the file.
            of_a_run: whether a run wrote it: before 0.2 those told the settings of all variants, which are left out.
            flags: settings by name.

        Raises:
            SaekitError: the file is missing, is no mapping of keys, or names what is impossible.
        """
        return cls(**settings_in(path, of_a_run=of_a_run, **flags))

    def to_yaml(self) -> str:
        """The config as YAML; ``from_yaml`` reads it back."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def settings_in(path: str | Path | None, *, of_a_run: bool = False, **flags: Any) -> dict[str, Any]:
    """What ``TrainConfig.from_yaml`` takes for the settings, before they are checked.

    Raises:
        SaekitError: the file is missing or is no mapping of keys.
    """
    values = {} if path is None else _renamed(read_yaml(path))
    flags = {key: value for key, value in _renamed(flags).items() if value is not None}
    if "expansion" in flags and "width" not in flags:
        values.pop("width", None)  # both name the width
    if of_a_run and path is not None:
        values = {**BEFORE, **values}
        names = {key: str({**values, **flags}.get(key, default)) for key, default in _DEFAULTS.items()}
        if names["variant"] in VARIANTS and names["aux"] in AUXILIARY:
            foreign = _owners().keys() - {key for kind in _kinds(**names).values() for key in kind.model_fields}
            values = {key: value for key, value in values.items() if key not in foreign}
    return {**values, **flags}


_DEFAULTS = {"variant": "mutual_choice", "aux": "none"}


def variants_with() -> dict[str, tuple[FieldInfo, list[str]]]:
    """Settings of variants and auxiliary losses by key: the field, and the names of those that have it.

    Raises:
        SaekitError: two parts have a key of one name that means different things.
    """
    found: dict[str, tuple[FieldInfo, list[str]]] = {}
    everywhere = {key: part for part, kind in PARTS.items() for key in kind.model_fields}
    for kind, registry in (("variant", VARIANTS), ("auxiliary loss", AUXILIARY)):
        seen: set[type] = set()
        for name, owner in registry.items():
            if owner in seen:
                continue  # a rule under its second name
            seen.add(owner)
            for key, field in owner.Config.model_fields.items():
                clash = f"the part {everywhere[key]}" if key in everywhere else key if key in _DEFAULTS else None
                before, names = found.setdefault(key, (field, []))
                if clash or (before.annotation, before.metadata) != (field.annotation, field.metadata):
                    raise SaekitError(
                        f"the setting '{key}' of the {kind} '{name}' is another one of {clash or names[0]}; rename it"
                    )
                names.append(name)
    return found


def _owners() -> dict[str, str]:
    """Who owns a key, in words."""
    own = {key: ", ".join(names) for key, (_, names) in variants_with().items()}
    return {**{key: part for part, kind in PARTS.items() for key in kind.model_fields}, **own}


def _kinds(variant: str, aux: str) -> dict[str, type[Settings]]:
    """The settings classes of a run with these two, in the order in which they are shown."""
    kinds = {**PARTS, "variant_settings": VARIANTS[variant].Config, "aux_settings": AUXILIARY[aux].Config}
    order = ("source", "data", "dictionary", "variant_settings", "aux_settings", "optimizer", "run")
    return {part: kinds[part] for part in order}


def _belonging(key: str, names: Mapping[str, str]) -> str:
    """Why a run with this variant and auxiliary loss does not take a key."""
    owners = _owners()
    if key not in owners:
        return f"unknown setting '{key}'{did_you_mean(key, [*owners, *_DEFAULTS])}"
    aux = any(key in kind.Config.model_fields for kind in AUXILIARY.values())
    has = f"auxiliary loss {names['aux']}" if aux else f"variant {names['variant']}"
    return f"{key} belongs to {owners[key]}; this run has {has}"


def _known(what: str, name: Any, registry: Mapping[str, Any]) -> str:
    if not isinstance(name, str) or name not in registry:
        raise SaekitError(f"unknown {what} '{name}'{did_you_mean(str(name), registry)}")
    return name


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {OLD_NAMES.get(key, key): value for key, value in values.items()}
