"""The files of an activation cache: shards of safetensors, written by threads of their own while the next is made."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import lru_cache
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor

from saekit.activations.batch import ActivationBatch
from saekit.activations.manifest import Shard
from saekit.errors import SaekitError, first_line
from saekit.files import replace_file

_BLOCK = 1 << 22  # bytes read at a time for a checksum
_AT_ONCE = 2  # shards being written: one waits for the disk while the other is hashed
_LONGEST_HEADER = 1 << 16
_ROWS = 2048  # that have a checksum of their own
_SUMS = "saekit_xxh3_64"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I32": torch.int32, "I64": torch.int64}


class ShardWriter:
    """Writes batches as shards of a folder; leave it to be sure that they are on the disk.

    Attributes:
        shards: what the manifest tells of each shard that is written.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        shards: Sequence[Shard] = (),
        on_written: Callable[[Shard], object] | None = None,
    ) -> None:
        """Begin to write.

        Args:
            folder: exists.
            dtype: in which activations are stored.
            shards: those that are there already.
            on_written: is told of each shard, in their order, once it is on the disk.
        """
        self.folder, self.dtype, self.on_written = folder, dtype, on_written
        self.shards = list(shards)
        self._count = len(self.shards)
        self._pending: deque[Future[Shard]] = deque()
        self._threads = ThreadPoolExecutor(_AT_ONCE)

    def add(self, batch: ActivationBatch, facts: dict[str, Any] | None = None) -> None:
        """Write one more shard, once there are not too many before it; facts go beside its checksum.

        Raises:
            SaekitError: a shard before it exceeds its dtype, or cannot be written.
        """
        self._wait(_AT_ONCE - 1)
        path = self.folder / f"shard-{self._count:05d}.safetensors"
        self._pending.append(self._threads.submit(write_shard, path, batch, self.dtype, facts or {}))
        self._count += 1

    def settle(self) -> None:
        """Take note of shards that are on the disk by now.

        Raises:
            SaekitError: as ``add``.
        """
        while self._pending and self._pending[0].done():
            self._wait(len(self._pending) - 1)

    def _wait(self, left: int = 0) -> None:
        while len(self._pending) > left:
            self.shards.append(self._pending.popleft().result())
            if self.on_written is not None:
                self.on_written(self.shards[-1])

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # what was harvested before an error or Ctrl-C is kept; a second error would hide the first
        with self._threads, suppress(SaekitError) if error is not None else nullcontext():
            self._wait()


def write_shard(
    path: Path,
    batch: ActivationBatch,
    dtype: torch.dtype,
    facts: dict[str, Any],
    *,
    expected: Shard | None = None,
) -> Shard:
    """Write a shard, and tell what the manifest tells of it.

    Its header has the XXH3 (64 bits) of every 2,048 rows of each tensor, so that rows are checked as they are read.

    Args:
        path: the file.
        batch: its rows.
        dtype: in which activations are stored.
        facts: to tell besides.
        expected: what the manifest tells already; only a file with its checksum is put in place.

    Raises:
        SaekitError: the activations exceed the dtype, the checksum is another, or the disk does not take the file.
    """
    given = {
        "activations": batch.x,
        "tokens": batch.tokens,
        "documents": batch.documents,
        "positions": batch.positions,
    }
    if batch.gradients is not None:
        given["gradients"] = batch.gradients
    kinds = _dtypes(dtype)
    tensors = {name: tensor.detach().to("cpu", kinds[name]).contiguous() for name, tensor in given.items()}
    for name, tensor in tensors.items():
        kind = tensor.dtype
        if kind.is_floating_point and kind != given[name].dtype and bool(tensor.isinf().any()):
            wider = " or bfloat16" if dtype == torch.float16 else ""
            raise SaekitError(
                f"{name} exceed {str(kind).removeprefix('torch.')}'s range ({torch.finfo(kind).max:,.6g}); "
                f"store them as float32{wider}, or scale them"
            )
    blocks = {name: [_sum(block) for block in torch.split(tensor, _ROWS)] for name, tensor in tensors.items()}
    metadata = {_SUMS: json.dumps({"rows": _ROWS, **blocks})}
    found = ""

    def write(part: Path) -> None:
        nonlocal found
        save_file(tensors, part, metadata)
        found = checksum(part)
        if expected is not None and not unchanged(part, expected):
            raise SaekitError(
                f"'{path.name}' came out otherwise than when it was first harvested, as on another machine or with "
                f"another version of torch; harvest the cache again (--overwrite)"
            )

    replace_file(path, write)
    return {"file": path.name, "rows": len(batch.x), "bytes": path.stat().st_size, "xxh3_128": found, **facts}  # type: ignore[typeddict-item]


