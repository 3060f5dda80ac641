"""Packing: every token once and in order, BOS and separators marked by position."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saekit import SaekitError
from saekit.activations import pack
from saekit.activations.tokens import encoded


class Letters:
    """A tokenizer of one token a character; its EOS is also a letter that documents use."""

    bos_token_id, eos_token_id = 1, ord("e")

    def __call__(self, texts, **_):
        return {"input_ids": [[ord(c) for c in text] for text in texts]}


class NoEnd(Letters):
    eos_token_id = None


@given(
    st.lists(st.text("abcde", min_size=1, max_size=30), max_size=30),
    st.integers(4, 12),
    st.booleans(),
    st.integers(1, 5),
    st.integers(1, 10),
)
def test_packing_keeps_every_token_in_order(documents, length, bos, batch, skip_first):
    options = {"prepend_bos": bos, "contexts": batch, "skip_first": skip_first}
    if length < skip_first + 2:
        with pytest.raises(SaekitError, match="no room for text"):
            list(pack(encoded(documents, Letters()), Letters(), length, **options))
        return
    batches = list(pack(encoded(documents, Letters()), Letters(), length, **options))
    stream, owners, kept = [], [], []
    for number, text in enumerate(documents):
        stream += [ord(c) for c in text] + [Letters.eos_token_id]
        owners += [number] * (len(text) + 1)
        kept += [True] * len(text) + [False]
    room = length - bos
    if skip_first + 2 <= len(stream) + bos < length:
        room = len(stream)  # all there is makes one shorter context
    whole = len(stream) // room * room
    assert sum(len(b.tokens) for b in batches) == whole // room
    if not whole:
        return
    tokens, found_owners, found_kept = (torch.cat(column) for column in zip(*batches, strict=True))
    assert tokens.shape[1] == room + bos
    if bos:
        assert (tokens[:, 0] == Letters.bos_token_id).all()
    assert not found_kept[:, 0].any()
    assert tokens[:, int(bos) :].flatten().tolist() == stream[:whole]
    assert found_owners[:, int(bos) :].flatten().tolist() == owners[:whole]
    # a letter 'e' inside a document counts, the separator of the same id does not, nor does the start of a context
    assert not found_kept[:, :skip_first].any()
    expected = torch.tensor(kept[:whole]).reshape(-1, room)[:, skip_first - bos :]
    assert torch.equal(found_kept[:, skip_first:], expected)


def test_without_eos_bos_divides_documents():
    (batch,) = pack(encoded(["aaaa", "bb"], NoEnd()), NoEnd(), 5, prepend_bos=True, contexts=2)
    assert batch.tokens.tolist() == [[1, 97, 97, 97, 97], [1, 1, 98, 98, 1]]
    assert batch.kept.tolist() == [[False, True, True, True, True], [False, False, True, True, False]]


class Bare(Letters):
    bos_token_id = eos_token_id = None


@pytest.mark.parametrize("prepend_bos", [False, True])
def test_without_special_tokens_there_is_text_alone(prepend_bos):
    (batch,) = pack(encoded(["aaa", "bb", "c"], Bare()), Bare(), 3, prepend_bos=prepend_bos, contexts=2)
    assert batch.tokens.tolist() == [[97, 97, 97], [98, 98, 99]]
    assert batch.documents.tolist() == [[0, 0, 0], [1, 1, 2]]
    assert batch.kept.tolist() == [[False, True, True]] * 2


def test_a_context_has_room_for_a_prediction_that_counts():
    for prepend_bos in (False, True):
        with pytest.raises(SaekitError, match="a context of 2 tokens has no room for text"):
            next(pack(encoded(["aaaa"], Letters()), Letters(), 2, prepend_bos=prepend_bos))
    assert list(pack(encoded(["a"], Letters()), Letters(), 9, prepend_bos=False)) == []
    (batch,) = pack(encoded(["a"], Letters()), Letters(), 9, prepend_bos=True)
    assert batch.kept.tolist() == [[False, True, False]]
    with pytest.raises(SaekitError, match="a context of 9 tokens has no room for text after the first 8"):
        list(pack(encoded(["abc"], Letters()), Letters(), 9, prepend_bos=True, skip_first=8))
    with pytest.raises(SaekitError, match="skip_first is at least 1, not 0"):
        list(pack(encoded(["abcdef"], Letters()), Letters(), 4, prepend_bos=True, skip_first=0))
