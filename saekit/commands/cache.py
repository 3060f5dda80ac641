"""``saekit cache``: harvest activations into a cache, and look after caches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from saekit.activations.settings import HarvestPlan
from saekit.commands.flags import flags, joined, with_flags
from saekit.errors import SaekitError

cache_app = typer.Typer()


@cache_app.callback(invoke_without_command=True)
def cache(
    ctx: typer.Context,
    out: Path | None = typer.Option(None, help="folder of the cache; a harvest needs it"),
    device: str = typer.Option("auto", help="auto, cpu, cuda, mps"),
    trust_remote_code: bool = typer.Option(False, help="let code run that comes with the model"),
    resume: bool = typer.Option(False, help="go on with the harvest in --out; other flags may be left out"),
    overwrite: bool = typer.Option(False, help="replace a cache in --out"),
    quiet: bool = typer.Option(False, help="no progress bar"),
    **asked: Any,
) -> None:
    """Harvest activations of the training text into a cache that `saekit train --cache` reads.

    A harvest that was stopped, or killed, goes on with --resume.
    """
    if ctx.invoked_subcommand is not None:
        return
    if out is None:
        raise SaekitError("'saekit cache' needs --out, the folder of the cache")
    if resume and overwrite:
        raise SaekitError("a harvest is either resumed or overwritten, not both")

    from saekit.activations.resumable import harvest_cache, resume_cache
    from saekit.interrupt import Interrupted
    from saekit.machine import pick_device

    given = {name: value for name, value in joined(asked, HarvestPlan).items() if value is not None}
    plan = HarvestPlan(**given)
    try:
        with _bar(f"harvesting {out.name}", quiet) as (progress, tell):
            about = {"device": str(pick_device(device)), "trust_remote_code": trust_remote_code}
            if resume:
                made = resume_cache(out, given, progress=progress, tell=tell, **about)  # type: ignore[arg-type]
            else:
                made = harvest_cache(out, plan, overwrite=overwrite, progress=progress, tell=tell, **about)  # type: ignore[arg-type]
    except Interrupted as stop:
        print(f"\nsaekit: stopped; go on with: saekit cache --out {out} --resume", file=sys.stderr)
        sys.exit(stop.code)
    if not resume and len(made) < plan.tokens:
        print(f"saekit: the text held only {len(made):,} of {plan.tokens:,} tokens", file=sys.stderr)
    print(f"cache: {out}    {len(made):,} tokens of width {made.d_in}, {made.dtype}, {len(made.shards)} shards")


with_flags(cache, flags(HarvestPlan, "Data"))


@cache_app.command()
def verify(
    path: Path = typer.Argument(help="folder of the cache"),
    quiet: bool = typer.Option(False, help="no progress bar"),
) -> None:
    """Read every byte of a cache, and name the shards that are not as they were written."""
    from saekit.activations import ActivationCache
    from saekit.activations.repair import verify as verified

    count = len(ActivationCache.open(path, complete=False).shards)
    with _bar(f"verifying {path.name}", quiet) as (progress, _):
        found = verified(path, lambda done: progress(done, count))
    for damage in found:
        print(f"{damage.file} {damage.what}")
    if found:
        raise SaekitError(
            f"{len(found)} of the {count} shards of '{path}' are missing or damaged; "
            f"`saekit cache repair {path}` harvests them again"
        )
    print(f"cache: {path}    {len(ActivationCache.open(path)):,} tokens in {count} shards, each as it was written")


@cache_app.command()
def repair(
    path: Path = typer.Argument(help="folder of the cache"),
    device: str = typer.Option("auto", help="auto, cpu, cuda, mps: the one that the cache was harvested on"),
    trust_remote_code: bool = typer.Option(False, help="let code run that comes with the model"),
    quiet: bool = typer.Option(False, help="no progress bar"),
) -> None:
    """Harvest the missing and damaged shards of a cache again, byte for byte as they were."""
    from saekit.activations import ActivationCache
    from saekit.activations.repair import repair as repaired
    from saekit.machine import pick_device

    count = len(ActivationCache.open(path, complete=False).shards)
    with _bar(f"repairing {path.name}", quiet) as (progress, _):
        found = repaired(
            path,
            device=str(pick_device(device)),
            trust_remote_code=trust_remote_code,
            on_shard=lambda done: progress(done, count),
        )
    for damage in found:
        print(f"{damage.file} {damage.what}: harvested again, as it was")
    if not found:
        print(f"cache: {path}    nothing to repair: each of the {count} shards is as it was written")


@contextmanager
def _bar(title: str, quiet: bool) -> Iterator[tuple[Callable[[int, int], object], Callable[[str], object]]]:
    """A progress bar: what tells it of done and total, and what prints a line above it."""
    from rich.progress import Progress

    with Progress(disable=quiet) as screen:
        task = screen.add_task(title, total=None)
        yield (
            lambda done, total: screen.update(task, completed=done, total=total),
            lambda line: print(line) if quiet else screen.console.print(line, highlight=False, markup=False),
        )
