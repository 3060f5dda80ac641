"""Harvests into a cache that can be stopped at any moment and go on where they were."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from saekit.activations import cache as caches
from saekit.activations.batch import ActivationBatch
from saekit.activations.cache import ActivationCache
from saekit.activations.division import Count
from saekit.activations.finite import BadTokens, limits_in
from saekit.activations.gradients import check_causal
from saekit.activations.manifest import MANIFEST, Manifest, Provenance, Shard, checked, first_change
from saekit.activations.placement import AUTO, DTYPES
from saekit.activations.settings import BEFORE, HarvestPlan
from saekit.activations.shards import ShardWriter, unchanged
from saekit.activations.source import ActivationSource
from saekit.activations.staging import (
    JOURNAL,
    Place,
    begun,
    check_begin,
    finish,
    move,
    regrouped,
    staging,
    staging_lock,
)
from saekit.errors import SaekitError
from saekit.files import check_space, expanded, remove_unfinished, replace_file, writing
from saekit.interrupt import Interrupted, InterruptGuard
from saekit.ranks import agreeing, current
from saekit.reading import parse_json, read_bounded
from saekit.seal import BLANK, stamp, unbroken
from saekit.settings import fact

_NOTHING = "there is no harvest to resume at '{}'; begin one without --resume"
_LONGEST = 1 << 28  # bytes of a journal


def open_source(plan: HarvestPlan, device: str | None, trust_remote_code: bool) -> ActivationSource:
    """Load the model and open the text.

    Raises:
        SaekitError: as ``ActivationSource.open``, or gradients are asked of a model that is not causal.
    """
    source = ActivationSource.of(plan.source, device=device, trust_remote_code=trust_remote_code)
    if plan.gradients:
        check_causal(source.model)
    return source


class _Beginning(BaseModel):
    """The first line of a journal."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    plan: dict[str, Any]
    provenance: Provenance
    d_in: Count


class _Line(BaseModel):
    """A further line: a shard that is on the disk, and where the row after it comes from."""

    model_config = ConfigDict(strict=True, frozen=True)
    shard: Shard
    batch: Count
    row: Count
    skipped: Count


