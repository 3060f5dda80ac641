"""An evaluator of dictionaries with progress bars on the screen, for the commands that need one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saekit.evals import Evaluator, Report
    from saekit.ranks import Ranks


def open_evaluator(*, device: str, **settings: Any) -> Evaluator:
    """An evaluator with these settings on the device of this name."""
    from saekit.evals import Evaluator
    from saekit.machine import pick_device

    return Evaluator(device=str(pick_device(device)), **settings)


@contextmanager
def bars(evaluator: Evaluator, quiet: bool) -> Iterator[None]:
    """While it is entered, the evaluator shows how far it is."""
    from rich.progress import Progress

    with Progress(disable=quiet) as progress:

        def bar(name: str, contexts: int) -> Callable[[int], object]:
            task = progress.add_task(f"evaluating {name}", total=contexts)
            return lambda done: progress.advance(task, done)

        evaluator.on_contexts = bar
        yield
    evaluator.on_contexts = None


def evaluated(
    evaluator: Evaluator, paths: Sequence[str | Path], quiet: bool, *, tell: bool = True
) -> dict[str, Report]:
    """Evaluate dictionaries and print one table (with ``tell``); returns the reports by the dictionary's path.

    Raises:
        SaekitError: one of the paths holds no dictionary, before any is evaluated, or one cannot be.
    """
    from saekit.loading import find

    for path in paths:
        find(path)
    with bars(evaluator, quiet):
        reports = {str(path): evaluator(path) for path in paths}
    if tell:
        show(reports)
    return reports


def evaluated_by_all(evaluator: Evaluator, paths: Sequence[str], quiet: bool, ranks: Ranks) -> dict[str, Report]:
    """``evaluated``, the dictionaries dealt out to the processes in turn; the first prints the table.

    Raises:
        SaekitError: as ``evaluated``, on all processes.
    """
    from saekit.evals import Report
    from saekit.ranks import agreeing

    if ranks.world == 1:
        return evaluated(evaluator, paths, quiet)
    own: dict[str, Report] = {}
    with agreeing(ranks):
        own = evaluated(evaluator, paths[ranks.rank :: ranks.world], quiet or not ranks.leads, tell=False)
    told = ranks.told({path: report.to_dict() for path, report in own.items()})
    groups = {path: facts for each in told for path, facts in each.items()}
    reports = {path: Report(groups[path], groups[path].pop("about")) for path in paths}
    if ranks.leads:
        show(reports)
    return reports


def show(reports: dict[str, Report]) -> None:
    """Print one table."""
    from rich.console import Console

    from saekit.evals import table
    from saekit.evals.report import WIDTH

    console = Console()
    console.width = console.width if len(reports) == 1 else max(console.width, WIDTH)  # rather wrapped than cut off
    console.print(table(reports))
