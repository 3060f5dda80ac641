"""Activations on disk: shards of safetensors and a manifest with the provenance of the data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from saekit.activations.arrays import batches_of
from saekit.activations.batch import ActivationBatch
from saekit.activations.division import Division, Grouping
from saekit.activations.finite import SAMPLE, check_finite, norm_limit
from saekit.activations.manifest import MANIFEST, Manifest, Shard, check_provenance
from saekit.activations.placement import DTYPES
from saekit.activations.python_source import Split
from saekit.activations.shards import ShardWriter, damaged, read_shard
from saekit.activations.staging import JOURNAL, begun, finish, regrouped, staging
from saekit.errors import SaekitError
from saekit.files import expanded
from saekit.reading import check_inside

SHARD_ROWS = 1 << 16
_BLOCK = 2048  # rows read in one piece where their order is random; as many have a checksum of their own


@dataclass(frozen=True)
class ActivationCache:
    """Activations of N tokens in a folder.

    Each shard holds ``activations`` [m, d_in], ``tokens`` [m], ``documents`` [m], ``positions`` [m] and, where they
    were asked for, ``gradients`` [m, d_in]. Open one with ``ActivationCache.open``; write one with ``from_tensor`` or
    ``write``.

    Attributes:
        path: the folder.
        provenance: where the data comes from: ``model``, ``revision``, ``hook``, ``dataset``, ``dataset_fingerprint``,
            ``split``, ``tokenizer``, ``context_length``, ``prepend_bos``, ``skip_first``, ``mask``; where tokens with
            large norms were left out, ``max_norm`` and ``norm_limit``; empty for a user's own tensor.
        d_in: width of the activations.
        dtype: in which they are stored.
        shards: name, rows and checksum of each shard.
        division: how the rows are divided into those to train on, to calibrate on and to evaluate on.
        gradients: whether gradients of the model's loss stand beside the activations.
    """

    path: Path
    provenance: dict[str, Any]
    d_in: int
    dtype: str
    shards: tuple[Shard, ...]
    division: Division
    gradients: bool = False

    def __len__(self) -> int:
        return sum(shard["rows"] for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """What tells this cache from another in the same folder: a digest of its shards and of their division."""
        facts: list[Any] = [
            {key: value for key, value in shard.items() if key not in ("batch", "row")} for shard in self.shards
        ]
        facts.append(self.division.model_dump())
        return hashlib.blake2b(json.dumps([self.d_in, facts]).encode(), digest_size=16).hexdigest()

    @classmethod
    def open(cls, path: str | Path, *, complete: bool = True) -> ActivationCache:
        """Open a cache. What is read from it later is compared with its checksums.

        Args:
            path: the folder.
            complete: whether every shard must be there, in the size it was written in.

        Raises:
            SaekitError: there is no cache, it is unfinished, its manifest is damaged, or a shard is missing or of
                another size.
        """
        folder = expanded(path).resolve()
        if not (folder / MANIFEST).is_file():
            begun = any((staging(folder) / name).is_file() for name in (MANIFEST, JOURNAL))
            hint = f", only an unfinished harvest; `saekit cache --out {path} --resume` goes on with it"
            raise SaekitError(f"there is no activation cache at '{path}': no {MANIFEST}{hint if begun else ''}")
        found = Manifest.read(folder)
        facts = (dict(found.provenance), found.d_in, found.dtype, tuple(found.shards), found.division, found.gradients)
        cache = cls(folder, *facts)
        for shard in cache.shards if complete else ():
            file = folder / shard["file"]
            if not file.is_file() or file.stat().st_size != shard["bytes"]:
                raise SaekitError(damaged(shard["file"], folder))
            check_inside(file, folder)
        return cache

    @classmethod
    def from_tensor(
        cls,
        path: str | Path,
        x: Any,
        *,
        gradients: Any = None,
        groups: Any = None,
        dtype: str = "float32",
        provenance: dict[str, Any] | None = None,
        overwrite: bool = False,
    ) -> ActivationCache:
        """Write a user's own activations, from any source, piece by piece.

        About 5% of the rows are held out (at most 65,536) and 5% serve the calibration (at most 262,144), spread over
        all of them by a hash: whole groups or, without groups, whole blocks of at most 256 neighbouring rows. Rows of
        one origin (document, image, patient) that lie further apart need ``groups``.

        Args:
            path: the folder to write.
            x: [N, d_in] activations of floating point numbers: a torch tensor, a numpy array (memory-mapped ones and
                others that can be sliced too), the path of a ``.npy`` file, or an iterator of pieces [m, d_in].
            gradients: [N, d_in] of a model's loss at them, for gradient TopK; of any of these kinds.
            groups: [N] whole numbers, at least three different ones; of any of these kinds. No group is on two sides of
                the division, and it is kept in ``documents``, which holds the number of the row's block without it.
            dtype: how they are stored: ``float32``, ``bfloat16`` or ``float16``; wider numbers are rounded, and told.
            provenance: facts about the data to keep with it.
            overwrite: whether the folder may hold something already.

        Raises:
            SaekitError: x is not a matrix of finite numbers, is empty, gradients or groups do not fit it, or the folder
                holds something.
        """
        pieces = batches_of(x, gradients, groups, dtype)
        by: Grouping = "blocks" if groups is None else "documents"
        return cls.write(path, pieces, provenance or {}, dtype=dtype, overwrite=overwrite, by=by)

    @classmethod
    def write(
        cls,
        path: str | Path,
        batches: Iterable[ActivationBatch],
        provenance: dict[str, Any],
        *,
        dtype: str = "float32",
        overwrite: bool = False,
        by: Grouping | None = None,
        division: Division | None = None,
    ) -> ActivationCache:
        """Write batches to shards of equal length; the manifest comes last and makes the cache valid.

        Args:
            path: the folder to write.
            batches: of any size.
            provenance: where they come from.
            dtype: how they are stored.
            overwrite: whether the folder may hold something already.
            by: what the division never takes apart: ``documents``, even where these are few or large, or ``blocks`` of
                neighbouring rows; if not given, documents where they give parts of half to twice the wanted rows.
            division: that of another cache, whose rows these follow one by one.

        Raises:
            SaekitError: unknown dtype, no or non-finite activations, impossible facts in the provenance, a folder that
                holds something, or another process that writes there.
            WriteError: the disk is full or not to be written to.
        """
        check_provenance(provenance)
        d_in, gradients, rows = 0, False, 0
        with begun(path, dtype, overwrite=overwrite) as (target, folder):
            with ShardWriter(folder, DTYPES[dtype]) as writer:
                for batch, _ in regrouped(batches, SHARD_ROWS):
                    check_finite(batch, str(provenance.get("hook", path)), f"rows from {rows}")
                    d_in, gradients, rows = batch.x.shape[1], batch.gradients is not None, rows + len(batch.x)
                    writer.add(batch)
            if not writer.shards:
                raise SaekitError(f"no activations to write to '{path}': the text is empty or shorter than one context")
            facts: Any = {"provenance": provenance, "d_in": d_in, "dtype": dtype, "gradients": gradients}
            facts["shards"] = writer.shards
            finish(target, folder, facts, by=by, division=division)
        return cls.open(target)

    def check_gradients(self) -> None:
        """Raise SaekitError where the cache holds no gradients."""
        if not self.gradients:
            raise SaekitError(f"the cache '{self.path}' holds no gradients; write one by `saekit cache --gradients`")

    def norm_limit(self, max_norm: float) -> float | None:
        """The largest ‖x‖: ``max_norm`` times the median of up to 16,384 rows from all over the cache.

        None where the cache was harvested with this very ``max_norm`` and holds no tokens beyond it.

        Raises:
            SaekitError: it was harvested with another.
        """
        own = self.provenance.get("max_norm")
        if own == max_norm:
            return None
        if own is not None:
            raise SaekitError(f"the cache '{self.path}' has max_norm '{own}', not '{max_norm}' as asked")
        piece = SAMPLE // 8
        starts = range(0, len(self), max(piece, -(-len(self) // 8)))
        return norm_limit((self.read(start, min(start + piece, len(self))) for start in starts), max_norm)

    @property
    def hook(self) -> str:
        """The hook point, or the folder of a user's own tensor."""
        return str(self.provenance.get("hook", self.path))

    def count(self, part: Split) -> int:
        """Rows of one part."""
        return int(getattr(self.division.rows, part))

    def batches(self, part: Split, batch: int = 4096, *, gradients: bool = False) -> Iterator[ActivationBatch]:
        """The rows of one part, each time in the same order.

        Blocks of 2,048 rows come in a random order, so that the first few batches are like all of them.
        """

        def pieces() -> Iterator[ActivationBatch]:
            order = torch.randperm(-(-len(self) // _BLOCK), generator=torch.Generator().manual_seed(0))
            for start in (order * _BLOCK).tolist():
                stop = min(start + _BLOCK, len(self))
                mine = self.division.holds(part, start, self.documents(start, stop))
                if bool(mine.any()):  # else the activations are not read
                    yield self.read(start, stop, gradients=gradients).where(mine)

        return (each for each, _ in regrouped(pieces(), batch))

    def documents(self, start: int, stop: int) -> Int[Tensor, "m"]:
        """Numbers of the documents of rows ``start`` to ``stop``."""
        return self._columns(start, stop, ["documents"])[0]

    def read(self, start: int, stop: int, *, gradients: bool = False) -> ActivationBatch:
        """Rows ``start`` to ``stop`` with their tokens, documents, positions and, if asked, gradients.

        Raises:
            SaekitError: a shard is damaged, or the cache has no gradients.
        """
        if gradients:
            self.check_gradients()
        names = ["activations", "tokens", "documents", "positions", *["gradients"] * gradients]
        return ActivationBatch(*self._columns(start, stop, names))

    def _columns(self, start: int, stop: int, names: Sequence[str]) -> list[Tensor]:
        parts = []
        first = 0
        for shard in self.shards:
            low, high = max(start - first, 0), min(stop - first, shard["rows"])
            if low < high:
                parts.append(read_shard(self.path, shard, self.d_in, DTYPES[self.dtype], low, high, names))
            first += shard["rows"]
        if not parts:
            raise SaekitError(f"the cache '{self.path}' has no rows {start} to {stop}: it holds {len(self)}")
        return parts[0] if len(parts) == 1 else [torch.cat(column) for column in zip(*parts, strict=True)]
