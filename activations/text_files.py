"""Local files of text: which kinds are read, compressed or not, and what their documents or rows are."""

from __future__ import annotations

import gzip
import hashlib
import io
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from saekit.errors import SaekitError, first_line

_LOADERS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_LOADERS |= {".csv": "csv", ".tsv": "csv"}
_COMPRESSED = (".gz", ".zst")
KINDS = f"{', '.join(_LOADERS)}, or one of these but .parquet with .gz or .zst after it"
_LONG = 800_000  # bytes from which on blocks are no longer


def kind_of(path: str | Path) -> str | None:
    """The ending by which a file is read, without that of its compression; None where it is not of a known kind."""
    place = Path(path)
    compressed = place.suffix.lower() in _COMPRESSED
    kind = Path(place.stem if compressed else place).suffix.lower()
    return kind if kind in _LOADERS and not (compressed and kind == ".parquet") else None


def one_kind(dataset: str, files: Sequence[str]) -> str:
    """The kind that all files are of.

    Raises:
        SaekitError: they are of none or several, or one cannot be decompressed here, or is a .zst file that is cut.
    """
    kind = kind_of(files[0])
    if kind is None or any(kind_of(file) != kind for file in files):
        raise SaekitError(f"'{dataset}' is not of one known kind of text file ({KINDS})")
    packed = next((file for file in files if file.lower().endswith(".zst")), None)
    if packed is not None and find_spec("zstandard") is None:
        raise SaekitError(f"'{packed}' needs the package zstandard, which is not there: pip install zstandard")
    for file in files:
        if file.lower().endswith(".zst"):
            _check_whole(Path(file))
    return kind


def _check_whole(path: Path) -> None:
    """Raise SaekitError where a .zst file is cut short or damaged: readers take the part that is there for all."""
    zstandard = import_module("zstandard")
    frame, begun = zstandard.ZstdDecompressor().decompressobj(), False
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                while block:
                    frame.decompress(block)
                    begun, block = not frame.eof, frame.unused_data
                    if frame.eof:
                        frame = zstandard.ZstdDecompressor().decompressobj()
    except (OSError, zstandard.ZstdError) as error:
        raise SaekitError(f"cannot read '{path}': {first_line(error)}") from None
    if begun:
        raise SaekitError(f"cannot read '{path}': it ends before its end-of-stream marker: it is cut short")


def is_plain_text(kind: str) -> bool:
    """Whether files of a kind are text without columns."""
    return _LOADERS[kind] == "text"


def rows_of(datasets: Any, kind: str, files: list[str]) -> Any:
    """The rows of files of one kind, read as they are asked for. The cells of a .csv or .tsv file are texts, all."""
    more = {}
    if _LOADERS[kind] == "csv":
        import pandas  # type: ignore[import-untyped]

        separator = "\t" if kind == ".tsv" else ","
        columns = pandas.read_csv(files[0], sep=separator, nrows=0).columns
        features = datasets.Features({name: datasets.Value("string") for name in columns})
        more = {"sep": separator, "features": features, "keep_default_na": False}
    return datasets.load_dataset(_LOADERS[kind], data_files=files, split="train", streaming=True, **more)


def digest_of(files: Iterable[Path]) -> str:
    """A digest of the bytes of some files."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with file.open("rb") as content:
            while block := content.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _open(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path)  # type: ignore[return-value]
    if path.suffix.lower() == ".zst":
        stream: IO[bytes] = import_module("zstandard").open(path)
        return stream
    return path.open("rb")


def blocks(path: Path) -> Iterator[str]:
    """The documents of a plain text file: blocks of whole lines, 100 to 2,000 characters or a line more.

    Plain text does not mark its documents. Some 400 blocks even of a small file make three parts possible; lines much
    longer than a block are cut.

    Raises:
        SaekitError: the file is not UTF-8, or what it is compressed to is damaged.
    """
    lines: list[str] = []
    size = 0
    try:
        with _open(path) as file:
            least = min(2000, max(100, len(file.read(_LONG)) // 400))
        for line in _lines(path):
            for piece in (line[start : start + 2 * least] for start in range(0, len(line), 2 * least)):
                lines.append(piece)
                size += len(piece)
                if size >= least:
                    yield "".join(lines)
                    lines, size = [], 0
    except UnicodeDecodeError as error:
        raise SaekitError(f"'{path}' is not UTF-8 text: byte {error.start}") from None
    except _damages() as error:
        raise SaekitError(f"cannot read '{path}': {first_line(error)}") from None
    if "".join(lines).strip():
        yield "".join(lines)


def _damages() -> tuple[type[Exception], ...]:
    """What the libraries raise where a compressed file is damaged."""
    zstandard = sys.modules.get("zstandard")
    return (EOFError, OSError, zlib.error, *([] if zstandard is None else [zstandard.ZstdError]))


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file, every end of a line as Python reads it."""
    with _open(path) as file, io.TextIOWrapper(file, encoding="utf-8") as text:
        yield from text
