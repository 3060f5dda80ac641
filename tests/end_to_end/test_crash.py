"""A harvest or a run that is killed, at any moment, goes on without loss: not one byte of what it makes is another."""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
import typing
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from crashes import End, Zygotes, zygotes

from saekit.activations import ActivationCache
from saekit.activations import cache as caches

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and asks /proc for names")

LOGGED = 2  # steps between lines of metrics
NAMES = ("longer train from a cache", "longer train live", "longer harvest", "longer harvest with gradients")
TIMES = {"seconds", "tokens_per_second", "waited_seconds", "waited_share"}
AT_ONCE = 2


@dataclass(frozen=True)
class Command:
    """A command line that makes ``out`` in the current folder.

    Attributes:
        begin: it.
        resume: how it goes on.
        before: a command that comes first.
        at: the file operation at which that is killed; 0 for none.
    """

    begin: tuple[object, ...]
    resume: tuple[object, ...]
    before: tuple[object, ...] = ()
    at: int = 0


@pytest.fixture(scope="module")
def zygote():
    with zygotes(AT_ONCE) as made:
        yield made


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """All commands, on a small text and a small cache."""
    home = tmp_path_factory.mktemp("data")
    text = home / "typing.txt"
    text.write_text(Path(typing.__file__).read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caches, "SHARD_ROWS", 700)
        x = torch.randn(3000, 64, generator=torch.Generator().manual_seed(1))
        ActivationCache.from_tensor(home / "cache", x)
    out = ("--quiet", "--out", "out")
    more = ("cache", *out, "--resume")
    again = ("train", *out, "--resume", "--eval-tokens", 0)
    on_text = ("--dataset", text, "--context-length", 16)

    def harvest(tokens: int, *flags: object) -> tuple[object, ...]:
        return ("cache", *out, *on_text, "--tokens", tokens, *flags)

    def train(steps: int, *flags: object) -> tuple[object, ...]:
        small = ("--width", 64, "--k", 4, "--batch-size", 64, "--buffer", 300, "--calibration-tokens", 400)
        often = ("--log-every", LOGGED, "--checkpoint-every", 5, "--eval-tokens", 0)
        return ("train", *out, *small, *often, "--tokens", 64 * steps, *flags)

    cached = ("--cache", home / "cache", "--aux", "aux_zipf", "--dead-after", 200)  # and what else a checkpoint holds
    cached += ("--variant", "feature_choice", "--feature-choice-fraction", 0.5)
    hooks = ("--hook", "blocks.0.hook_resid_post", "--hook", "blocks.1.hook_mlp_out")
    return {
        "harvest": Command(harvest(1500), more),
        "harvest, resumed": Command(more, more, harvest(1500), at=17),
        "harvest over a cache": Command(harvest(1500, "--overwrite"), more, harvest(900)),
        "train from a cache": Command(train(20, *cached), again),
        "train from a cache, resumed": Command(again, again, train(20, *cached), at=14),
        "train over a run": Command(train(20, *cached, "--overwrite"), again, train(20, *cached, "--seed", 1)),
        "train live": Command(train(20, *on_text), again),
        "train at two hooks": Command(train(20, *on_text, *hooks), again),
        "longer harvest": Command(harvest(2000), more),
        "longer harvest with gradients": Command(harvest(1000, "--gradients"), more),
        "longer train from a cache": Command(train(60, *cached), again),
        "longer train live": Command(train(60, *on_text), again),
    }


@dataclass
class Whole:
    """What a command makes when nothing stops it."""

    name: str
    command: Command
    start: Path  # a folder of what is there before
    made: dict[str, object]
    end: End


@pytest.fixture(scope="module")
def whole(zygote, commands, tmp_path_factory) -> Callable[[str], Whole]:
    known: dict[str, Whole] = {}

    def make(name: str) -> Whole:
        if name not in known:
            command = commands[name]
            start, folder = tmp_path_factory.mktemp("start"), tmp_path_factory.mktemp("whole")
            if command.before:
                end = zygote.run(start, *command.before, at=command.at)
                assert end.code == (None if command.at else 0), end.said
            shutil.copytree(start, folder, dirs_exist_ok=True)
            end = zygote.run(folder, *command.begin)
            assert end.code == 0, end.said
            if command.at:
                assert_same(folder, make(name.removesuffix(", resumed")).made, "one kill")
            known[name] = Whole(name, command, start, contents(folder), end)
        return known[name]

    return make


