"""Dictionaries on the Hugging Face hub: ``hf://owner/repo/path`` read through its client's cache.

Only the files of the dictionary that is named are downloaded. They come from strangers: what ``saekit.load`` checks of
a folder it checks of them, and no name of the repository becomes a path here that the user did not write.
"""

from __future__ import annotations

import glob
import posixpath
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from saekit.errors import SaekitError, did_you_mean, first_line
from saekit.files import expanded
from saekit.formats.registry import ABOUT, FORMATS, format_of, weight_names
from saekit.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SCHEME = "hf://"
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


def local_folder(path: str | Path) -> Path:
    """The folder of a dictionary: itself, or where its copy from the hub lies."""
    return download(path) if str(path).startswith(SCHEME) else expanded(path)


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
    from huggingface_hub import try_to_load_from_cache

    hub_path = HubPath.parse(path)
    try:
        about = ask(api(), hub_path)
    except UnreachableError as error:
        return _cached(hub_path, error)
    names = _needed(hub_path, {each.rfilename for each in about.siblings or ()})
    if all(isinstance(try_to_load_from_cache(hub_path.repo, name, revision=about.sha), str) for name in names):
        hub_path = replace(hub_path, revision=about.sha)
        return _snapshot(hub_path, (), local_files_only=True) / hub_path.path  # without bars of progress
    return _snapshot(hub_path, names) / hub_path.path


def _snapshot(hub_path: HubPath, names: Iterable[str], **options: Any) -> Path:
    """The cache's folder of a repository's commit, once these files are in it."""
    from huggingface_hub import snapshot_download

    with asking(hub_path):
        return Path(
            snapshot_download(
                hub_path.repo,
                revision=hub_path.revision,
                allow_patterns=[glob.escape(name) for name in names],
                max_workers=1,  # a few files; what is cut off lacks the later ones
                library_name="saekit",
                library_version=__version__,
                **options,
            )
        )


def _needed(hub_path: HubPath, names: set[str]) -> list[str]:
    """The files of a repository that the dictionary at a place consists of.

    Raises:
        SaekitError: there is none.
    """
    named = hub_path.path in names  # one file of weights, rather than a folder
    for home in [posixpath.dirname(hub_path.path)] if named else [hub_path.path, hub_path.file("sae")]:
        for _, known in FORMATS.each():
            weights = [hub_path.path] if named else [_join(home, name) for name in known.weights]
            if named and not any(map(PurePosixPath(hub_path.path).match, known.weights)):
                continue
            if names.intersection(weights) and names.issuperset(_join(home, name) for name in known.requires):
                beside = [_join(home, name) for name in (*known.requires, *known.optional)]
                about = [] if named else [hub_path.file(name) for name in ABOUT]
                return [name for name in (*about, *beside, *weights) if name in names]
    there = _dictionaries(names)
    if not there:
        raise SaekitError(f"'{hub_path.repo}' holds no dictionary in a known format")
    where = f"at '{hub_path.path}'" if hub_path.path else "at its root"
    raise SaekitError(f"'{hub_path.repo}' holds no dictionary {where}{did_you_mean(hub_path.path, there)}")


def _join(folder: str, name: str) -> str:
    """A file of a repository by its folder there; ``../NAME`` is one of the folder above."""
    return posixpath.normpath(posixpath.join(folder, name))


def _dictionaries(names: Iterable[str]) -> list[str]:
    """The places of dictionaries among the files of a repository."""
    fixed = weight_names()
    patterns = [name for _, known in FORMATS.each() for name in known.weights if "*" in name]
    there = set()
    for path in map(PurePosixPath, names):
        if path.name in fixed:
            there.add(path.parent.parent if path.parent.name == "sae" else path.parent)
        elif any(map(path.match, patterns)):
            there.add(path)
    return sorted(map(str, there))


def _cached(hub_path: HubPath, reason: UnreachableError) -> Path:
    """What the cache holds of a dictionary, where the hub is not to be asked."""
    try:
        copy = _snapshot(hub_path, (), local_files_only=True) / hub_path.path
        format_of(copy)
    except SaekitError:
        raise SaekitError(f"{reason}, and '{hub_path}' is not in the cache") from None
    if not reason.wanted:
        print(f"saekit: {reason}; using the copy of '{hub_path}' in the cache", file=sys.stderr)
    return copy


class UnreachableError(SaekitError):
    """The hub was not asked, or did not answer."""

    def __init__(self, text: str, *, wanted: bool = False) -> None:
        super().__init__(text)
        self.wanted = wanted  # by HF_HUB_OFFLINE


def api() -> HfApi:
    """The hub's client."""
    from huggingface_hub import HfApi

    return HfApi(library_name="saekit", library_version=__version__)


def ask(api: HfApi, hub_path: HubPath) -> Any:
    """What the hub says of a repository at a revision: ``sha``, ``private``, ``siblings``."""
    with asking(hub_path):
        return api.model_info(hub_path.repo, revision=hub_path.revision, timeout=_SECONDS)


@contextmanager
def asking(hub_path: HubPath, *, to_write: bool = False) -> Iterator[None]:
    """While it is entered, what the hub's client raises becomes one line.

    Raises:
        SaekitError: the hub refuses.
        UnreachableError: it does not answer.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise UnreachableError("the hub is not asked (HF_HUB_OFFLINE is set)", wanted=True) from None
    except errors.GatedRepoError:
        raise SaekitError(f"'{hub_path.repo}' asks for an agreement before it is read; give it on its page") from None
    except errors.RepositoryNotFoundError:
        raise SaekitError(
            f"there is no repository '{hub_path.repo}' on the hub, or none that your token may see"
        ) from None
    except errors.RevisionNotFoundError:
        raise SaekitError(f"'{hub_path.repo}' has no revision '{hub_path.revision}'") from None
    except errors.EntryNotFoundError as error:
        raise SaekitError(f"'{hub_path}' cannot be read: {_said(error)}") from None
    except errors.HfHubHTTPError as error:
        raise _refusal(error, hub_path, to_write) from None
    except SaekitError:
        raise
    except OSError as error:
        if error.filename is not None:  # the disk, not the network
            raise
        raise UnreachableError(f"the hub cannot be reached ({first_line(error)})") from None
    except Exception as error:  # of whichever library the client sends its requests with
        if type(error).__module__.split(".")[0].rstrip("2") not in ("httpx", "httpcore", "requests", "urllib3"):
            raise
        raise UnreachableError(f"the hub cannot be reached ({first_line(error)})") from None


def _refusal(error: Any, hub_path: HubPath, to_write: bool) -> SaekitError:
    """What an answer of the hub means that is no success."""
    status = error.response.status_code
    if status in (401, 403):
        doing = "write to" if to_write else "read"
        return SaekitError(f"your token may not {doing} '{hub_path.repo}' ({status}); `hf auth login` takes another")
    if status == 412:
        return SaekitError(f"somebody else has written to '{hub_path.repo}' meanwhile; look at it and try again")
    if status >= 500 or status == 429:
        return UnreachableError(f"the hub does not answer ({status})")
    return SaekitError(f"the hub refuses '{hub_path}': {_said(error)}")


def _said(error: BaseException) -> str:
    """What the hub gave as its reason."""
    return " ".join(str(getattr(error, "server_message", None) or error).split())[:300]
