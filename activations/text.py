"""Where text comes from: Python source on this machine, local files, or a dataset of the Hugging Face hub.

Every source divides its documents into the same three parts (see ``python_source``): ``train``, ``calibration`` and
``heldout``. Files of Python source are divided by their names, the documents of every other source by a hash of their
content, so that a document that occurs twice is never on both sides, or of a column that the user names.
"""

from __future__ import annotations

import glob
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, get_args

from saekit.activations import python_source
from saekit.activations.chat import TrainOn
from saekit.activations.columns import Columns, Divided, part_of
from saekit.activations.mixture import Weighted, mixture_of
from saekit.activations.python_source import Split
from saekit.activations.text_files import blocks, digest_of, is_plain_text, kind_of, one_kind, rows_of
from saekit.activations.tokens import Document
from saekit.errors import SaekitError, did_you_mean, first_line
from saekit.files import expanded
from saekit.no_installs import no_installs
from saekit.reading import check_inside, is_plain, read_json

PYTHON = "python"
SPLITS: tuple[Split, ...] = get_args(Split)
_BUILDERS = {"arrow", "csv", "json", "parquet", "text", "xml"}  # of datasets; others may unpickle or run scripts
_BUFFER = 1024  # rows that are shuffled together


@dataclass(frozen=True)
class Documents:
    """Documents of a text that can be known again, so that their token ids are kept (``token_store``).

    Attributes:
        read: from a part of the text to an iterator over its documents.
        key: what they depend on.
    """

    read: Callable[[Split], Iterator[Document]]
    key: tuple[str | int, ...]

    def __call__(self, part: Split) -> Iterator[Document]:
        """The documents of a part."""
        return self.read(part)


