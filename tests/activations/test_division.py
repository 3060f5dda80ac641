"""How a cache is divided: every part is like the whole, no group is on two sides, and old caches stay as they are."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saekit import SaekitError
from saekit.activations import ActivationBatch, ActivationCache
from saekit.activations.division import Division, divided
from saekit.activations.manifest import MANIFEST
from saekit.activations.stream import cache_rows

PARTS = ("train", "calibration", "heldout")


def marks(division: Division, documents: torch.Tensor) -> torch.Tensor:
    """The number of each row's part, asked for in pieces; each row is in exactly one."""
    held = torch.stack(
        [torch.cat([division.holds(p, 100 * i, d) for i, d in enumerate(documents.split(100))]) for p in PARTS]
    )
    assert bool((held.sum(0) == 1).all())
    return held.int().argmax(0)


def check(division: Division, documents: torch.Tensor) -> torch.Tensor:
    found = marks(division, documents)
    assert found.bincount(minlength=3).tolist() == [getattr(division.rows, part) for part in PARTS]
    return found


@given(st.lists(st.integers(1, 60), min_size=3, max_size=80), st.integers(0, 10**9), st.booleans())
def test_no_document_is_on_two_sides_and_no_part_is_empty(sizes, number, mixed):
    numbers = torch.arange(len(sizes)) * 7919 + number
    documents = numbers.repeat_interleave(torch.tensor(sizes))
    if mixed:
        documents = documents[torch.randperm(len(documents), generator=torch.Generator().manual_seed(0))]
    found = check(divided(documents.split(77), "documents"), documents)
    for each in numbers:
        assert len(found[documents == each].unique()) == 1
    assert len(found.unique()) == 3


@given(st.integers(3, 3000))
def test_blocks_are_spread_over_any_number_of_rows(rows):
    found = check(divided([torch.arange(rows)], "blocks"), torch.zeros(rows, dtype=torch.long))
    assert min(found.bincount(minlength=3)) > 0


@pytest.mark.parametrize(("documents", "by"), [(1000, "documents"), (300, "documents"), (5, "blocks"), (1, "blocks")])
def test_shares_are_near_five_percent(documents, by):
    numbers = torch.randint(documents, (60_000,), generator=torch.Generator().manual_seed(1)).sort().values
    division = divided(numbers.split(7000))
    assert division.by == by, "a harvest of few documents is divided by blocks"
    found = check(division, numbers)
    shares = [float((found == i).double().mean()) for i in (1, 2)]
    # the cut is within half a group of what is wanted: of 0.1% or 0.3% of the rows, or 256 of them
    assert shares == pytest.approx([0.05, 0.05], abs=0.003)
    places = (found == 2).nonzero()[:, 0].double() / 60_000
    assert float(places.mean()) == pytest.approx(0.5, abs=0.25), "spread over the cache"
    assert float(places.min()) < 0.2
    assert float(places.max()) > 0.8


def test_parts_have_at_most_so_many_rows():
    numbers = torch.arange(8_000_000) // 100
    division = divided(numbers.split(1 << 20))
    assert division.rows.heldout == pytest.approx(65_536, abs=200)
    assert division.rows.calibration == pytest.approx(262_144, abs=200)


def test_one_huge_document_is_trained_on():
    sizes = torch.full((40,), 1000)
    sizes[17] = 9000
    found = check(divided([torch.arange(40).repeat_interleave(sizes)]), torch.arange(40).repeat_interleave(sizes))
    assert [int((found == i).sum()) for i in (1, 2)] == [2000, 2000]


def test_neighbours_stay_together_at_the_end_of_long_caches():
    found = marks(divided([torch.zeros(200_000, dtype=torch.long)], "blocks"), torch.zeros(200_000, dtype=torch.long))
    lengths = found.unique_consecutive(return_counts=True)[1]
    assert int((lengths % 256 == 0).sum()) > 50, "beyond 51,200 rows, blocks of 256"