def harvest_cache(
    path: str | Path,
    plan: HarvestPlan,
    *,
    overwrite: bool = False,
    device: str | None = None,
    trust_remote_code: bool = False,
    tell: Callable[[str], object] = lambda line: None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> ActivationCache:
    """Harvest activations of the training text into a cache.

    Each shard is written down in a journal once it is on the disk; ``resume_cache`` goes on from there, and the cache
    becomes the same, byte for byte, as without the break.

    Args:
        path: the folder of the cache; it is written beside it, in ``PATH.part``, until it is whole.
        plan: what to harvest.
        overwrite: replace a cache, or an unfinished harvest, that is there.
        device: where the model runs.
        trust_remote_code: whether code that comes with the model may run.
        tell: receives lines for the user.
        progress: is told of the rows done and of all.

    Raises:
        SaekitError: a part of the plan is impossible, there is too little space, something is there already, another
            process harvests there, or an activation is not finite and not to be skipped.
        WriteError: the disk is full; what was harvested is kept.
        Interrupted: by SIGINT or SIGTERM; what was harvested is kept.
    """
    ranks = current()
    with agreeing(ranks):
        check_begin(path, plan.dtype, overwrite=overwrite)
    if not ranks.leads:
        return _assisted(path, device, trust_remote_code)
    source = open_source(plan, device, trust_remote_code)
    provenance = source.provenance("train", gradients=plan.gradients)
    if plan.max_norm is not None:
        provenance |= {"max_norm": plan.max_norm, "norm_limit": source.norm_limit(plan.max_norm)}
    found = {"model_dtype": provenance["model_dtype"], "harvest_batch": provenance.get("harvest_batch")}
    plan = plan.model_copy(update={key: value for key, value in found.items() if value is not None})
    if plan.harvest_batch:
        tell(f"the model runs in {plan.model_dtype}, {plan.harvest_batch} contexts at a time")
    d_in = next(source.batches("train", gradients=plan.gradients, bad=BadTokens(skip=True))).x.shape[1]
    beginning = _Beginning(plan=plan.model_dump(), provenance=provenance, d_in=d_in)  # type: ignore[arg-type]
    _check_space(expanded(path).resolve(), beginning, plan, 0, tell)
    with begun(path, plan.dtype, overwrite=overwrite) as (target, folder):
        _append(folder, beginning.model_dump())
        made = _harvest(target, folder, beginning, plan, source, [], progress)
    ranks.agree()
    return made


def _assisted(path: str | Path, device: str | None, trust_remote_code: bool) -> ActivationCache:
    """The cache that the first process writes, with the help of this one in its harvest."""
    facts = current().told(None)[0]
    if facts is not None:
        plan = HarvestPlan(**facts["plan"])
        source = open_source(plan, device, trust_remote_code)
        source.assist("train", gradients=plan.gradients, bad=BadTokens(plan.skip_bad_tokens, limits=facts["limits"]))
    current().agree()
    return ActivationCache.open(path)


def resume_cache(
    path: str | Path,
    asked: dict[str, Any],
    *,
    device: str | None = None,
    trust_remote_code: bool = False,
    tell: Callable[[str], object] = lambda line: None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> ActivationCache:
    """Go on with a harvest that was stopped; arguments as for ``harvest_cache``.

    Args:
        path: the folder of the cache.
        asked: fields of the plan that were set anew; those that decide about the data must equal those that the
            harvest was begun with.
        device: where the model runs.
        trust_remote_code: whether code that comes with the model may run.
        tell: receives lines for the user.
        progress: is told of the rows done and of all.

    Raises:
        SaekitError: there is nothing to go on with, it was begun with another plan, the text or the model has changed
            since, or what ``harvest_cache`` raises for.
        Interrupted: as ``harvest_cache``.
    """
    if not current().leads:
        return _assisted(path, device, trust_remote_code)
    target = expanded(path).resolve()
    folder = staging(target)
    if not any((folder / name).is_file() for name in (JOURNAL, MANIFEST)):
        if (target / MANIFEST).is_file():
            with suppress(OSError):  # it was stopped before this folder, empty by now, was removed
                folder.rmdir()
            tell(f"the cache '{path}' was finished already")
            _finished_already()
            return ActivationCache.open(target)
        raise SaekitError(_NOTHING.format(path))
    with staging_lock(target):
        remove_unfinished(folder, ["shard-*", JOURNAL, MANIFEST])
        if (folder / MANIFEST).is_file():  # it was stopped while it was moved to its place
            move(target, folder, Manifest.read(folder))
            _finished_already()
            return ActivationCache.open(target)
        beginning, lines = _read_journal(folder, path, tell)
        plan = HarvestPlan(**{**BEFORE, **beginning.plan})
        free = {key for key, field in HarvestPlan.model_fields.items() if not fact(field, "decides")}
        lasting = {key: value for key, value in asked.items() if key not in free}
        if lasting.get("model_dtype") == AUTO:
            del lasting["model_dtype"]
        changed = [key for key, value in lasting.items() if value != getattr(plan, key)]
        if changed:
            raise SaekitError(f"the harvest at '{path}' was begun with another {', '.join(changed)}")
        plan = HarvestPlan(**{**plan.model_dump(), **{key: value for key, value in asked.items() if key in free}})
        source = open_source(plan, device, trust_remote_code)
        if field := first_change(beginning.provenance, source.provenance("train", gradients=plan.gradients)):
            raise SaekitError(
                f"the {field} is not what it was when the harvest at '{path}' was begun; --overwrite begins anew"
            )
        rows = sum(line.shard["rows"] for line in lines)
        tell(f"going on after {rows:,} of {plan.tokens:,} tokens")
        _check_space(target, beginning, plan, rows, tell)
        made = _harvest(target, folder, beginning, plan, source, lines, progress)
    current().agree()
    return made


def _finished_already() -> None:
    """Tell the other processes that there is nothing to harvest."""
    current().told(None)
    current().agree()


def _harvest(
    target: Path,
    folder: Path,
    beginning: _Beginning,
    plan: HarvestPlan,
    source: ActivationSource,
    lines: list[_Line],
    progress: Callable[[int, int], object],
) -> ActivationCache:
    """Whatever is missing, and the end."""
    done = sum(line.shard["rows"] for line in lines)
    start, skipped = (Place(lines[-1].batch, lines[-1].row), lines[-1].skipped) if lines else (Place(0, 0), 0)
    bad = BadTokens(plan.skip_bad_tokens, skipped, limits_in(beginning.provenance))
    asked = {"plan": plan.model_dump(mode="json"), "limits": limits_in(beginning.provenance)}
    current().told(asked if done < plan.tokens else None)
    counts: dict[int, int] = {}  # of skipped tokens, before the newest batch of contexts and after it
    following: deque[tuple[Place, int]] = deque()

    def batches() -> Iterator[ActivationBatch]:
        nonlocal counts
        counts, rows = {start.batch: skipped}, done - start.row
        manner: Any = {"gradients": plan.gradients, "bad": bad, "first": start.batch, "together": True}
        with closing(source.batches("train", plan.tokens - rows, **manner)) as found:
            for number, batch in enumerate(found, start.batch):
                counts, rows = {number: counts[number], number + 1: bad.count}, rows + len(batch.x)
                yield batch
                writer.settle()
                if guard.received:
                    current().stopped = True
                    raise Interrupted(guard.received)
                progress(rows, plan.tokens)

    def written(shard: Shard) -> None:
        (batch, row), skipped = following.popleft()
        _append(folder, {"shard": shard, "batch": batch, "row": row, "skipped": skipped})

    progress(done, plan.tokens)
    shards = [line.shard for line in lines]
    with InterruptGuard() as guard, ShardWriter(folder, DTYPES[plan.dtype], shards, written) as writer:
        for whole, (first, after) in regrouped(batches() if done < plan.tokens else (), caches.SHARD_ROWS, start):
            following.append((after, counts[after.batch]))
            writer.add(whole, {"batch": first.batch, "row": first.row})
    facts = {
        "provenance": beginning.provenance,
        "d_in": beginning.d_in,
        "dtype": plan.dtype,
        "gradients": plan.gradients,
    }
    finish(target, folder, {**facts, "skipped": bad.count, "shards": writer.shards})
    return ActivationCache.open(target)


def _check_space(
    target: Path, beginning: _Beginning, plan: HarvestPlan, done: int, tell: Callable[[str], object]
) -> None:
    """Say how much space the rest takes, or raise where there is less."""
    numbers = beginning.d_in * (1 + plan.gradients)
    row = numbers * DTYPES[plan.dtype].itemsize + 16  # token, document and position
    needed = (plan.tokens - done) * row
    tell(f"needs {check_space(target.parent, needed, f'a cache of {plan.tokens:,} tokens')}")


def _append(folder: Path, facts: dict[str, Any]) -> None:
    """Write one more line of the journal."""
    path = folder / JOURNAL
    with writing(path), path.open("ab") as file:
        file.write(stamp(json.dumps({"seal": BLANK, **facts}).encode()) + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _read_journal(folder: Path, path: str | Path, tell: Callable[[str], object]) -> tuple[_Beginning, list[_Line]]:
    """What a journal says, up to the first line that is cut off or damaged, or whose shard is; it is cut there."""
    journal = folder / JOURNAL
    first, *rest = read_bounded(journal, _LONGEST).split(b"\n")
    if not unbroken(first):
        if not any(rest) and not any(folder.glob("shard-*")):  # it was killed at once
            raise SaekitError(_NOTHING.format(path))
        raise SaekitError(f"'{journal}' is damaged, so the harvest cannot go on; --overwrite begins anew")
    beginning: _Beginning = checked(_Beginning, parse_json(first, journal), journal)
    lines: list[_Line] = []
    for number, text in enumerate(rest):
        if not unbroken(text):
            break
        line: _Line = checked(_Line, parse_json(text, journal), journal)
        file = folder / f"shard-{number:05d}.safetensors"
        if not file.is_file() or not unchanged(file, line.shard):
            tell(f"'{file}' is missing or damaged; harvesting again from there")
            break
        lines.append(line)
    kept = b"".join(text + b"\n" for text in [first, *rest[: len(lines)]])
    replace_file(journal, lambda part: part.write_bytes(kept))
    return beginning, lines