def contents(folder: Path) -> dict[str, object]:
    """Every file and folder, by its path; of lines of metrics all but how long they took."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "metrics.jsonl":
            lines = map(json.loads, path.read_text().splitlines())
            found[name] = [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
        else:
            found[name] = None if path.is_dir() else path.read_bytes()
    return found


def assert_same(folder: Path, expected: dict[str, object], after: str) -> None:
    found = contents(folder)
    assert [*found] == [*expected], f"other files after {after}"
    other = [name for name, content in found.items() if content != expected[name]]
    assert not other, f"other bytes after {after}"
    assert not [name for name in found if ".part" in name or "tmp" in name]
    for name, lines in found.items():
        if name.endswith("metrics.jsonl"):
            steps = [line["step"] for line in lines]
            assert steps == [*range(LOGGED, steps[-1] + 1, LOGGED)], f"{name} after {after}"


def go_on(zygote: Zygotes, expected: Whole, folder: Path, so_far: str, after: float = 0) -> End:
    """Resume, or begin again where there is nothing to resume; killed once more ``after`` seconds, if not 0."""
    end = zygote.run(folder, *expected.command.resume, after=after)
    nothing_begun = end.code == 2 and "to resume" in end.said
    if nothing_begun or (end.code == 0 and "finished already" in end.said and is_old(folder, expected)):
        end = zygote.run(folder, *expected.command.begin, after=after)
    assert end.code == 0 or (after and end.code is None), f"code {end.code} after {so_far}: {end.said}"
    return end


def is_old(folder: Path, expected: Whole) -> bool:
    """Whether what was in the place before is still there, as it was."""
    old = contents(expected.start)
    return bool(old) and old.items() <= contents(folder).items()


def phase(folder: Path, expected: Whole) -> str:
    """Where a killed command stood."""
    out, part = folder / "out", folder / "out.part"
    runs = [path.parent for path in out.glob("**/config.yaml")]
    if not (part.exists() or runs):
        return "before its folder was there" if not (out / "manifest.json").exists() else "after the end"
    if not runs:
        return "at the end" if (part / "manifest.json").exists() else "between the shards"
    if not all((folder / name).exists() for name in expected.made if "/checkpoints/" in name):
        return "between the steps"
    return "at the end" if not all((run / "sae/cfg.json").exists() for run in runs) else "after the end"


class TestFileOperations:
    """Killed just before each operation that changes a file, and while each file is half written."""

    SOME: ClassVar = {  # how many of the operations and of the halves are tried without -m slow; None is all
        "train from a cache": (None, 6),
        "train from a cache, resumed": (2, 2),
        "train over a run": (3, 2),
        "train live": (2, 2),
        "train at two hooks": (2, 2),
        "harvest": (3, 3),
        "harvest, resumed": (2, 2),
        "harvest over a cache": (5, 2),
    }

    @pytest.mark.parametrize("name", SOME)
    def test_before_some(self, zygote, whole, tmp_path, name):
        kill_at_operations(zygote, whole(name), tmp_path, *self.SOME[name])

    @pytest.mark.slow
    @pytest.mark.parametrize("name", SOME)
    def test_before_every_one(self, zygote, whole, tmp_path, name):
        kill_at_operations(zygote, whole(name), tmp_path)


def kill_at_operations(
    zygote: Zygotes, expected: Whole, home: Path, operations: int | None = None, halves: int | None = None
) -> None:
    """Kill the command before each operation and at each half, or so many of them; see that it comes to the same."""
    command, start = expected.command, time.perf_counter()

    def try_one(case: tuple[int, bool]) -> bool:
        """Whether the command has so many operations."""
        at, torn = case
        folder = shutil.copytree(expected.start, home / f"{at}-{torn}")
        end = zygote.run(folder, *command.begin, at=at, torn=torn)
        after = f"a kill at operation {at}, {end.last}"
        try:
            if end.code is None:
                check_readable(folder, expected, after)
                go_on(zygote, expected, folder, after)
            assert end.code in (None, 0), end.said
            assert_same(folder, expected.made, after)
        except AssertionError as error:
            lost.append(str(error).splitlines()[0])
        shutil.rmtree(folder)
        return end.code is None

    told, lost = f"\n{expected.name}:", list[str]()
    with ThreadPoolExecutor(AT_ONCE) as threads:
        for torn, count, some in ((False, expected.end.operations, operations), (True, expected.end.halves, halves)):
            assert count > 4
            numbers = range(1, count + 1)
            if some is not None:
                numbers = [1, *random.Random(expected.name).sample(numbers[1:], some - 1)]
            reached = [*threads.map(try_one, [(number, torn) for number in numbers])]
            while some is None and reached[-1]:  # the order and so the number may vary with the writing threads
                reached.append(try_one((len(reached) + 1, torn)))
            told += f" {sum(reached)} of {count} {'half-written files' if torn else 'operations'},"
            assert sum(reached) >= len(numbers) - 2
    print(told, f"{time.perf_counter() - start:.1f} s")
    assert not lost, "\n".join(lost)


def check_readable(folder: Path, expected: Whole, after: str) -> None:
    """A cache that is written over is as it was until the new one is whole beside it."""
    if expected.name == "harvest over a cache" and not (folder / "out.part/manifest.json").exists():
        is_new = expected.made.items() <= contents(folder).items()
        assert is_old(folder, expected) or is_new, f"neither the old nor the new cache is there after {after}"


class TestRandomMoments:
    """Killed from outside, again and again, until one of them comes to its end."""

    def test_twenty(self, zygote, whole, tmp_path):
        kill_at_random(zygote, whole, tmp_path, 5)

    @pytest.mark.slow
    def test_a_hundred(self, zygote, whole, tmp_path):
        kill_at_random(zygote, whole, tmp_path, 25)


def kill_at_random(zygote: Zygotes, whole: Callable[[str], Whole], home: Path, kills: int) -> None:
    """Kill each command so many times, and see that it comes to the same each time it ends."""
    start = time.perf_counter()
    with ThreadPoolExecutor(AT_ONCE) as threads:  # measured as they are killed: several at once
        expected = [*threads.map(whole, NAMES)]
        met = [*threads.map(lambda wanted: harass(zygote, wanted, home / wanted.name, kills), expected)]
    print()
    for wanted, each in zip(expected, met, strict=True):
        print(f"{wanted.name}, killed {each.total()} times: {dict(each)}")
    print(f"{sum(each.total() for each in met)} kills in {time.perf_counter() - start:.1f} s")


def harass(zygote: Zygotes, wanted: Whole, home: Path, kills: int) -> Counter[str]:
    """Kill one command so many times; returns where it stood."""
    chance, met, delays = random.Random(wanted.name), Counter[str](), list[float]()
    home.mkdir()

    def delay() -> float:
        """Uniform over the time that the command takes, and spread over all of it."""
        if not delays:
            delays.extend((part + chance.random()) / kills * wanted.end.seconds for part in range(kills))
            chance.shuffle(delays)
        return delays.pop() if met.total() < kills else 0

    while met.total() < kills:
        so_far: list[str] = []
        folder = shutil.copytree(wanted.start, home / f"after {met.total()}")
        now = zygote.run(folder, *wanted.command.begin, after=delay())
        while now.code is None:
            so_far.append(phase(folder, wanted))
            met[so_far[-1]] += 1
            now = go_on(zygote, wanted, folder, f"kills {', '.join(so_far)}", delay())
        assert now.code == 0, now.said
        assert_same(folder, wanted.made, f"kills {', '.join(so_far)}")
        shutil.rmtree(folder)
    return met
