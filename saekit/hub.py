"""Dictionaries on the Hugging Face hub: ``hf://owner/repo/path`` read through its client's cache, and pushed.

Only the files of the dictionary that is named are downloaded. They come from strangers: what ``saekit.load`` checks of
a folder it checks of them, and no name of the repository becomes a path here that the user did not write.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from saekit.errors import SaekitError, did_you_mean, first_line
from saekit.files import expanded
from saekit.reading import check_inside

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SCHEME = "hf://"
WEIGHTS = ("sae_weights.safetensors", "sae.safetensors", "ae.pt", "params.npz", "params.safetensors")
CONFIGS = ("cfg.json", "config.json")
ABOUT = ("eval.json", "statistics.safetensors")  # of a run, beside its dictionary
CARD = "README.md"
_SECONDS = 30  # to wait for the hub to say anything
_PART = re.compile(r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?", re.ASCII)  # of a repository's name
_SHOWN = "hf://owner/repo/path"


@dataclass(frozen=True)
class HubPath:
    """A place on the hub.

    Attributes:
        repo: ``owner/name``.
        path: folder in the repository, without slashes at its ends; empty for its root.
        revision: branch, tag or commit; None for the branch ``main``.
    """

    repo: str
    path: str = ""
    revision: str | None = None

    @classmethod
    def parse(cls, text: str | Path) -> HubPath:
        """The place that ``hf://owner/repo@revision/path`` names; scheme, revision (slashes as %2F) and path may lack.

        Raises:
            SaekitError: it names none.
        """
        owner, _, rest = str(text).removeprefix(SCHEME).strip("/").partition("/")
        name, _, path = rest.partition("/")
        name, at, revision = name.partition("@")
        revision = unquote(revision)
        if not (_PART.fullmatch(owner) and _PART.fullmatch(name)):
            raise SaekitError(f"'{text}' names no repository of the hub; write {_SHOWN}")
        if (at and not re.fullmatch(r"[\w./+-]+", revision)) or ".." in revision:
            raise SaekitError(f"'{text}' names no revision after '@'; write hf://{owner}/{name}@main/path")
        parts = path.split("/") if path else []
        if any(part in ("", ".", "..") or "\\" in part or not part.isprintable() for part in parts):
            raise SaekitError(f"'{text}' names no folder of a repository; write {_SHOWN}")
        return cls(f"{owner}/{name}", path, revision or None)

    def __str__(self) -> str:
        revision = f"@{self.revision.replace('/', '%2F')}" if self.revision else ""
        return f"{SCHEME}{self.repo}{revision}{'/' if self.path else ''}{self.path}"

    def file(self, name: str) -> str:
        """Where a file of the folder lies in the repository."""
        return f"{self.path}/{name}" if self.path else name


def is_hub_path(path: str | Path) -> bool:
    """Whether a dictionary is named by its place on the hub."""
    return str(path).startswith(SCHEME)


def local_folder(path: str | Path) -> Path:
    """The folder of a dictionary: itself, or where its copy from the hub lies."""
    return download(path) if is_hub_path(path) else expanded(path)


def download(path: str | Path) -> Path:
    """Download a dictionary's files into the cache of the hub's client, those alone that are not there yet.

    Without a network, or with ``HF_HUB_OFFLINE=1``, what the cache holds is used.

    Args:
        path: ``hf://owner/repo/path``, a folder that holds a dictionary or a run, or one file of weights.

    Returns:
        The folder (or file) in the cache.

    Raises:
        SaekitError: the repository or the path does not exist or may not be read, or the hub cannot be reached and the
            cache does not hold them.
    """
    from huggingface_hub import hf_hub_download

    place = HubPath.parse(path)
    try:
        found = _info(_api(), place)
    except _UnreachableError as error:
        return _cached(place, error)
    needed = _needed(place, {each.rfilename for each in found.siblings or ()})
    for _ in range(2):  # a commit may come between two files; the second time they are of the new one
        copies = {}
        for name in needed:
            with _asking(place):
                copies[name] = Path(hf_hub_download(place.repo, name, revision=place.revision))
        roots = {_root(copy, name) for name, copy in copies.items()}
        if len(roots) == 1:
            return roots.pop() / place.path
    raise SaekitError(f"'{place.repo}' changes while it is read; try again")


def _needed(place: HubPath, names: set[str]) -> list[str]:
    """The files of a repository that the dictionary at a place consists of.

    Weights come last: where a cache holds them, it holds the others too.

    Raises:
        SaekitError: there is none.
    """
    if place.path in names and (_split(place.path)[2] in WEIGHTS or place.path.endswith(".pt")):
        folder = replace(place, path=_split(place.path)[0])
        return [*(folder.file(name) for name in CONFIGS if folder.file(name) in names), place.path]
    inner = replace(place, path=place.file("sae"))
    for folder in (place, inner):
        if any(folder.file(name) in names for name in WEIGHTS):
            wanted = [*(place.file(name) for name in ABOUT), *(folder.file(name) for name in (*CONFIGS, *WEIGHTS))]
            if folder.file("sae.safetensors") in names:  # of sparsify, which tells the model beside its hook points
                wanted.insert(0, replace(folder, path=_split(folder.path)[0]).file("config.json"))
            return [name for name in dict.fromkeys(wanted) if name in names]
    folders = {re.sub(r"(^|/)sae$", "", folder) for folder, _, file in map(_split, names) if file in WEIGHTS}
    there = sorted(folders | {name for name in names if name.endswith(".pt") and _split(name)[2] not in WEIGHTS})
    if not there:
        raise SaekitError(f"'{place.repo}' holds no dictionary in a known format")
    where = f"at '{place.path}'" if place.path else "at its root"
    raise SaekitError(
        f"'{place.repo}' holds no dictionary {where}{did_you_mean(place.path, (n or '.' for n in there))}"
    )


def _split(name: str) -> tuple[str, str, str]:
    return name.rpartition("/")


def _root(copy: Path, name: str) -> Path:
    """The folder of the cache in which a file of this name in the repository lies."""
    return copy.parents[name.count("/")]


def _cached(place: HubPath, reason: _UnreachableError) -> Path:
    """What the cache holds of a dictionary, where the hub is not to be asked."""
    from huggingface_hub import try_to_load_from_cache

    inner = replace(place, path=place.file("sae"))
    for folder in (place, inner):
        for name in WEIGHTS if folder is inner else ("", *WEIGHTS):
            whole = folder.file(name) if name else place.path
            copy = try_to_load_from_cache(place.repo, whole, revision=place.revision) if whole else None
            if isinstance(copy, str):
                if not reason.wanted:
                    print(f"saekit: {reason}; using the copy of '{place}' in the cache", file=sys.stderr)
                return _root(Path(copy), whole) / place.path
    raise SaekitError(f"{reason}, and '{place}' is not in the cache")


class _UnreachableError(SaekitError):
    """The hub was not asked, or did not answer."""

    def __init__(self, text: str, *, wanted: bool = False) -> None:
        super().__init__(text)
        self.wanted = wanted  # by HF_HUB_OFFLINE


def _api() -> HfApi:
    from huggingface_hub import HfApi

    from saekit import __version__

    return HfApi(library_name="saekit", library_version=__version__)


def _info(api: HfApi, place: HubPath) -> Any:
    """What the hub says of a repository at a revision: ``sha``, ``private``, ``siblings``."""
    with _asking(place):
        return api.model_info(place.repo, revision=place.revision, timeout=_SECONDS)


@contextmanager
def _asking(place: HubPath, *, to_write: bool = False) -> Iterator[None]:
    """While it is entered, what the hub's client raises becomes one line.

    Raises:
        SaekitError: the hub refuses.
        _UnreachableError: it does not answer.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise _UnreachableError("the hub is not asked (HF_HUB_OFFLINE is set)", wanted=True) from None
    except errors.GatedRepoError:
        raise SaekitError(f"'{place.repo}' asks for an agreement before it is read; give it on its page") from None
    except errors.RepositoryNotFoundError:
        raise _NoRepositoryError(
            f"there is no repository '{place.repo}' on the hub, or none that your token may see"
        ) from None
    except errors.RevisionNotFoundError:
        raise _NoRevisionError(f"'{place.repo}' has no revision '{place.revision}'") from None
    except errors.EntryNotFoundError as error:
        raise SaekitError(f"'{place}' cannot be read: {_said(error)}") from None
    except errors.HfHubHTTPError as error:
        raise _refusal(error, place, to_write) from None
    except SaekitError:
        raise
    except OSError as error:
        if error.filename is not None:  # the disk, not the network
            raise
        raise _UnreachableError(f"the hub cannot be reached ({first_line(error)})") from None
    except Exception as error:  # of whichever library the client sends its requests with
        if type(error).__module__.split(".")[0].rstrip("2") not in ("httpx", "httpcore", "requests", "urllib3"):
            raise
        raise _UnreachableError(f"the hub cannot be reached ({first_line(error)})") from None


