"""Commands that die by SIGKILL: at a chosen file operation, at half of a written file, or after a delay.

Importing torch and loading a model take seconds, so a *zygote* does both once and forks a child for every command. The
child is a process like any other: it runs ``saekit.cli.main`` and really dies.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

# what makes tiny data fall into many pieces that do not end together; executed in the zygote
PRELUDE = """
from saekit.activations import cache, stream
from saekit.trainers import lanes
cache.SHARD_ROWS = 200
stream._BLOCK = 300
lanes.SAMPLE = 500
"""
_MODULES = """
    saekit.activations.gradients saekit.activations.repair saekit.activations.resumable saekit.cli saekit.evals.report
    saekit.interrupt saekit.trainers.many saekit.trainers.trainer numpy.ctypeslib transformer_lens typer._adapters
"""
_LONGEST = 600.0  # seconds after which a command counts as hanging; it takes a few
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "shutil.rmtree"}


class End(NamedTuple):
    """How a command ended.

    Attributes:
        code: its exit code; None where it was killed.
        said: on both its outputs.
        seconds: it took.
        operations: that changed a file; the one before which it was killed is counted, too.
        halves: moments at which a file, or the last line of one, could be half written, counted alike.
        last: the operation before which it was killed.
    """

    code: int | None
    said: str
    seconds: float
    operations: int
    halves: int
    last: str


class Zygotes:
    """Processes that have everything loaded and fork one child at a time each."""

    def __init__(self, count: int) -> None:
        self._idle: queue.Queue[socket.socket] = queue.Queue()
        pairs = [socket.socketpair() for _ in range(count)]
        ends = [theirs.fileno() for _, theirs in pairs]
        command = [sys.executable, __file__, PRELUDE, *map(str, ends)]
        alone = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # a fork loses threads
        self._process = subprocess.Popen(command, pass_fds=ends, stdin=subprocess.DEVNULL, env=alone)
        for ours, theirs in pairs:
            theirs.close()
            self._idle.put(ours)

    def run(self, folder: Path, *arguments: object, at: int = 0, torn: bool = False, after: float = 0) -> End:
        """Run ``saekit`` in a folder.

        Args:
            folder: the current one of the command; what changes below it counts as a file operation.
            arguments: of the command line.
            at: number, from 1, of the file operation just before which it is killed; 0 for none.
            torn: count instead the moments at which a file has been written and is not yet in its place, or a line is
                at the end of one; it is killed with half of what was written. Those of safetensors count twice: half
                may be under the name that the library gives a file at first.
            after: seconds after which it is killed; 0 for never.
        """
        said = folder.with_name(folder.name + ".said")
        said.touch()  # the command may be killed before it opens it
        job = {"folder": str(folder), "arguments": [*map(str, arguments)], "said": str(said)}
        job |= {"at": at, "torn": torn, "after": after}
        line = self._idle.get()
        try:
            line.sendall(json.dumps(job).encode() + b"\n")
            answer = json.loads(_read_line(line))
        finally:
            self._idle.put(line)
        end = End(said=said.read_text(errors="replace"), **answer)
        said.unlink()
        assert end.code is not None or end.last or after, f"{arguments} took longer than {_LONGEST} s: {end.said}"
        return end

    def close(self) -> None:
        """End them."""
        while not self._idle.empty():
            self._idle.get().close()
        self._process.wait(_LONGEST)


def _read_line(line: socket.socket) -> bytes:
    found = b""
    while not found.endswith(b"\n"):
        more = line.recv(1 << 16)
        assert more, "the zygote is gone"
        found += more
    return found


def main() -> None:
    """The zygote: load, split up, and serve."""
    for name in _MODULES.split():
        with contextlib.suppress(ModuleNotFoundError):  # a library may call it otherwise; it is only quicker so
            importlib.import_module(name)
    from saekit.activations import source

    model = source.load_model("embedded", device="cpu", dtype="float32")
    source.load_model = lambda *_, **__: model
    exec(sys.argv[1], {})
    gc.collect()
    gc.freeze()  # a collection would write to, and so copy, what the children share
    servers = []
    for number in map(int, sys.argv[2:]):
        server = os.fork()
        if not server:
            with socket.socket(fileno=number) as line, line.makefile("rb") as jobs:
                for job in jobs:
                    line.sendall(json.dumps(_run(json.loads(job))).encode() + b"\n")
            os._exit(0)
        os.close(number)
        servers.append(server)
    for server in servers:
        os.waitpid(server, 0)


def _run(job: dict[str, Any]) -> dict[str, Any]:
    """Fork a child for a job, kill it when its time has come, and tell how it ended."""
    start = time.perf_counter()
    told, telling = os.pipe()
    child = os.fork()
    if not child:
        os.close(told)
        _be_child(job, telling)
    os.close(telling)
    if not _tells(told, job["after"] or _LONGEST):
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    seconds = time.perf_counter() - start
    with open(told) as file:
        operations, halves, last = (file.read() or "0 0 ").split(" ", 2)
    code = os.waitstatus_to_exitcode(status)
    return {
        "code": None if code == -signal.SIGKILL else code,
        "seconds": seconds,
        "operations": int(operations),
        "halves": int(halves),
        "last": last,
    }


def _tells(told: int, seconds: float) -> bool:
    """Whether a child says something, or ends, in so many seconds."""
    return bool(select.select([told], [], [], seconds)[0])


def _be_child(job: dict[str, Any], telling: int) -> NoReturn:
    code: Any = 99
    try:
        from saekit.cli import main as saekit_main

        os.chdir(job["folder"])
        with open(job["said"], "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = ["saekit", *job["arguments"]]
        count = _die_at(job["at"], job["torn"], telling)
        try:
            saekit_main()
        except SystemExit as stop:
            code = stop.code or 0
        os.write(telling, f"{count[False]} {count[True]} ".encode())
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _die_at(at: int, torn: bool, telling: int) -> list[int]:
    """Have this process killed at operation ``at``; returns the counts of operations and halves as they grow."""
    count, home = [0, 0], os.getcwd() + os.sep
    fsync = os.fsync
    dying = False

    def reached(half: bool, what: str, path: str, spoil: Callable[[str], None] = lambda path: None) -> None:
        nonlocal dying
        if dying:
            return
        count[half] += 1
        if half == torn and count[half] == at:
            dying = True
            spoil(path)
            os.write(telling, f"{count[False]} {count[True]} {what} {path.removeprefix(home)}".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _CHANGES and not (event == "open" and arguments[2] & _WRITING):
            return
        if not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        path = os.path.abspath(os.fsdecode(arguments[0]))
        if not path.startswith(home) or _changes_nothing(event, path, arguments):
            return
        if event == "os.rename" and path.endswith(".part") and os.path.isfile(path):
            if path.endswith(".safetensors.part"):
                reached(True, "half of what becomes", path, _halve_within_safetensors)
            reached(True, "half of", path, _halve)
        reached(False, event, path)

    def watched_fsync(number: int) -> None:
        path = os.readlink(f"/proc/self/fd/{number}")
        if os.path.isfile(path) and path.startswith(home) and not path.endswith(".part"):
            reached(True, "half of the last line of", path, _halve_line)
        fsync(number)

    sys.addaudithook(hook)
    os.fsync = watched_fsync
    return count


def _changes_nothing(event: str, path: str, arguments: tuple[Any, ...]) -> bool:
    """Whether a kill before an operation leaves what a kill before the next one does."""
    if event == "open":  # a file without a name, in a folder; a temporary file once more, which nobody reads yet
        again = path.endswith(".part") and not arguments[2] & (os.O_CREAT | os.O_TRUNC)
        return again or os.path.isdir(path)
    if event == "os.remove":
        return arguments[1] == -1 and not os.path.lexists(path)
    return event == "os.mkdir" and os.path.lexists(path)


def _halve(path: str) -> None:
    os.truncate(path, os.path.getsize(path) // 2)


def _halve_within_safetensors(path: str) -> None:
    """As it is while the library writes to a file of its own beside the one that it was told."""
    own = os.path.join(os.path.dirname(path), ".tmpaB3dE6")
    os.rename(path, own)
    _halve(own)
    with open(path, "w"):
        pass


def _halve_line(path: str) -> None:
    content = Path(path).read_bytes()
    before = content.rstrip(b"\n").rfind(b"\n") + 1
    os.truncate(path, (before + len(content)) // 2)


@contextlib.contextmanager
def zygotes(count: int = 2) -> Iterator[Zygotes]:
    """Zygotes for as long as it is entered."""
    made = Zygotes(count)
    try:
        yield made
    finally:
        made.close()


if __name__ == "__main__":
    main()