@dataclass(frozen=True)
class TextSource:
    """Text with a name and a fingerprint.

    Attributes:
        name: what the user wrote.
        fingerprint: changes when the text does.
        facts: which columns and which part of a dataset are read, as provenances tell it.
        documents: from a part of the text to an iterator over its documents, in a fixed order.
        shuffled: from a seed to the same text in another order, for datasets whose files come one after the other.
        bounded: from the size of a vocabulary to the same text, which refuses other ids; only where it has token ids.
        shares: the texts of a mix, each with its part of all tokens; none where it is one text.
    """

    name: str
    fingerprint: str
    documents: Callable[[Split], Iterator[Document]]
    shuffled: Callable[[int], TextSource] | None = None
    bounded: Callable[[int], TextSource] | None = None
    shares: tuple[Share, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def reordered(self, seed: int) -> TextSource:
        """The same text in an order that the seed decides, where it can be had in another."""
        return replace(self.shuffled(seed), facts=self.facts) if self.shuffled else self

    def within(self, vocabulary: int) -> TextSource:
        """The same text, which refuses token ids beyond a vocabulary of this size."""
        return replace(self.bounded(vocabulary), facts=self.facts) if self.bounded else self


class Share(NamedTuple):
    """A text of a mix.

    Attributes:
        text: it.
        part: of all tokens, 0 to 1.
    """

    text: TextSource
    part: float


def open_text(
    dataset: str = PYTHON,
    *,
    column: str = "text",
    tokens_column: str | None = None,
    messages_column: str | None = None,
    train_on: TrainOn = "all",
    group_column: str | None = None,
    split: str = "train",
    dataset_config: str | None = None,
    streaming: bool = True,
) -> TextSource:
    """Open a text source.

    Args:
        dataset: ``"python"``, a local file or glob pattern (``text_files.KINDS``), a folder that ``datasets`` saved or
            reads, a name on the hub, or a mix of these with weights by tokens, as in ``"a=0.7 + b.jsonl=0.3"``.
        column: the column that holds the text (not for plain text).
        tokens_column: the column that holds lists of token ids, which are read in place of text.
        messages_column: the column that holds conversations, which are read in place of text by the chat template of
            the model's tokenizer.
        train_on: whose messages count; ``"all"`` for everything that the template writes.
        group_column: the column by whose value documents are divided, all of one value into one part.
        split: the split of a dataset of the hub or of a folder.
        dataset_config: which configuration of a dataset of the hub or of a folder, where it has several.
        streaming: whether a dataset of the hub is read as it downloads, rather than downloaded first.

    Raises:
        SaekitError: nothing of that name is found, it is empty, it has no such column, or it has no such configuration
            or several of which none is named (those that it has are named).
    """
    columns = Columns(column, tokens_column, messages_column, train_on, group_column)
    facts = {"dataset_split": split, "dataset_config": dataset_config, "column": column, "tokens_column": tokens_column}
    facts |= {"messages_column": messages_column, "train_on": train_on, "group_column": group_column}
    weighted = mixture_of(dataset)
    if weighted:
        found = _mix(dataset, weighted, columns, split, dataset_config, streaming)
        shares = tuple(Share(replace(text, facts=facts), part) for text, part in found.shares)
        found = _mixed(dataset, found.fingerprint, shares)
    else:
        found = _one(dataset, columns, split, dataset_config, streaming)
    return replace(found, facts=facts)


def _one(dataset: str, columns: Columns, split: str, config: str | None, streaming: bool) -> TextSource:
    """A text that is no mix."""
    place = expanded(dataset)
    files = [] if dataset == PYTHON or place.is_dir() else _files(place)
    if dataset == PYTHON or files or _is_saved(place):
        if config is not None:
            raise SaekitError(f"'{dataset}' has no configurations; leave --dataset-config {config} away")
        if dataset == PYTHON:
            columns.refuse(PYTHON)
            return _python()
        return _local(dataset, files, columns) if files else _saved(dataset, place, columns, split)
    if not place.is_dir() and (kind_of(place) or place.is_absolute() or dataset.startswith(".")):
        raise SaekitError(f"no text file matches '{dataset}'")
    return _hub(dataset, columns, split, config, streaming)


def _mix(
    dataset: str, weighted: list[Weighted], columns: Columns, split: str, config: str | None, streaming: bool
) -> TextSource:
    """Several texts, each with its part of all tokens; columns and configuration are of those that can have them."""
    if not any(_has_columns(name) for name, _ in weighted):
        columns.refuse(dataset)
    if config is not None and not any(_has_configurations(name) for name, _ in weighted):
        raise SaekitError(f"'{dataset}' has no configurations; leave --dataset-config {config} away")

    def opened(name: str) -> TextSource:
        own = columns if _has_columns(name) else Columns()
        return _one(name, own, split, config if _has_configurations(name) else None, streaming)

    shares = tuple(Share(opened(name), part) for name, part in weighted)
    told = "".join(f"{share.text.fingerprint} {share.part!r}\n" for share in shares)
    return _mixed(dataset, hashlib.blake2b(told.encode(), digest_size=16).hexdigest(), shares)


def _has_columns(dataset: str) -> bool:
    kind = kind_of(expanded(dataset))
    return dataset != PYTHON and not (kind is not None and is_plain_text(kind))


def _has_configurations(dataset: str) -> bool:
    place = expanded(dataset)
    return dataset != PYTHON and kind_of(place) is None and not _is_saved(place)


def _mixed(dataset: str, fingerprint: str, shares: tuple[Share, ...]) -> TextSource:
    """A mix; what can be done with one of its texts is done with each that allows it."""

    def each(change: Callable[[TextSource], TextSource]) -> TextSource:
        return _mixed(dataset, fingerprint, tuple(Share(change(text), part) for text, part in shares))

    def documents(part: Split) -> Iterator[Document]:
        return chain.from_iterable(share.text.documents(part) for share in shares)

    return TextSource(
        dataset,
        fingerprint,
        documents,
        shuffled=lambda seed: each(lambda text: text.reordered(seed)),
        bounded=lambda vocabulary: each(lambda text: text.within(vocabulary)),
        shares=shares,
    )


def _files(place: Path) -> list[str]:
    matches = [str(place)] if place.is_file() else sorted(glob.glob(str(place), recursive=True))
    return [f for f in matches if Path(f).is_file()]


def _python() -> TextSource:
    digest, times = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    for name, path in python_source.source_files():
        stat = path.stat()
        digest.update(f"{name}:{stat.st_size}\n".encode())
        times.update(f"{path}:{stat.st_size}:{stat.st_mtime_ns}\n".encode())
    key = (PYTHON, times.hexdigest())
    documents = Documents(lambda part: (text for _, text in python_source.documents(part)), key)
    return TextSource(PYTHON, digest.hexdigest(), documents)


def _local(dataset: str, files: list[str], columns: Columns) -> TextSource:
    kind = one_kind(dataset, files)
    fingerprint = digest_of(map(Path, files))
    if is_plain_text(kind):
        columns.refuse(dataset)

        def documents() -> Iterator[Divided]:
            return (Divided(part_of(block), block) for file in files for block in blocks(Path(file)))

        return _divided(dataset, fingerprint, documents, ("text",))
    return _of_rows(dataset, fingerprint, _opened(dataset, lambda d: rows_of(d, kind, files)), columns)


def _is_saved(folder: Path) -> bool:
    """Whether ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote the folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _check_saved(folder: Path) -> list[Path]:
    """The tables of a saved dataset, or of one of its splits.

    Raises:
        SaekitError: it names files that are not its own.
    """
    state = folder / "state.json"
    check_inside(state, folder)
    found = read_json(state)
    files = found.get("_data_files") if isinstance(found, dict) else None
    names = [file.get("filename") if isinstance(file, dict) else None for file in files or ()]
    tables = [folder / name for name in names if isinstance(name, str) and is_plain(name) and Path(name).name == name]
    if files is None or len(tables) < len(names):
        raise SaekitError(f"'{state}' is damaged: it does not name files of its own folder")
    for table in tables:
        check_inside(table, folder)
        if not table.is_file():
            raise SaekitError(f"'{table}' is missing or no file")
    return tables


def _saved(dataset: str, folder: Path, columns: Columns, split: str) -> TextSource:
    if (folder / "dataset_dict.json").is_file():
        found = read_json(folder / "dataset_dict.json")
        splits = found.get("splits") if isinstance(found, dict) else None
        if not isinstance(splits, list) or any(not isinstance(s, str) or Path(s).name != s for s in splits):
            raise SaekitError(f"'{folder / 'dataset_dict.json'}' is damaged: it does not name folders of its own")
        if split not in splits:
            raise SaekitError(f"the dataset '{dataset}' has no split '{split}'{did_you_mean(split, splits)}")
        check_inside(folder / split, folder)
        folder = folder / split
    tables = _check_saved(folder)
    rows = _opened(dataset, lambda d: d.load_from_disk(str(folder)))
    return _of_rows(dataset, digest_of(sorted(tables)), rows, columns)


def _hub(dataset: str, columns: Columns, split: str, config: str | None, streaming: bool) -> TextSource:
    def rows_of(datasets: Any) -> tuple[Any, str]:
        try:
            builder = datasets.load_dataset_builder(dataset, config)
        except ValueError:
            _check_config(dataset, config, datasets.get_dataset_config_names(dataset))
            raise
        kind = type(builder).__module__.rpartition(".")[2]
        if "packaged_modules" not in type(builder).__module__ or kind not in _BUILDERS:
            raise SaekitError(f"'{dataset}' is of the kind '{kind}'; saekit reads {', '.join(sorted(_BUILDERS))}")
        # the builder's hash names the dataset's commit (or the files of a local folder)
        version = f"{builder.name}@{builder.config.name}@{builder.hash}@{split}"
        return datasets.load_dataset(dataset, config, split=split, streaming=streaming), version

    rows, version = _opened(dataset, rows_of)
    fingerprint = hashlib.blake2b(version.encode(), digest_size=16).hexdigest()
    return _of_rows(dataset, fingerprint, rows, columns)


def _check_config(dataset: str, config: str | None, known: list[str]) -> None:
    """Raise SaekitError where a dataset has no such configuration, or several of which none is named."""
    if config is None and len(known) > 1:
        names = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
        raise SaekitError(f"'{dataset}' has several configurations: --dataset-config NAME; it has {names}")
    if config is not None and config not in known:
        raise SaekitError(f"the dataset '{dataset}' has no configuration '{config}'{did_you_mean(config, known)}")


def _opened(dataset: str, opener: Callable[[Any], Any]) -> Any:
    """What ``opener`` makes of the datasets library, its many kinds of errors told in one line."""
    import datasets

    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False  # versions before 4 would ask
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # what fails is told in one line of our own
    datasets.utils.logging.disable_progress_bar()
    try:
        with no_installs():
            return opener(datasets)
    except SaekitError:
        raise
    except StopIteration:  # of a file without rows
        raise SaekitError(f"the dataset '{dataset}' is empty") from None
    except Exception as error:
        hint = did_you_mean(dataset, [PYTHON])
        raise SaekitError(
            f"cannot open the dataset '{dataset}': {first_line(error)}{hint if 'did' in hint else ''}"
        ) from error


def _of_rows(dataset: str, fingerprint: str, rows: Any, columns: Columns) -> TextSource:
    """The documents of rows; shuffled, files come in another order, and rows out of a buffer."""

    def shuffled(seed: int) -> TextSource:
        mixed = (
            rows.to_iterable_dataset(num_shards=min(64, len(rows))) if hasattr(rows, "to_iterable_dataset") else rows
        )
        documents = columns.documents(dataset, mixed.shuffle(seed, buffer_size=_BUFFER))
        return _divided(dataset, fingerprint, documents, (*columns.key, seed, _BUFFER))

    documents = columns.documents(dataset, rows)
    if next(documents(), None) is None:
        raise SaekitError(f"the dataset '{dataset}' is empty")

    def bounded(vocabulary: int) -> TextSource:
        return _of_rows(dataset, fingerprint, rows, replace(columns, vocabulary=vocabulary))

    found = replace(_divided(dataset, fingerprint, documents, columns.key), shuffled=shuffled)
    return replace(found, bounded=bounded) if columns.tokens and columns.vocabulary is None else found


def _divided(
    name: str, fingerprint: str, documents: Callable[[], Iterator[Divided]], read_as: tuple[str | int, ...]
) -> TextSource:
    """The text in its three parts; ``read_as`` is what its documents depend on beside the fingerprint."""

    def read(part: Split) -> Iterator[Document]:
        return (each.document for each in documents() if each.part == part)

    return TextSource(name, fingerprint, Documents(read, (fingerprint, *read_as)))