class _NoRepositoryError(SaekitError):
    """The hub knows no such repository."""


class _NoRevisionError(SaekitError):
    """The repository has no such revision."""


def _refusal(error: Any, place: HubPath, to_write: bool) -> SaekitError:
    """What an answer of the hub means that is no success."""
    status = error.response.status_code
    if status in (401, 403):
        doing = "write to" if to_write else "read"
        return SaekitError(f"your token may not {doing} '{place.repo}' ({status}); `hf auth login` takes another")
    if status == 412:
        return SaekitError(f"somebody else has written to '{place.repo}' meanwhile; look at it and try again")
    if status >= 500 or status == 429:
        return _UnreachableError(f"the hub does not answer ({status})")
    return SaekitError(f"the hub refuses '{place}': {_said(error)}")


def _said(error: BaseException) -> str:
    """What the hub gave as its reason."""
    return " ".join(str(getattr(error, "server_message", None) or error).split())[:300]


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

    import saekit
    from saekit.formats import format_of

    place = HubPath.parse(to)
    if place.revision and re.fullmatch("[0-9a-f]{40}", place.revision):
        raise SaekitError(f"'{to}' names a commit; a dictionary is pushed to a branch")
    if get_token() is None:
        raise SaekitError("there is no token to write to the hub with; `hf auth login` or HF_TOKEN gives one")
    with TemporaryDirectory() as spare:
        folder = local_folder(dictionary)
        sae = saekit.load(folder)
        if format_of(folder)[0] != "saelens":
            folder = sae.save(Path(spare) / "sae")
        _commit(_api(), folder, place, private, message, overwrite)
    return place


