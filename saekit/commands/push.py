"""``saekit push``: a dictionary to the Hugging Face hub."""

from __future__ import annotations

import typer


def push(
    dictionary: str = typer.Argument(help="folder of a dictionary or run"),
    to: str = typer.Argument(help="owner/repo/path, owner/repo, or owner/repo@branch/path"),
    private: bool = typer.Option(False, help="make the repository private, or make sure that it is"),
    message: str | None = typer.Option(None, help="of the commit"),
    overwrite: bool = typer.Option(False, help="replace the dictionary, figures and card that are there"),
) -> None:
    """Push a dictionary to the Hugging Face hub, with its figures and a model card.

    It needs a token: from `hf auth login`, or in HF_TOKEN. What is missing of the repository and its branch is made.
    """
    from saekit.publish import push as pushed

    hub_path = pushed(dictionary, to, private=private, message=message, overwrite=overwrite)
    print(f'pushed: {hub_path}    to load it: saekit.load("{hub_path}")')
