"""A cache that is being written: a folder beside its place, which it is moved to when it is whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from saekit.activations.batch import ActivationBatch
from saekit.activations.division import Division, Grouping, divided
from saekit.activations.manifest import MANIFEST, Manifest, checked
from saekit.activations.placement import DTYPES
from saekit.activations.shards import read_shard
from saekit.errors import SaekitError, did_you_mean
from saekit.files import (
    PART,
    check_free,
    check_movable,
    check_writable,
    expanded,
    flush_folder,
    locked,
    writable_folder,
    writing,
)

JOURNAL = "harvest.jsonl"  # what of a harvest is on the disk already
_OURS = ("shard-", MANIFEST, JOURNAL, ".tmp")  # beginnings of names


def staging(folder: Path) -> Path:
    """Where the cache of this place is written until it is whole."""
    return folder.with_name(folder.name + PART)


def check_begin(path: str | Path, dtype: str, *, overwrite: bool, alone: bool = False) -> Path:
    """The place of a cache, once it is sure that one may be written there.

    Args:
        path: the place.
        dtype: of the cache.
        overwrite: whether something may be there already.
        alone: whether it is known that no other process writes there.

    Raises:
        SaekitError: unknown dtype; another process writes there; or, without ``overwrite``, a folder that holds
            something or an unfinished harvest.
        WriteError: nothing can be written there.
    """
    if dtype not in DTYPES:
        raise SaekitError(f"unknown dtype '{dtype}'{did_you_mean(dtype, DTYPES)}")
    target = expanded(path).resolve()
    folder = staging(target)
    if foreign := [p.name for p in folder.glob("*") if not p.name.startswith(_OURS)]:
        raise SaekitError(f"'{folder}' is needed while the cache is written, but holds '{foreign[0]}'; move it away")
    if folder.is_dir() and not alone:
        with locked(folder, "harvesting"):
            pass
    check_free(target, overwrite=overwrite, hint="choose another folder or ask to overwrite (--overwrite)")
    begun = (folder / MANIFEST).is_file() or ((folder / JOURNAL).is_file() and any(folder.glob("shard-*")))
    if begun and not overwrite:
        raise SaekitError(
            f"an unfinished harvest lies in '{folder}'; --resume goes on with it, --overwrite begins anew"
        )
    check_writable(target.parent)
    if target.is_dir():
        check_movable(target.parent, target)
    return target


@contextmanager
def begun(path: str | Path, dtype: str, *, overwrite: bool) -> Iterator[tuple[Path, Path]]:
    """The place of a cache and an empty folder to write it in, which no other process uses meanwhile.

    Raises:
        SaekitError: as ``check_begin``, or another process writes there.
    """
    target = check_begin(path, dtype, overwrite=overwrite)
    with staging_lock(target) as folder:
        check_begin(path, dtype, overwrite=overwrite, alone=True)  # another process may have come first
        for file in folder.glob("*"):
            file.unlink()
        try:
            yield target, folder
        except BaseException as error:
            worth = any(folder.glob("shard-*")) or isinstance(error, KeyboardInterrupt)
            if not (folder / MANIFEST).is_file() and not (worth and (folder / JOURNAL).is_file()):
                shutil.rmtree(folder)  # nothing to go on from
            raise


@contextmanager
def staging_lock(target: Path) -> Iterator[Path]:
    """The folder in which the cache of a place is written, for this process alone; it is made where it is missing.

    Raises:
        SaekitError: another process writes there, or the folder cannot be made.
    """
    folder = staging(target)
    writable_folder(folder, overwrite=True)
    with locked(folder, "harvesting"):
        yield folder


def finish(
    target: Path,
    folder: Path,
    facts: dict[str, Any],
    *,
    by: Grouping | None = None,
    division: Division | None = None,
) -> None:
    """Divide the rows into parts, write the manifest, which makes the cache whole, and move it to its place.

    Args:
        target: the place.
        folder: where all shards are.
        facts: what else the manifest tells.
        by: as for ``divided``.
        division: of the rows, where it is known already.

    Raises:
        SaekitError: as ``divided``, or a fact is impossible.
    """
    kind = DTYPES[facts["dtype"]]
    columns = (read_shard(folder, s, facts["d_in"], kind, 0, s["rows"], ["documents"])[0] for s in facts["shards"])
    found = (division or divided(columns, by)).model_dump()
    manifest: Manifest = checked(Manifest, {**facts, "division": found}, target / MANIFEST)
    manifest.write(folder)
    move(target, folder, manifest)


def move(target: Path, folder: Path, manifest: Manifest) -> None:
    """Move a whole cache to its place; an old cache there goes, other files stay. Ended early, it can be done again.

    Raises:
        WriteError: the disk does not let it.
    """
    with writing(target):
        (folder / JOURNAL).unlink(missing_ok=True)
        if not target.exists():
            folder.replace(target)
        else:
            (target / MANIFEST).unlink(missing_ok=True)
            new = [shard["file"] for shard in manifest.shards]
            for name in new:
                if (folder / name).exists():
                    (folder / name).replace(target / name)
            for old in target.glob("shard-*"):
                if old.name not in new:
                    old.unlink()
            (folder / MANIFEST).replace(target / MANIFEST)
            shutil.rmtree(folder)
        flush_folder(target.parent)


class Place(NamedTuple):
    """Where a row comes from.

    Attributes:
        batch: number of the batch that has it.
        row: its number there.
    """

    batch: int
    row: int


def regrouped(
    batches: Iterable[ActivationBatch], rows: int, start: Place | None = None
) -> Iterator[tuple[ActivationBatch, tuple[Place, Place]]]:
    """The same rows in batches of exactly ``rows``, the last may be smaller; with the places of its first row and of
    the one after its last.

    Args:
        batches: of any size.
        rows: a batch.
        start: number of the first batch, and rows of it to leave out; none if not given.
    """
    start = start or Place(0, 0)
    waiting: list[ActivationBatch] = []
    count = 0
    for number, batch in enumerate(batches, start.batch):
        waiting.append(batch.rows(start.row, len(batch.x)) if not waiting and start == (number, start.row) else batch)
        count += len(waiting[-1].x)
        if count >= rows:
            whole = ActivationBatch.concatenate(waiting)
            while count >= rows:
                count -= rows
                after = Place(number, len(batch.x) - count) if count else Place(number + 1, 0)
                yield whole.rows(0, rows), (start, after)
                start, whole = after, whole.rows(rows, len(whole.x))
            waiting = [whole]
    if count:
        yield ActivationBatch.concatenate(waiting), (start, Place(number + 1, 0))
