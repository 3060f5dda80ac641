"""A stand-in for the Hugging Face hub: as much of its HTTP interface as its client uses to read and to commit."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

FIGURES = {
    "about": {"d_in": 6, "d_sae": 20, "dataset": "python", "part": "heldout"},
    "sparsity": {"tokens": 4321, "l0": 3.0, "dead": 2},
    "reconstruction": {"fvu": 0.25, "cosine": None},
}
TOKENS = {"hf_writer": True, "hf_reader": False}  # whether they may write
_LARGE = (".safetensors", ".npz", ".pt")


@dataclass
class Repository:
    """Branches by name and commits by hash, each a mapping of names to contents."""

    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str = "") -> str:
        number = hashlib.sha1(f"{len(self.commits)}{branch}{sorted(files)}".encode()).hexdigest()
        self.commits[number], self.branches[branch] = files, number
        self.messages.append(message)
        return number

    def at(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


class StandIn:
    """The hub's state.

    Attributes:
        repos: by ``owner/name``.
        asked: every request so far, as ``"GET /path"``.
        broken: a status to answer everything with.
        missing: a file that is listed and cannot be had.
        before_commit: called once when a commit arrives, before it is looked at.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.broken: int | None = None
        self.missing = ""
        self.before_commit: Any = None
        self.url = ""

    def add(self, repo: str, files: dict[str, bytes], **about: bool) -> Repository:
        self.repos[repo] = Repository(**about)
        self.repos[repo].commit("main", {".gitattributes": b"", **files})
        return self.repos[repo]

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        found = self.repos[repo]
        return found.commits[found.at(revision) or ""]

    def fetched(self) -> list[str]:
        """The names of files that were downloaded since the last time."""
        names = [
            line.split("/resolve/")[1].split("/", 1)[1]
            for line in self.asked
            if line.startswith("GET") and "/resolve/" in line
        ]
        self.asked.clear()
        return sorted(names)


class _Refusal(Exception):  # noqa: N818
    def __init__(self, status: int, code: str = "", message: str = "", **body: str) -> None:
        self.body = json.dumps(body).encode()
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StandIn

    def log_message(self, *_: object) -> None: ...

    def _serve(self) -> None:
        path = urlsplit(self.path).path
        self.hub.asked.append(f"{self.command} {unquote(path)}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if self.hub.broken:
                raise _Refusal(self.hub.broken)
            self._route(path, body)
        except _Refusal as no:
            self._answer(no.status, no.body, no.headers)

    do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815

    def _route(self, path: str, body: bytes) -> None:
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if path == "/api/validate-yaml":
            head = json.loads(body)["content"].split("---\n")[1]
            assert isinstance(yaml.safe_load(head), dict)
            self._json({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._may_write()
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.hub.repos:
                raise _Refusal(409, message="it is there already", url=f"{self.hub.url}/{name}")
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            self.hub.add(name, {}, private=private)
            self._json({"url": f"{self.hub.url}/{name}"})
        elif parts[:2] == ["api", "models"]:
            self._model("/".join(parts[2:4]), parts[4:], body)
        elif parts[2:3] == ["resolve"]:
            repo = "/".join(parts[:2])
            self._file(repo, self._revision(repo, parts[3]), "/".join(parts[4:]))
        elif parts[2:] == ["info", "lfs", "objects", "batch"]:
            self._may_write()
            objects = [{k: each[k] for k in ("oid", "size")} for each in json.loads(body)["objects"]]
            for each in objects:
                if each["oid"] not in self.hub.stored:
                    each["actions"] = {"upload": {"href": f"{self.hub.url}/stored/{each['oid']}"}}
            self._json({"objects": objects}, "application/vnd.git-lfs+json")
        elif parts[0] == "stored":
            assert hashlib.sha256(body).hexdigest() == parts[1]
            self.hub.stored[parts[1]] = body
            self._answer(200)
        else:
            raise _Refusal(404)

    def _model(self, name: str, rest: list[str], body: bytes) -> None:
        repo = self._repository(name)
        if not rest or rest[0] == "revision":
            number = self._revision(name, "/".join(rest[1:]) or "main")
            files = [{"rfilename": file} for file in repo.commits[number]]
            self._json({"id": name, "sha": number, "private": repo.private, "siblings": files})
            return
        if rest[0] == "tree":
            files = repo.commits[self._revision(name, rest[1])]
            self._json([{"type": "file", "path": file, "size": len(files[file]), "oid": "0" * 40} for file in files])
            return
        self._may_write()
        if rest[0] == "preupload":
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(_LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            self._json({"files": files})
        elif rest[0] == "branch":
            if "/".join(rest[1:]) in repo.branches:
                raise _Refusal(409, message="it is there already")
            repo.branches["/".join(rest[1:])] = repo.branches["main"]
            self._json({})
        elif rest[0] == "commit":
            if self.hub.before_commit:
                self.hub.before_commit()
            self._commit(name, repo, "/".join(rest[1:]), [json.loads(line) for line in body.splitlines()])

    def _commit(self, name: str, repo: Repository, branch: str, lines: list[dict[str, Any]]) -> None:
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repo.at(branch)):
            raise _Refusal(412, message="the branch has moved")
        files = dict(repo.commits[repo.at(branch) or ""])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        number = repo.commit(branch, files, header["summary"])
        self._json({"success": True, "commitUrl": f"{self.hub.url}/{name}/commit/{number}", "commitOid": number})

    def _file(self, repo: str, number: str, name: str) -> None:
        content = self.hub.repos[repo].commits[number].get(name)
        if content is None or name == self.hub.missing:
            raise _Refusal(404, "EntryNotFound")
        self._answer(200, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": number})

    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _repository(self, name: str) -> Repository:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self._token() not in TOKENS):
            raise _Refusal(404 if self._token() else 401, "RepoNotFound")
        if repo.gated and self._token() not in TOKENS:
            raise _Refusal(403, "GatedRepo")
        return repo

    def _revision(self, name: str, revision: str) -> str:
        number = self._repository(name).at(revision)
        if number is None:
            raise _Refusal(404, "RevisionNotFound")
        return number

    def _may_write(self) -> None:
        if not TOKENS.get(self._token()):
            raise _Refusal(403, message="you have no right to write here")

    def _json(self, value: Any, kind: str = "application/json") -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": kind})

    def _answer(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def stand_in() -> Iterator[StandIn]:
    """A hub that answers at its ``url`` for as long as it is entered."""
    hub = StandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def make_run(folder: Path) -> Path:
    """A run's folder, whose dictionary SAELens wrote, with figures and what is nobody's business."""
    shutil.copytree(Path(__file__).parents[1] / "data/saelens_topk", folder / "sae")
    (folder / "config.yaml").write_text("out: /home/me/secret\n")
    (folder / "eval.json").write_text(json.dumps(FIGURES))
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/step-1.safetensors").write_bytes(b"moments")
    return folder