def test_groups_are_kept_whole_and_too_few_are_refused(tmp_path):
    groups = torch.randint(25, (3000,), generator=torch.Generator().manual_seed(2)) * 10**12
    cache = ActivationCache.from_tensor(tmp_path / "c", torch.randn(3000, 2), groups=groups)
    assert torch.equal(cache.documents(0, 3000), groups)
    sides = [set(torch.cat([b.documents for b in cache.batches(part)]).tolist()) for part in PARTS]
    assert all(sides)
    assert sum(map(len, sides)) == 25
    with pytest.raises(SaekitError, match="the rows are of 2 groups; to hold whole ones out, there must be 3"):
        ActivationCache.from_tensor(tmp_path / "few", torch.randn(30, 2), groups=torch.arange(30) % 2)
    assert not list(tmp_path.glob("few*"))


def test_the_first_batches_of_a_part_are_like_all_of_it(tmp_path):
    x = torch.arange(100_000.0)[:, None]  # sorted
    cache = ActivationCache.from_tensor(tmp_path / "c", x)
    for part in PARTS[1:]:
        first = next(cache.batches(part, 2000)).x  # of 5,000
        assert float(first.mean()) == pytest.approx(50_000, abs=25_000)
        assert float(first.max() - first.min()) > 50_000
    once, again = (torch.cat([b.x for b in cache.batches("heldout", n)]) for n in (7, 4096))
    assert torch.equal(once, again)


def test_training_reads_the_training_rows_alone(tmp_path):
    cache = ActivationCache.from_tensor(tmp_path / "c", torch.arange(7000.0)[:, None])
    pieces = cache_rows(cache, seed=1)
    epoch = torch.cat([next(pieces) for _ in range(4)]).flatten()
    held = torch.cat([b.x for part in PARTS[1:] for b in cache.batches(part)]).flatten()
    assert sorted(torch.cat([epoch, held]).tolist()) == list(range(7000))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"division": None}, "division"),
        ({"format": 2}, "was written before the first release"),
        ({"format": 4}, "format"),
        (
            {"division": {"by": "blocks", "rows": {"train": 9, "calibration": 0, "heldout": 0}}},
            "another number",
        ),
        ({"division": {"by": "moon", "rows": {"train": 50, "calibration": 0, "heldout": 0}}}, "division.by"),
    ],
)
def test_a_division_that_does_not_fit_is_named(tmp_path, change, message):
    cache = ActivationCache.from_tensor(tmp_path / "c", torch.ones(50, 2))
    content = json.loads((cache.path / MANIFEST).read_text())
    from saekit.seal import BLANK, stamp

    (cache.path / MANIFEST).write_bytes(stamp((json.dumps({**content, **change, "seal": BLANK}) + "\n").encode()))
    with pytest.raises(SaekitError, match=message):
        ActivationCache.open(cache.path)


def test_documents_of_a_harvest_are_kept_whole(tmp_path):
    documents = torch.arange(60).repeat_interleave(100)
    rows = ActivationBatch(torch.randn(6000, 2), documents, documents, torch.zeros_like(documents))
    cache = ActivationCache.write(tmp_path / "c", [rows], {})
    assert cache.division.by == "documents"
    assert cache.division.rows.model_dump() == {"train": 5400, "calibration": 300, "heldout": 300}
    sides = [set(torch.cat([b.documents for b in cache.batches(part)]).tolist()) for part in PARTS]
    assert sum(map(len, sides)) == 60


def test_info_says_how_rows_are_held_out(tmp_path, saekit_main):
    ActivationCache.from_tensor(tmp_path / "c", torch.ones(1000, 2))
    told = json.loads(saekit_main("info", tmp_path / "c").stdout)
    assert told["held_out"] == "a hash divides whole blocks of up to 256 neighbouring rows among the parts"
    assert sum(told["parts"].values()) == 1000
