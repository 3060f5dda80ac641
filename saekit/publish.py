"""Dictionaries pushed to the Hugging Face hub, with their figures and a model card."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from saekit.card import card, published
from saekit.errors import SaekitError
from saekit.formats.registry import ABOUT, config_names, files_of, weight_names
from saekit.hub import HubPath, api, ask, asking, local_folder
from saekit.loading import find, load

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_CARD = "README.md"


def push(
    dictionary: str | Path,
    to: str,
    *,
    private: bool = False,
    message: str | None = None,
    overwrite: bool = False,
) -> HubPath:
    """Push a dictionary to the hub in one commit, with its run's figures and a model card.

    Its files are pushed as they are, but for absolute paths in them, of which the last part is left; or those that
    ``save`` writes where it is in another package's format. The repository, or the branch, is made where it is missing.

    Args:
        dictionary: its folder, or its run's; it is loaded first, so nothing broken is pushed.
        to: ``owner/repo/path``, ``owner/repo`` for the root, ``owner/repo@branch/path`` for another branch than main.
        private: the repository must be private, and is made so where it is missing.
        message: of the commit.
        overwrite: replace a dictionary, its figures and its card that are there. The hub keeps them in its history.

    Returns:
        Where it is.

    Raises:
        SaekitError: there is no dictionary or no token, a dictionary is there already, the repository is public though
            ``private`` is asked, or the hub refuses or cannot be reached.
    """
    from huggingface_hub import get_token

    hub_path = HubPath.parse(to)
    if hub_path.revision and re.fullmatch("[0-9a-f]{40}", hub_path.revision):
        raise SaekitError(f"'{to}' names a commit; a dictionary is pushed to a branch")
    if get_token() is None:
        raise SaekitError("there is no token to write to the hub with; `hf auth login` or HF_TOKEN gives one")
    with TemporaryDirectory() as spare:
        folder = local_folder(dictionary)
        sae = load(folder)
        if find(folder)[0] != "saelens":
            folder = sae.save(Path(spare) / "sae")
        _commit(api(), folder, hub_path, private, message, overwrite)
    return hub_path


def _commit(hub: HfApi, folder: Path, hub_path: HubPath, private: bool, message: str | None, overwrite: bool) -> None:
    """Write what belongs to a dictionary in one commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    files, text = files_of(folder), card(folder, hub_path)
    head, there = _prepared(hub, hub_path, private)
    weights, configs = ({hub_path.file(name) for name in names()} for names in (weight_names, config_names))
    ours = (weights | configs | {hub_path.file(name) for name in ABOUT}) & there
    if ours and not overwrite:
        raise SaekitError(
            f"'{hub_path}' holds {min(ours)} already; choose another path, or pass --overwrite to replace what is there"
        )
    replaced = bool(weights & there)  # or configs and card stand for something else
    added = {hub_path.file(name): published(file) for name, file in files.items()}
    if replaced or hub_path.file(_CARD) not in there:
        added[hub_path.file(_CARD)] = text.encode()
    if hub_path.path and _CARD not in there:
        added[_CARD] = card(folder, hub_path, above=True).encode()
    operations: list[Any] = [CommitOperationAdd(name, content) for name, content in added.items()]
    stale = ours - added.keys() - (set() if replaced else configs)
    operations += [CommitOperationDelete(name) for name in sorted(stale)]
    with asking(hub_path, to_write=True):
        hub.create_commit(
            hub_path.repo,
            operations,
            commit_message=message or f"Dictionary {hub_path.path or hub_path.repo.partition('/')[2]}",
            revision=hub_path.revision,
            parent_commit=head,
        )


def _prepared(hub: HfApi, hub_path: HubPath, private: bool) -> tuple[str | None, set[str]]:
    """The last commit of a branch, made with its repository where it is missing, and the files that it holds."""
    with asking(hub_path, to_write=True):
        hub.create_repo(hub_path.repo, private=private, exist_ok=True)
    if private and not ask(hub, replace(hub_path, revision=None)).private:
        raise SaekitError(
            f"'{hub_path.repo}' is public already; without --private, everybody sees what is pushed there"
        )
    if hub_path.revision:
        with asking(hub_path, to_write=True):
            hub.create_branch(hub_path.repo, branch=hub_path.revision, exist_ok=True)
    about = ask(hub, hub_path)
    return about.sha, {each.rfilename for each in about.siblings or ()}
