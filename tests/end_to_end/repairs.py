"""What a repair must do, whatever the text of a cache is."""

from __future__ import annotations

from pathlib import Path

from saekit.activations import ActivationCache


def assert_repaired(saekit_main, cache: Path) -> None:
    """A shard that is deleted is harvested anew, to the same bytes."""
    shard = cache / ActivationCache.open(cache).shards[0]["file"]
    before = shard.read_bytes()
    shard.unlink()
    assert saekit_main("cache", "repair", cache, "--quiet").returncode == 0
    assert shard.read_bytes() == before
