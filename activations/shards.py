"""The files of an activation cache: shards of safetensors, written by threads of their own while the next is made."""

from __future__ import annotations

import json
import math
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor

from saekit.activations.harvest import ActivationBatch
from saekit.errors import SaekitError
from saekit.files import replace_file

_BLOCK = 1 << 22  # bytes read at a time for a checksum
_AT_ONCE = 2  # shards being written: one waits for the disk while the other is hashed
_LONGEST_HEADER = 1 << 16
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I32": torch.int32, "I64": torch.int64}


class ShardWriter:
    """Writes batches as shards of a folder; leave it to be sure that they are on the disk.

    Attributes:
        shards: name, rows, size and checksum of each shard that is written.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.folder, self.dtype = folder, dtype
        self.shards: list[dict[str, Any]] = []
        self._count = 0
        self._pending: deque[Future[dict[str, Any]]] = deque()
        self._threads = ThreadPoolExecutor(_AT_ONCE)

    def add(self, batch: ActivationBatch) -> None:
        """Write one more shard, once there are not too many before it.

        Raises:
            SaekitError: a shard before it exceeds its dtype.
            OSError: a shard before it cannot be written.
        """
        self._wait(_AT_ONCE - 1)
        path = self.folder / f"shard-{self._count:05d}.safetensors"
        self._pending.append(self._threads.submit(_write_shard, path, batch, self.dtype))
        self._count += 1

    def _wait(self, left: int = 0) -> None:
        while len(self._pending) > left:
            self.shards.append(self._pending.popleft().result())

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._wait()
        finally:
            self._threads.shutdown()


def _write_shard(path: Path, batch: ActivationBatch, dtype: torch.dtype) -> dict[str, Any]:
    stored = batch.x.detach().to("cpu", dtype).contiguous()
    if dtype == torch.float16 and bool(stored.isinf().any()):
        raise SaekitError("activations exceed float16's range (65,504); store them as bfloat16 or float32")
    tensors = {
        "activations": stored,
        "tokens": batch.tokens.to(torch.int32),
        "documents": batch.documents.to(torch.int64),
        "positions": batch.positions.to(torch.int32),
    }
    if batch.gradients is not None:  # float16 would lose small ones
        kept_as = torch.bfloat16 if dtype == torch.float16 else dtype
        tensors["gradients"] = batch.gradients.detach().to("cpu", kept_as)
    replace_file(path, lambda part: save_file({k: v.contiguous() for k, v in tensors.items()}, part))
    return {"file": path.name, "rows": len(batch.x), "bytes": path.stat().st_size, "xxh3_128": checksum(path)}


def checksum(path: Path) -> str:
    """XXH3 of a file, 128 bits: it finds damage as surely as a cryptographic digest, at the speed of memory."""
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(buffer):
            digest.update(buffer[:read])
    return digest.hexdigest()


def read_shard(path: Path, low: int, high: int, gradients: bool) -> ActivationBatch:
    """Some rows of a shard, read straight into fresh tensors; mapping the file would cost twice the time.

    Raises:
        SaekitError: the file is damaged.
    """
    try:
        found = path.stat()
        start, header = _header(path, found.st_size, found.st_mtime_ns)
        names = ["activations", "tokens", "documents", "positions", *["gradients"] * gradients]
        with path.open("rb", buffering=0) as file:
            return ActivationBatch(*(_read_rows(file, header[name], start, low, high) for name in names))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SaekitError(f"the shard '{path}' is damaged: {type(error).__name__} {error}") from None


@lru_cache(1024)
def _header(path: Path, size: int, changed: int) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file begins, and what it holds; read again where the file has changed."""
    with path.open("rb", buffering=0) as file:
        length = int.from_bytes(file.read(8), "little")
        return 8 + length, json.loads(file.read(min(length, _LONGEST_HEADER)))


def _read_rows(file: FileIO, entry: dict[str, Any], start: int, low: int, high: int) -> Tensor:
    """Rows of one tensor of a safetensors file whose data begins at byte ``start``."""
    (rows, *rest), (begin, end) = entry["shape"], entry["data_offsets"]
    dtype = _DTYPES[entry["dtype"]]
    size = math.prod(rest) * dtype.itemsize
    whole = min([rows, begin + 1, *rest]) > 0 and end - begin == rows * size and start + end <= file.seek(0, 2)
    if not (whole and 0 <= low < high <= rows):  # before anything of that size is made
        raise ValueError(f"{rows} rows of {rest} in {end - begin} bytes")
    tensor = torch.empty((high - low, *rest), dtype=dtype)
    file.seek(start + begin + low * size)
    view = tensor.view(torch.uint8).numpy().data.cast("B")
    while view:
        read = file.readinto(view)
        if not read:
            raise ValueError("it ends early")
        view = view[read:]
    return tensor