def _commit(api: HfApi, folder: Path, place: HubPath, private: bool, message: str | None, overwrite: bool) -> None:
    """Write what belongs to a dictionary in one commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    from saekit.card import card, published

    files, text = files_of(folder), card(folder, place)
    head, there = _prepared(api, place, private)
    ours = {place.file(name) for name in (*WEIGHTS, *CONFIGS, *ABOUT)} & there
    if ours and not overwrite:
        raise SaekitError(
            f"'{place}' holds {min(ours)} already; choose another path, or pass --overwrite to replace what is there"
        )
    replaced = any(place.file(name) in there for name in WEIGHTS)  # or configs and card stand for something else
    kept = place.file(CARD) in there and not replaced
    added = {place.file(name): file for name, file in files.items()}
    operations: list[Any] = [CommitOperationAdd(name, published(file)) for name, file in added.items()]
    stale = ours - added.keys() - (set() if replaced else {place.file(name) for name in CONFIGS})
    operations += [CommitOperationDelete(name) for name in sorted(stale)]
    if not kept:
        operations.append(CommitOperationAdd(place.file(CARD), text.encode()))
    if place.path and CARD not in there:
        operations.append(CommitOperationAdd(CARD, card(folder, place, above=True).encode()))
    with _asking(place, to_write=True):
        api.create_commit(
            place.repo,
            operations,
            commit_message=message or f"Dictionary {place.path or place.repo.partition('/')[2]}",
            revision=place.revision,
            parent_commit=head,
        )


def _prepared(api: HfApi, place: HubPath, private: bool) -> tuple[str | None, set[str]]:
    """The last commit of a branch, made with its repository where it is missing, and the files that it holds."""
    try:
        found = _info(api, replace(place, revision=None))
    except _NoRepositoryError:
        with _asking(place, to_write=True):
            api.create_repo(place.repo, private=private)
        found = _info(api, replace(place, revision=None))
    if private and not found.private:
        raise SaekitError(f"'{place.repo}' is public already; without --private, everybody sees what is pushed there")
    if place.revision:
        try:
            found = _info(api, place)
        except _NoRevisionError:
            with _asking(place, to_write=True):
                api.create_branch(place.repo, branch=place.revision)
            found = _info(api, place)
    return found.sha, {each.rfilename for each in found.siblings or ()}


def files_of(folder: Path) -> dict[str, Path]:
    """The files that belong to a dictionary, in its own or its run's folder, by their name on the hub.

    Raises:
        SaekitError: there is none, or one is a link that leads out of its folder.
    """
    from saekit.formats import format_of

    place = format_of(folder)[1]
    place = place.parent if place.is_file() else place
    run = place.parent if place.name == "sae" and (place.parent / "config.yaml").is_file() else place
    found = {name: place / name for name in (*CONFIGS, *WEIGHTS) if (place / name).is_file()}
    found |= {name: home / name for home in (run, place) for name in ABOUT if (home / name).is_file()}
    for file in found.values():
        check_inside(file, file.parent)
    return found
