"""A pass of the model takes several pieces of the stream, or a part of one: the rows and the pieces stay the same."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saekit import SaekitError
from saekit.activations import ActivationSource, harvest, harvest_hooks
from saekit.activations.passes import in_passes
from saekit.activations.resumable import harvest_cache, resume_cache
from saekit.activations.settings import HarvestPlan
from saekit.activations.stream import live_rows
from saekit.activations.tokens import ContextBatch
from saekit.errors import SaekitWarning
from saekit.interrupt import Interrupted


def _batches(shapes):
    numbers = itertools.count()
    for contexts, length in shapes:
        tokens = torch.tensor([[next(numbers) for _ in range(length)] for _ in range(contexts)])
        yield ContextBatch(tokens, tokens, tokens >= 0)


_shapes = st.lists(st.tuples(st.integers(1, 5), st.sampled_from([2, 3])), max_size=6)


@given(_shapes, st.integers(0, 12), st.integers(1, 12))
@pytest.mark.filterwarnings("ignore:the card's memory")
def test_no_row_is_lost_or_repeated_whatever_a_pass_takes(shapes, at_once, room):
    taken = []

    def run(tokens):
        if len(tokens) > room:
            raise torch.cuda.OutOfMemoryError("a card with little memory")
        taken.append(len(tokens))
        return [tokens * 2, tokens.float()]

    batches = list(_batches(shapes))
    found = list(in_passes(run, batches, at_once))
    assert [batch for batch, _ in found] == batches
    for batch, (twice, same) in found:
        assert torch.equal(twice, 2 * batch.tokens)
        assert torch.equal(same, batch.tokens.float())
    assert max(taken, default=0) <= min(room, at_once or room)
    if not at_once and room >= 5:
        assert taken == [contexts for contexts, _ in shapes], "each batch in a pass of its own"


def test_a_context_that_memory_does_not_hold_is_refused():
    def run(tokens):
        raise torch.cuda.OutOfMemoryError("full")

    with (
        pytest.warns(SaekitWarning, match="takes 2 contexts at a time"),
        pytest.raises(SaekitError, match="does not hold one context of 3 tokens"),
    ):
        list(in_passes(run, _batches([(4, 3)])))


@pytest.mark.parametrize("at_once", [3, 96])
@pytest.mark.parametrize("gradients", [False, True])
def test_pieces_have_the_same_rows_whatever_a_pass_takes(source, at_once, gradients):
    hook = source.hook
    contexts = list(itertools.islice(source.contexts("train", 8 if gradients else 32), 3))
    contexts = [batch.rows(0, 4) for batch in contexts]
    plain = list(harvest(source.model, hook, contexts, gradients=gradients))
    other = list(harvest(source.model, hook, contexts, gradients=gradients, at_once=at_once))
    several = harvest_hooks(source.model, [hook], contexts, at_once=at_once)
    for one, two, three in zip(plain, other, several, strict=True):
        for x, y in zip(one, two, strict=True):
            assert (x is None and y is None) or x.shape == y.shape
        assert torch.equal(one.tokens, two.tokens)
        assert torch.equal(one.positions, two.positions)
        scale = float(one.x.abs().max())
        torch.testing.assert_close(two.x, one.x, rtol=0, atol=1e-5 * scale)
        torch.testing.assert_close(three.batches[hook].x, one.x, rtol=0, atol=1e-5 * scale)
        if gradients:
            torch.testing.assert_close(
                two.gradients, one.gradients, rtol=0, atol=1e-4 * float(one.gradients.abs().max())
            )


def test_a_stream_goes_on_at_the_same_piece_with_passes_of_another_size(source, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("\n".join(f"def f{i}(x): return x + {i * i}" for i in range(4000)))
    how = {"dataset": str(text), "context_length": 32, "loaded": source.model}
    plain = list(itertools.islice(live_rows(ActivationSource.open(**how)), 6))
    again = list(itertools.islice(live_rows(ActivationSource.open(**how, harvest_batch=64), first=2), 4))
    for one, two in zip(plain[2:], again, strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=1e-4 * float(one.abs().max()))


def test_a_harvest_tells_how_many_contexts_a_pass_had_and_goes_on_with_other_numbers(source, tmp_path, monkeypatch):
    monkeypatch.setattr("saekit.activations.source.load_model", lambda *_, **__: source.model)
    monkeypatch.setattr("saekit.activations.cache.SHARD_ROWS", 4000)
    plan = HarvestPlan(context_length=64, tokens=12_000, dtype="float32", harvest_batch=48, pool=0)
    whole = harvest_cache(tmp_path / "whole", plan)
    assert whole.provenance["harvest_batch"] == 48
    assert whole.provenance["model_dtype"] == "float32", "not 'auto'"

    def stop(done, total):
        if done > 8000:
            raise Interrupted(2)

    with pytest.raises(Interrupted):
        harvest_cache(tmp_path / "cut", plan, progress=stop)
    with pytest.raises(SaekitError, match="begun with another context_length"):
        resume_cache(tmp_path / "cut", {"context_length": 32})
    cut = resume_cache(tmp_path / "cut", {"harvest_batch": 16, "model_device": "cpu", "model_dtype": "auto"})
    one, two = whole.read(0, 12_000), cut.read(0, 12_000)
    assert torch.equal(one.tokens, two.tokens)
    torch.testing.assert_close(two.x, one.x, rtol=0, atol=1e-5 * float(one.x.abs().max()))