def _dtypes(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """In which the columns are stored, where activations are in ``dtype``."""
    kept_as = torch.bfloat16 if dtype == torch.float16 else dtype  # float16 would lose small gradients
    whole = {"tokens": torch.int32, "documents": torch.int64, "positions": torch.int32}
    return {"activations": dtype, "gradients": kept_as, **whole}


def _sum(block: Tensor) -> str:
    return str(xxhash.xxh3_64_hexdigest(_bytes(block)))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data.cast("B")


def unchanged(path: Path, shard: Shard) -> bool:
    """Whether a file has the checksum that the manifest tells."""
    return checksum(path) == shard["xxh3_128"]


def checksum(path: Path) -> str:
    """XXH3 of a file, 128 bits: it finds damage as surely as a cryptographic digest, at the speed of memory."""
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(buffer):
            digest.update(buffer[:read])
    return digest.hexdigest()


def read_shard(
    folder: Path, shard: Shard, d_in: int, dtype: torch.dtype, low: int, high: int, names: Sequence[str]
) -> list[Tensor]:
    """Rows of some tensors of a shard, read straight into fresh tensors; mapping the file would cost twice the time.

    What is read is compared with its checksums.

    Raises:
        SaekitError: the file is missing or damaged.
    """
    path = folder / shard["file"]
    try:
        found = path.stat()
        start, header, sums = _header(path, found.st_size, found.st_mtime_ns)
        with path.open("rb", buffering=0) as file:
            read = []
            for name in names:
                shape = [shard["rows"], d_in] if name in ("activations", "gradients") else [shard["rows"]]
                kind = _dtypes(dtype)[name]
                if header[name]["shape"] != shape or _DTYPES[header[name]["dtype"]] != kind:
                    raise ValueError(f"{name} of shape {header[name]['shape']}, not {shape}, or not in {kind}")
                read.append(_read_rows(file, header[name], start, low, high, sums["rows"], sums[name]))
            return read
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        if isinstance(error, SaekitError):
            raise
        raise SaekitError(f"{damaged(shard['file'], folder)} ({type(error).__name__}: {first_line(error)})") from None


def damaged(file: str, folder: Path) -> str:
    """What is said of a damaged shard."""
    return f"the shard '{file}' of the cache '{folder}' is missing or damaged; `saekit cache repair` harvests it again"


@lru_cache(1024)
def _header(path: Path, size: int, changed: int) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Where the data of a safetensors file begins, what it holds, and the checksums of its rows.

    It is read again where the file has changed.
    """
    with path.open("rb", buffering=0) as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, _LONGEST_HEADER)))
    sums = json.loads(header["__metadata__"][_SUMS])
    if not (isinstance(sums["rows"], int) and sums["rows"] > 0):
        raise ValueError("its checksums are of no rows")
    return 8 + length, header, sums


def _read_rows(
    file: FileIO, entry: dict[str, Any], start: int, low: int, high: int, step: int, sums: list[str]
) -> Tensor:
    """Rows of one tensor of a file whose data begins at byte ``start``, compared with sums of ``step`` rows each."""
    (rows, *rest), (begin, end) = entry["shape"], entry["data_offsets"]
    dtype = _DTYPES[entry["dtype"]]
    size = math.prod(rest) * dtype.itemsize
    whole = min([rows, begin + 1, *rest]) > 0 and end - begin == rows * size and start + end <= file.seek(0, 2)
    if not (whole and 0 <= low < high <= rows):  # before anything of that size is made
        raise ValueError(f"{rows} rows of {rest} in {end - begin} bytes")
    first, last = low // step * step, min(-(-high // step) * step, rows)  # whole blocks
    tensor = torch.empty((last - first, *rest), dtype=dtype)
    file.seek(start + begin + first * size)
    view, done = _bytes(tensor), 0
    while done < len(view):
        read = file.readinto(view[done:])
        if not read:
            raise ValueError("it ends early")
        done += read
    for number, at in enumerate(range(0, len(view), step * size), first // step):
        if xxhash.xxh3_64_hexdigest(view[at : at + step * size]) != sums[number]:
            raise ValueError(f"rows from {number * step} have changed")
    return tensor if (low, high) == (first, last) else tensor[low - first : high - first]
