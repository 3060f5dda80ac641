"""A cache of whatever holds a user's activations: tensors, arrays, memory-mapped files, pieces."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saekit import SaekitError
from saekit.activations import ActivationCache
from saekit.activations.arrays import ROWS, batches_of
from saekit.errors import SaekitWarning

X = np.random.default_rng(0).standard_normal((500, 6)).astype(np.float32)
GROUPS = np.arange(500) % 50


def npy(tmp_path):
    np.save(tmp_path / "x.npy", X)
    return tmp_path / "x.npy"


KINDS = {
    "tensor": lambda tmp_path: torch.from_numpy(X),
    "with gradient": lambda tmp_path: torch.from_numpy(X).requires_grad_(),
    "array": lambda tmp_path: X,
    "float64": lambda tmp_path: torch.from_numpy(X).double()[:, :6],
    "other byte order": lambda tmp_path: X.astype(">f4"),
    "transposed": lambda tmp_path: np.ascontiguousarray(X.T).T,
    "backwards twice": lambda tmp_path: X[::-1].copy()[::-1],
    "memmap": lambda tmp_path: np.load(npy(tmp_path), mmap_mode="r"),
    "path": npy,
    "text path": lambda tmp_path: str(npy(tmp_path)),
    "pieces": lambda tmp_path: (X[i : i + 7] for i in range(0, 500, 7)),
    "list of tensors": lambda tmp_path: list(torch.from_numpy(X).split(130)),
}


@pytest.mark.filterwarnings("ignore:activations in float64")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_cache(tmp_path, kind):
    plain = ActivationCache.from_tensor(tmp_path / "plain", torch.from_numpy(X.copy()))
    cache = ActivationCache.from_tensor(tmp_path / "c", KINDS[kind](tmp_path))
    assert torch.equal(cache.read(0, 500).x, torch.from_numpy(X))
    assert (cache.fingerprint, cache.division) == (plain.fingerprint, plain.division)


@pytest.mark.parametrize("kind", ["array", "pieces", "path"])
@pytest.mark.parametrize("others", ["arrays", "pieces", "lists"])
def test_gradients_and_groups_may_be_of_another_kind(tmp_path, kind, others):
    gradients, groups = X * 2, GROUPS
    if others == "pieces":
        gradients, groups = iter(np.split(gradients, [3, 111])), (torch.tensor(g) for g in np.split(groups, [490]))
    elif others == "lists":
        groups = groups.tolist()
    cache = ActivationCache.from_tensor(tmp_path / "c", KINDS[kind](tmp_path), gradients=gradients, groups=groups)
    found = cache.read(0, 500, gradients=True)
    assert torch.equal(found.gradients, torch.from_numpy(X * 2))
    assert torch.equal(found.documents, torch.from_numpy(GROUPS))
    assert cache.division.by == "documents"


class Watched(np.memmap):
    """Remembers how many rows were asked for at a time."""

    asked: list[int] = []  # noqa: RUF012

    def __getitem__(self, key):
        found = super().__getitem__(key)
        if isinstance(key, slice):
            Watched.asked.append(len(found))
        return found

    def __array__(self, *a, **k):
        assert len(self) <= ROWS, "the file is never taken as a whole"
        return super().__array__(*a, **k)


def test_a_memory_mapped_file_is_read_a_few_rows_at_a_time(tmp_path):
    rows = 5 * ROWS + 3
    file = np.memmap(tmp_path / "raw", np.float16, "w+", shape=(rows, 2))
    file[:] = np.arange(rows)[:, None] % 1000
    file.flush()
    Watched.asked.clear()
    watched = np.memmap(tmp_path / "raw", np.float16, "r", shape=(rows, 2)).view(Watched)
    batches = batches_of(watched, None, None, "float16")
    first = next(batches)
    assert Watched.asked == [ROWS], "no more is read than is asked for"
    total = len(first.x) + sum(len(batch.x) for batch in batches)
    assert total == sum(Watched.asked) == rows
    assert max(Watched.asked) == ROWS
    cache = ActivationCache.from_tensor(tmp_path / "c", watched, dtype="float16")
    assert torch.equal(cache.read(0, rows).x[:, 0], torch.arange(rows).remainder(1000).half())


def test_an_iterator_is_asked_for_one_piece_at_a_time():
    made = []

    def pieces():
        for number in range(5):
            made.append(number)
            yield np.ones((10, 2), np.float32)

    batches = batches_of(pieces(), None, None, "float32")
    next(batches)
    assert made == [0]


def test_wider_numbers_are_told_and_must_fit(tmp_path):
    with pytest.warns(SaekitWarning, match="activations in float64 are stored as bfloat16"):
        cache = ActivationCache.from_tensor(tmp_path / "c", X.astype(np.longdouble), dtype="bfloat16")
    assert torch.equal(cache.read(0, 500).x, torch.from_numpy(X).double().bfloat16())
    with (
        pytest.warns(SaekitWarning, match="float64"),
        pytest.raises(SaekitError, match="exceed float32's range"),
    ):
        ActivationCache.from_tensor(tmp_path / "d", np.full((5, 2), 1e300))
    with pytest.raises(SaekitError, match="activations exceed bfloat16's range"):
        ActivationCache.from_tensor(tmp_path / "d", torch.full((5, 2), 3.4e38), dtype="bfloat16")
    with pytest.raises(SaekitError, match="gradients exceed bfloat16's range"):
        ActivationCache.from_tensor(
            tmp_path / "d", torch.ones(5, 2), gradients=torch.full((5, 2), 3.4e38), dtype="float16"
        )


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ones((3, 2), np.int64), r"floating point numbers: a torch tensor, .*; not int64 of shape \[3, 2\]"),
        (np.ones(3), r"not float64 of shape \[3\]"),
        (np.ones((3, 2), complex), r"not complex128 of shape \[3, 2\]"),
        (np.array([["a"]]), r"not <U1 of shape \[1, 1\]"),
        (torch.ones(3, 2, 1), r"not float32 of shape \[3, 2, 1\]"),
        (torch.tensor(1.0), r"not float32 of shape \[\]"),
        ([[1.0, 2.0]], "not of type list, which piece 0 is"),
        ([torch.ones(2, 2), None], "not of type NoneType, which piece 1 is"),
        (7, "not of type int"),
        ({"x": X}, "not of type dict"),
        (None, "not of type NoneType"),
        ([torch.ones(2, 2), torch.ones(2, 3)], "from row 2 have width 3, those before them 2"),
        ([], "no activations"),
        (iter([np.ones((0, 4), np.float32)]), "no activations"),
        ("x.pt", "'x.pt' is no .npy file"),
        ("none.npy", "'none.npy' cannot be read: .*No such file"),
    ],
)
def test_what_is_no_activations_is_named(tmp_path, x, message):
    with pytest.raises(SaekitError, match=message):
        ActivationCache.from_tensor(tmp_path / "c", x)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_file_is_named(tmp_path):
    path = npy(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SaekitError, match="x.npy' cannot be read"):
        ActivationCache.from_tensor(tmp_path / "c", path)
    np.save(path, np.array([{}]), allow_pickle=True)
    with pytest.raises(SaekitError, match="x.npy' cannot be read"):
        ActivationCache.from_tensor(tmp_path / "c", path)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"groups": np.ones(500)}, "groups are whole numbers .* not float64 of shape .*return_inverse"),
        ({"groups": np.array(["a"] * 500)}, "groups are whole numbers"),
        ({"groups": np.zeros((500, 1), int)}, "groups are whole numbers"),
        ({"groups": np.zeros(500, bool)}, "groups are whole numbers"),
        ({"groups": 3}, "groups are whole numbers"),
        ({"groups": GROUPS[:-1]}, r"groups of shape \[499\] do not fit activations \[500, 6\]"),
        ({"groups": iter([GROUPS[:-1]])}, "groups of 499 rows do not fit activations of at least 500 rows"),
        ({"groups": iter([GROUPS, GROUPS])}, "groups of at least 1000 rows do not fit activations of 500 rows"),
        ({"gradients": X[:, :5]}, r"gradients of shape \[500, 5\] do not fit activations"),
        ({"gradients": iter([X, X[:1]])}, "gradients of at least 501 rows do not fit activations of 500 rows"),
        ({"gradients": iter([X[:9], X[9:, 1:]])}, "pieces of gradients do not fit each other"),
        ({"gradients": GROUPS}, "gradients are a matrix"),
    ],
)
def test_what_does_not_fit_the_activations_is_named(tmp_path, others, message):
    with pytest.raises(SaekitError, match=message):
        ActivationCache.from_tensor(tmp_path / "c", X, **others)
    assert list(tmp_path.iterdir()) == []
