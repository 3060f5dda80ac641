"""``saekit sweep``: what the runs of a folder are worth against each other."""

from __future__ import annotations

from pathlib import Path

import typer

sweep_app = typer.Typer(help="Compare the runs of a folder.")


@sweep_app.callback()
def _group() -> None:
    """Compare the runs of a folder."""


@sweep_app.command()
def show(
    folder: Path = typer.Argument(help="folder of the runs, as `saekit train --k 16,32 --out FOLDER` makes it"),
    html: Path | None = typer.Option(None, help="where the page goes; sweep.html in the folder if not given"),
) -> None:
    """Show FVU and cross-entropy increase against L0 for every setting, with intervals over seeds.

    Prints a table and writes a page with the same and a figure; the runs that no other is better than are marked.
    """
    from rich.console import Console

    from saekit.evals.report import WIDTH
    from saekit.evals.sweep import page, points, table
    from saekit.files import check_new_file, replace_file

    if html is not None:
        check_new_file(html, "--html")
    found = points(folder)
    console = Console()
    console.width = max(console.width, WIDTH)  # rather wrapped than cut off
    console.print(table(found))
    place = html or folder / "sweep.html"
    replace_file(place, lambda part: part.write_text(page(found, folder.resolve().name)))
    print(f"page: {place}")
