"""The files of an activation cache: shards of safetensors, written by a thread while the next is being made."""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
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
        self._pending: Future[dict[str, Any]] | None = None
        self._thread = ThreadPoolExecutor(1)

    def add(self, batch: ActivationBatch) -> None:
        """Write one more shard, once the one before is written.

        Raises:
            SaekitError: the shard before exceeds its dtype.
            OSError: it cannot be written.
        """
        self._wait()
        path = self.folder / f"shard-{self._count:05d}.safetensors"
        self._pending = self._thread.submit(_write_shard, path, batch, self.dtype)
        self._count += 1

    def _wait(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self.shards.append(pending.result())

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._wait()
        finally:
            self._thread.shutdown()


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
        with path.open("rb", buffering=0) as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, _LONGEST_HEADER)))
            names = ["activations", "tokens", "documents", "positions", *["gradients"] * gradients]
            return ActivationBatch(*(_read_rows(file, header[name], 8 + length, low, high) for name in names))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SaekitError(f"the shard '{path}' is damaged: {type(error).__name__} {error}") from None


def _read_rows(file: FileIO, entry: dict[str, Any], start: int, low: int, high: int) -> Tensor:
    """Rows of one tensor of a safetensors file whose data begins at byte ``start``."""
    (rows, *rest), (begin, end) = entry["shape"], entry["data_offsets"]
    tensor = torch.empty((high - low, *rest), dtype=_DTYPES[entry["dtype"]])
    size = tensor[:1].nbytes
    if not 0 <= low < high <= rows or end - begin != rows * size:
        raise ValueError(f"{rows} rows of {rest} in {end - begin} bytes")
    file.seek(start + begin + low * size)
    view = tensor.view(torch.uint8).numpy().data.cast("B")
    while view:
        read = file.readinto(view)
        if not read:
            raise ValueError("it ends early")
        view = view[read:]
    return tensor
