"""Which contexts dictionaries are judged on: drawn from all documents, the same each time, and like all of the text."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from saekit import SaekitError
from saekit.activations.text import TextSource
from saekit.evals import heldout as module
from saekit.evals import heldout_contexts
from saekit.evals.costs import costs
from saekit.evals.heldout import draw, excerpts_of


def with_texts(source, texts):
    return replace(source, text=TextSource("made", "0", lambda part: iter(texts)), context_length=64)


def made(documents: int, words: int = 300) -> list[str]:
    """Documents of different words, long enough for several contexts of 64 tokens."""
    return [" ".join(f"name_{i}_{j} = {i * j}" for j in range(words // 3)) for i in range(documents)]


def rows(contexts):
    return [tuple(row) for row in contexts.tokens.tolist()]


def test_no_document_s_place_decides(source):
    """Fewer contexts than documents: they come from documents anywhere in the text, and order does not matter."""
    texts = made(200)
    drawn = draw(with_texts(source, texts), 2000)
    assert (drawn.documents, drawn.whole) == (200, True)
    numbers = drawn.contexts.documents
    assert len(numbers[drawn.contexts.kept].unique()) >= 15, "32 contexts; the first two documents would fill as many"
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0)).tolist()
    again = heldout_contexts(with_texts(source, [texts[i] for i in order]), 2000)
    assert rows(again) == rows(drawn.contexts)
    assert torch.equal(again.documents, numbers)


def test_more_tokens_are_the_same_contexts_and_others(source):
    few = heldout_contexts(with_texts(source, made(50)), 1500)
    many = heldout_contexts(with_texts(source, made(50)), 6000)
    assert rows(many)[: len(few.tokens)] == rows(few)
    assert torch.equal(many.documents[: len(few.tokens)], few.documents)
    assert len(many.tokens) > 3 * len(few.tokens)


def test_enough_and_no_more_and_all_where_there_are_fewer(source):
    made_source = with_texts(source, made(20))
    drawn = heldout_contexts(made_source, 1000)
    assert 1000 <= int(drawn.kept.sum()) < 1000 + 64
    everything = list(made_source.contexts("heldout"))
    found = heldout_contexts(made_source, 10**9)
    assert abs(len(found.tokens) - sum(len(batch.tokens) for batch in everything)) <= 1
    assert len(set(rows(found))) == len(found.tokens), "none twice"
    assert set(range(20)) == set(found.documents.unique().tolist())


def test_one_long_document_does_not_hide_the_others(source):
    texts = [" ".join(made(300)), *made(30)]  # nine tenths of the text
    contexts = heldout_contexts(with_texts(source, texts), 20_000)
    _, tokens = contexts.documents[contexts.kept].unique(return_counts=True)
    assert len(tokens) > 5
    assert float(tokens.max() / tokens.sum()) == pytest.approx(0.9, abs=0.09), "it counts for what it is, as one"


def test_a_text_without_end_is_read_in_part(source, monkeypatch):
    monkeypatch.setattr(module, "_LEAST", 50_000)

    def endless():
        i = 0
        while True:
            yield from (f"{i} {text}" for text in made(10))
            i += 1

    endless_source = replace(with_texts(source, []), text=TextSource("endless", "0", lambda part: endless()))
    drawn = draw(endless_source, 100)
    assert not drawn.whole
    assert "the first " in drawn.about()["drawn"]


def test_no_text(source):
    with pytest.raises(SaekitError, match="the heldout part of 'made' is empty"):
        heldout_contexts(with_texts(source, []), 100)


@pytest.mark.parametrize(
    "text",
    ["", "a", "one two three " * 400, "line\n" * 999 + "x" * 5000, "x" * 10_000, "字" * 4000, "a b\n" * 30],
)
def test_excerpts_are_the_document(text):
    parts = list(excerpts_of(text, 3, 500))
    assert "".join(part.text for part in parts) == text
    assert all(part.document == 3 and len(part.text) < 900 for part in parts)
    assert [part.cut for part in parts] == [True] * (len(parts) - 1) + [False] * bool(parts)
    if " " in text or "\n" in text[:3000]:
        for one, after in itertools.pairwise(parts):
            assert one.text.endswith("\n") or after.text.startswith(" ") or len(one.text) + len(after.text) > 900


def test_the_end_of_an_excerpt_is_no_end_of_text(source):
    """Where a document goes on after an excerpt, its last token is not scored: what follows it there is not its own."""
    long = with_texts(source, [made(1, 9000)[0]])
    whole = next(iter(long.contexts("heldout")))
    assert whole.kept.any()
    drawn = heldout_contexts(long, 10**6)
    eos = source.model.tokenizer.eos_token_id
    at = drawn.kept[:, :-1] & (drawn.tokens[:, 1:] == eos) & ~drawn.kept[:, 1:]
    assert int((~drawn.kept[:, 1:] & (drawn.tokens[:, 1:] == eos)).sum()) > 2, "there are cuts"
    assert int(at.sum()) <= 1, "the document's own end at most"


def test_the_model_s_cross_entropy_is_that_of_all_held_out_text(source):
    """The test of the draw and of the interval: a sample agrees with the whole within its standard error."""
    texts = [text for i, text in enumerate(source.text.documents("heldout")) if i % 48 == 0]  # some 14 files
    few = replace(source, text=replace(source.text, documents=lambda part: iter(texts)))

    def ce(contexts):
        found = costs(source.model, source.hook, contexts, {"clean": None})
        return found.sums.figures(found.means)

    whole = ce(few.contexts("heldout"))["ce_clean"]
    sample = ce(heldout_contexts(few, 8000).split(32))
    assert abs(sample["ce_clean"] - whole) < 4 * sample["ce_clean_se"]
    assert 0.01 < sample["ce_clean_se"] < 0.5
