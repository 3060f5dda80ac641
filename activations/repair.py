"""Whether a cache is as it was written, and how it becomes so again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from saekit.activations.cache import ActivationCache
from saekit.activations.finite import BadTokens, limits_in
from saekit.activations.manifest import Manifest, Shard, first_change
from saekit.activations.placement import DTYPES
from saekit.activations.settings import StreamSettings
from saekit.activations.shards import unchanged, write_shard
from saekit.activations.source import ActivationSource, piece_size
from saekit.activations.staging import Place, regrouped
from saekit.errors import SaekitError
from saekit.files import check_writable, locked
from saekit.reading import check_inside


class Damage(NamedTuple):
    """A shard that is not as it was written.

    Attributes:
        file: its name.
        what: is wrong with it.
    """

    file: str
    what: str


def verify(path: str | Path, on_shard: Callable[[int], object] = lambda done: None) -> list[Damage]:
    """Read every byte of a cache, and tell which shards are not as they were written.

    Args:
        path: the folder of the cache.
        on_shard: is told after each shard how many are done.

    Raises:
        SaekitError: there is no cache, or its manifest is damaged.
    """
    cache = ActivationCache.open(path, complete=False)
    found = []
    for number, shard in enumerate(cache.shards):
        if what := _damage(cache, shard):
            found.append(Damage(shard["file"], what))
        on_shard(number + 1)
    return found


def _damage(cache: ActivationCache, shard: Shard) -> str | None:
    file = cache.path / shard["file"]
    if not file.is_file():
        return "is missing"
    check_inside(file, cache.path)
    size = file.stat().st_size
    if size != shard["bytes"]:
        return f"has {size:,} bytes instead of {shard['bytes']:,}"
    try:
        same = unchanged(file, shard)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if same else "has another checksum than when it was written"


def repair(
    path: str | Path,
    *,
    device: str | None = None,
    trust_remote_code: bool = False,
    on_shard: Callable[[int], object] = lambda done: None,
) -> list[Damage]:
    """Harvest the damaged shards of a cache again, byte for byte as they were; returns what was damaged.

    Args:
        path: the folder of the cache.
        device: where the model runs; the one that the cache was harvested on.
        trust_remote_code: whether code that comes with the model may run.
        on_shard: is told after each shard that is checked how many are done.

    Raises:
        SaekitError: the activations were not harvested by saekit, the model or the text has changed since (the field of
            the provenance is named), a shard comes out otherwise, or another process is at work there.
        WriteError: the disk does not take a shard.
    """
    cache = ActivationCache.open(path, complete=False)
    with locked(cache.path, "repairing"):
        found = verify(path, on_shard)
        if found:
            check_writable(cache.path)
            _harvest_again(cache, {damage.file for damage in found}, device, trust_remote_code)
    return found


def _harvest_again(cache: ActivationCache, files: set[str], device: str | None, trust_remote_code: bool) -> None:
    source = _source(cache, device, trust_remote_code)
    manifest = Manifest.read(cache.path)
    bad = BadTokens(skip=manifest.skipped > 0, limits=limits_in(cache.provenance))
    for start, shard in _places(cache, source):
        if shard["file"] not in files:
            continue
        batches = source.batches(
            "train", start.row + shard["rows"], gradients=cache.gradients, bad=bad, first=start.batch
        )
        batch = next((each for each, _ in regrouped(batches, shard["rows"], start)), None)
        if batch is None or len(batch.x) != shard["rows"]:
            raise SaekitError(f"the text does not reach '{shard['file']}' of the cache '{cache.path}'; harvest it anew")
        facts: dict[str, Any] = {key: value for key, value in shard.items() if key in ("batch", "row")}
        write_shard(
            cache.path / shard["file"],
            batch,
            DTYPES[cache.dtype],
            facts,
            expected=shard,
        )


def _source(cache: ActivationCache, device: str | None, trust_remote_code: bool) -> ActivationSource:
    """The model and the text of a cache, once it is sure that they are the same."""
    facts, asked = cache.provenance, StreamSettings.of(cache.provenance)
    if asked is None:
        raise SaekitError(f"the activations in '{cache.path}' were not harvested by `saekit cache`: write them again")
    source = ActivationSource.of(asked, device=device, trust_remote_code=trust_remote_code)
    if field := first_change(facts, source.provenance("train", gradients=cache.gradients)):
        raise SaekitError(f"the {field} has changed since the cache '{cache.path}' was harvested; harvest it anew")
    return source


def _places(cache: ActivationCache, source: ActivationSource) -> Iterable[tuple[Place, Shard]]:
    """Where the first row of each shard comes from; ``ActivationCache.write`` tells none: tokens are counted."""
    if all("batch" in shard and "row" in shard for shard in cache.shards):
        yield from ((Place(shard["batch"], shard["row"]), shard) for shard in cache.shards)
        return
    ends = accumulate(int(each.kept.sum()) for each in source.mixed("train", piece_size(cache.gradients)))
    number, before, end = 0, 0, next(ends)  # the batch of contexts, tokens before it and up to its end
    first = 0
    for shard in cache.shards:
        while first >= end:
            number, before, end = number + 1, end, next(ends, first + 1)  # beyond the text, which shows later
        yield Place(number, first - before), shard
        first += shard["rows"]
