"""Contexts drawn from a pool: the same ones, in an order that the seed decides and nothing else."""

import json
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saekit.activations import ActivationSource
from saekit.activations.mixing import mixed
from saekit.activations.settings import StreamSettings
from saekit.activations.text import open_text
from saekit.activations.tokens import ContextBatch

TOKENS = 600_000  # of the text of the machine, some 120 files


def numbered(n: int) -> ContextBatch:
    """n contexts of three tokens, each of its own document."""
    tokens = torch.arange(3 * n).reshape(n, 3)
    return ContextBatch(tokens, tokens // 3, tokens % 3 > 0)


def order(batches) -> list[int]:
    return torch.cat([batch.documents[:, 0] for batch in batches]).tolist()


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 5), st.integers(1, 9), st.integers(1, 9))
def test_the_same_contexts_in_an_order_that_batches_play_no_part_in(n, pool, seed, arriving, size):
    whole = numbered(n)
    batches = list(mixed(whole.split(arriving), pool, seed, size=size))
    found = order(batches)
    assert sorted(found) == list(range(n))
    assert found == order(mixed([whole], pool, seed, size=1))
    assert all(len(batch.tokens) == size for batch in batches[:-1])
    assert all(number < place + pool + 1 for place, number in enumerate(found)), "read no further than the pool reaches"
    rows = torch.cat([batch.tokens for batch in batches])
    assert torch.equal(rows, whole.tokens[found])
    assert torch.equal(torch.cat([batch.kept for batch in batches]), whole.kept[found])
    assert rows.dtype == torch.int64


def test_every_place_of_a_permuted_text_is_as_likely():
    n, laps = 6, 3000
    counts = torch.zeros(n, n)
    for seed in range(laps):
        for place, number in enumerate(order(mixed([numbered(n)], n, seed))):
            counts[place, number] += 1
    assert float(((counts - laps / n) ** 2 / (laps / n)).sum()) < 60  # chi-square of 25 degrees of freedom, p = 1e-4


@pytest.fixture(scope="module")
def unmixed(source):
    """Contexts of the machine's own text as they stand there, TOKENS of them."""
    return list(islice(source.contexts("train"), TOKENS // (32 * source.context_length)))


@pytest.fixture(scope="module")
def drawn(unmixed, source):
    """The same ones mixed."""
    return list(mixed(unmixed, TOKENS // source.context_length, 0))


def test_a_batch_holds_many_documents(unmixed, drawn):
    def documents(batches):
        return sum(len(batch.documents.unique()) for batch in batches) / len(batches)

    of_all = len(torch.cat([batch.documents for batch in unmixed]).unique())
    assert of_all > 60
    assert documents(drawn) > 2.5 * documents(unmixed)
    assert documents(drawn) > 15


def test_a_fill_is_like_the_whole(unmixed, drawn):
    """Total variation between the tokens of an eighth of the contexts and those of all, against chance's."""

    def apart(contexts):
        tokens = torch.cat([batch.tokens for batch in contexts])
        whole = torch.bincount(tokens.flatten(), minlength=5000) / tokens.numel()
        parts = [torch.bincount(part.flatten(), minlength=5000) / part.numel() for part in tokens.chunk(8)]
        return sum(float((part - whole).abs().sum()) / 2 for part in parts) / len(parts)

    tokens = torch.cat([batch.tokens for batch in unmixed])
    spread = torch.cat([tokens[place::8] for place in range(8)])  # each part from everywhere
    chance = apart([ContextBatch(spread, spread, spread > 0)])
    assert apart(drawn) < 1.25 * chance
    assert apart(unmixed) > 1.5 * chance


def test_seed_and_lap_decide_the_order_and_heldout_text_has_none(source):
    def first(**changes):
        lap = changes.pop("lap", 0)
        opened = ActivationSource.open(loaded=source.model, pool=50_000, **changes)
        return order(islice(opened.mixed("train", lap=lap), 3))

    assert first() == first()
    assert len({tuple(found) for found in (first(), first(data_seed=1), first(lap=1))}) == 3
    opened = ActivationSource.open(loaded=source.model, pool=50_000)
    assert torch.equal(next(opened.contexts("heldout")).tokens, next(source.contexts("heldout")).tokens)
    assert opened.provenance("train")["pool"] == 50_000
    assert order(islice(source.mixed("train"), 3)) == order(islice(source.contexts("train"), 3)), "no pool, no mixing"


def test_the_activations_follow_the_contexts(source):
    opened = ActivationSource.open(loaded=source.model, pool=30_000)
    wanted = list(islice(opened.mixed("train"), 3))
    found = list(opened.batches("train", sum(int(batch.kept.sum()) for batch in wanted)))
    assert torch.equal(
        torch.cat([batch.tokens for batch in found]), torch.cat([batch.tokens[batch.kept] for batch in wanted])
    )
    second = next(opened.batches("train", first=1))
    assert torch.equal(second.x, found[1].x), "passed over without the model"


def test_rows_of_a_dataset_are_shuffled_beside_it(tmp_path):
    for file in range(3):
        lines = [json.dumps({"text": f"document {file} {number} " * 9}) for number in range(40)]
        (tmp_path / f"{file}.jsonl").write_text("\n".join(lines))
    text = open_text(str(tmp_path / "*.jsonl"))
    plain = list(text.documents("train"))
    once, again, other = (list(text.shuffled(seed).documents("train")) for seed in (0, 0, 1))
    assert sorted(once) == sorted(plain)
    assert once == again
    assert len({tuple(each) for each in (plain, once, other)}) == 3
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"text": each} for each in plain]).save_to_disk(tmp_path / "saved")
    saved = open_text(str(tmp_path / "saved"))
    assert sorted(saved.shuffled(0).documents("train")) == sorted(saved.documents("train"))
    assert list(saved.shuffled(0).documents("train")) != list(saved.documents("train"))


def test_the_pool_is_as_large_as_what_is_trained_on_and_bounded():
    assert StreamSettings().pooled(1000).pool == 1000
    assert StreamSettings().pooled(10**9).pool == 8_000_000
    assert StreamSettings(pool=0).pooled(1000).pool == 0
    told = {"model": "m", "hook": "h", "dataset": "d", "column": "c", "dataset_split": "s", "part": "train"}
    told |= {"context_length": 8, "model_dtype": "float32"}
    assert StreamSettings.of(told).pool == 0, "text of older caches came in its own order"
    assert StreamSettings.of({**told, "pool": 7, "data_seed": 2}).data_seed == 2


def test_a_short_text_is_permuted_as_a_whole(source, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("".join(f"one two three {number}\n" for number in range(3000)))
    short = ActivationSource.open(dataset=str(path), context_length=64, loaded=source.model, pool=10**6)
    plain, found = (
        torch.cat([b.tokens for b in batches]) for batches in (short.contexts("train"), short.mixed("train"))
    )
    assert sorted(plain.tolist()) == sorted(found.tolist())
    assert not torch.equal(plain, found)
    assert list(mixed(iter(()), 5, 0)) == []
