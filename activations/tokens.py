"""Documents packed into contexts of equal length."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from saekit.activations.chat import Conversation, counted_of, rendered
from saekit.errors import SaekitError
from saekit.special_tokens import SpecialTokens, special_tokens

MASK = "text positions; the first of each context, BOS and document separators left out"
DOCUMENTS = 64  # that are tokenised together
Ids = NDArray[np.int64]  # of tokens; −1 − id for one that does not count
Document = str | Ids | Conversation  # a text, the ids [m] of its tokens, or messages
PADDING = -1  # in the place of a document's number


class ContextBatch(NamedTuple):
    """Contexts of tokens.

    Attributes:
        tokens: [b, t] token ids.
        documents: [b, t] running number of the document that each token comes from; −1 for padding (``contexts_of``).
        kept: [b, t] whether a position is trained on and scored. The first of a context is not, whatever it holds:
            models use it as an attention sink, with activations like no others. Nor are BOS and the separators that
            packing put in; they are marked by position, not by id, so a document's own tokens count anywhere else.
    """

    tokens: Int[Tensor, "b t"]
    documents: Int[Tensor, "b t"]
    kept: Bool[Tensor, "b t"]

    def rows(self, start: int, stop: int) -> ContextBatch:
        """Some of the contexts."""
        return ContextBatch(*(column[start:stop] for column in self))

    def split(self, size: int) -> Iterator[ContextBatch]:
        """The contexts in batches of at most ``size``.

        Raises:
            SaekitError: there is no such size.
        """
        if not isinstance(size, int) or size < 1:
            raise SaekitError(f"a batch has a whole number of contexts, at least 1, not {size}")
        return (self.rows(start, start + size) for start in range(0, len(self.tokens), size))


def encoded(documents: Iterable[Document], tokenizer: Any) -> Iterator[Ids]:
    """The token ids [m] of each document, without special tokens; −1 − id where the tokens of some roles alone count.

    Documents of token ids, all or none, are handed on as they are.

    Raises:
        SaekitError: a conversation cannot be rendered (``chat.rendered``), or the tokenizer does not tell which part of
            a text each token is.
    """
    arriving = iter(documents)
    while batch := list(islice(arriving, DOCUMENTS)):
        if isinstance(batch[0], np.ndarray):
            yield from batch  # type: ignore[misc]
            continue
        texts = [rendered(each, tokenizer) if isinstance(each, Conversation) else (each, None) for each in batch]
        marked = any(counted is not None for _, counted in texts)
        if marked and not getattr(tokenizer, "is_fast", False):
            raise SaekitError("the model's tokenizer is a slow one, which does not tell whose each token is")
        asked = {"add_special_tokens": False, "return_attention_mask": False, "return_offsets_mapping": marked}
        found = tokenizer([text for text, _ in texts], verbose=False, **asked)
        for number, (_, counted) in enumerate(texts):
            ids = np.asarray(found["input_ids"][number], dtype=np.int64)
            if counted is not None:
                ids = np.where(counted_of(found["offset_mapping"][number], counted), ids, -1 - ids)
            yield ids


def pack(
    documents: Iterable[Ids],
    tokenizer: Any,
    context_length: int,
    *,
    prepend_bos: bool,
    contexts: int = 32,
    special: SpecialTokens | None = None,
    skip_first: int = 1,
) -> Iterator[ContextBatch]:
    """Pack documents without padding: BOS (if wanted), then text, documents divided by EOS.

    A tokenizer without special tokens gives text alone; documents are told apart by their numbers then. The last
    tokens, where they do not fill a context, are left out, unless they are all there is: then they make one shorter
    context.

    Args:
        documents: their token ids, −1 − id for those that do not count.
        tokenizer: a Hugging Face tokenizer, whose special tokens they get.
        context_length: t, tokens a context, BOS among them.
        prepend_bos: whether each context begins with BOS (ignored by a tokenizer that has none).
        contexts: b, contexts a batch; the last batch may be smaller.
        special: BOS and separator; the tokenizer's own if not given.
        skip_first: positions at the start of each context, BOS or not, that are not kept.

    Raises:
        SaekitError: the context length leaves no room for text.
    """
    special = special_tokens(tokenizer) if special is None else special
    bos, separator = special.bos if prepend_bos else None, special.separator
    room = context_length - (bos is not None)
    least = skip_first + 2  # tokens of a context: those that are skipped, one that is kept, and one that follows it
    if context_length < least:
        first = f" after the first {skip_first}" if skip_first > 1 else ""
        raise SaekitError(f"a context of {context_length} tokens has no room for text{first}")
    need = room * contexts
    ids: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    waiting = 0
    made = False
    for number, document in enumerate(documents):
        with_end = document if separator is None else np.append(document, -1 - separator)  # it belongs to no text
        ids.append(with_end)
        owners.append(np.full(len(with_end), number, dtype=np.int64))
        waiting += len(with_end)
        if waiting >= need:
            stream, owner = np.concatenate(ids), np.concatenate(owners)
            whole = len(stream) // need * need
            made = True
            for start in range(0, whole, need):
                yield _contexts(stream[start : start + need], owner[start : start + need], room, bos, skip_first)
            ids, owners, waiting = [stream[whole:]], [owner[whole:]], len(stream) - whole
    if waiting >= room or (waiting + (bos is not None) >= least and not made):
        stream, owner = np.concatenate(ids), np.concatenate(owners)
        room = min(room, waiting)
        whole = len(stream) // room * room
        yield _contexts(stream[:whole], owner[:whole], room, bos, skip_first)


def _contexts(stream: np.ndarray, owner: np.ndarray, room: int, bos: int | None, skip_first: int) -> ContextBatch:
    tokens = torch.from_numpy(stream.reshape(-1, room))
    owners = torch.from_numpy(owner.reshape(-1, room))
    if bos is not None:  # it goes with the document that follows it
        tokens = torch.nn.functional.pad(tokens, (1, 0), value=-1 - bos)
        owners = torch.cat([owners[:, :1], owners], dim=1)
    counts = tokens >= 0
    return ContextBatch(torch.where(counts, tokens, -1 - tokens), owners, without_first(counts, skip_first))


def without_first(kept: Bool[Tensor, "b t"], positions: int) -> Bool[Tensor, "b t"]:
    """The positions that are kept, without the first of each context.

    Raises:
        SaekitError: not even one is to be left out.
    """
    if positions < 1:
        raise SaekitError(f"skip_first is at least 1, not {positions}: the first position is no text to learn from")
    kept = kept.clone()
    kept[:, :positions] = False
    return kept


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A digest of the vocabulary and of a probe sentence's encoding."""
    digest = hashlib.blake2b(digest_size=16)
    for piece, number in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{piece}\0{number}\n".encode("utf-8", "replace"))
    probe = tokenizer("def probe(x):\n\treturn  x + 12345 # Ünïcode", add_special_tokens=False)["input_ids"]
    digest.update(repr(list(probe)).encode())
    return digest.hexdigest()
