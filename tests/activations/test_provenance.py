"""What tells data from other data, also where an older saekit wrote it down."""

from __future__ import annotations

import pytest

from saekit.activations.manifest import first_change


@pytest.mark.parametrize("prepend_bos", [False, True])
def test_provenances_of_before_first_positions_were_left_out(source, prepend_bos):
    now = {**source.provenance("train"), "prepend_bos": prepend_bos}
    old = {key: value for key, value in now.items() if key not in ("skip_first", "dataset_config")}
    old["mask"] = "text positions; BOS and document separators left out"
    assert first_change(old, now) == (None if prepend_bos else "mask"), "the same tokens, where the first was BOS"
    assert first_change(now, now) is None
    assert first_change(old, {**now, "skip_first": 2}) in ("skip_first", "mask")
    for fact, value in (("skip_first", 2), ("dataset_config", "other"), ("max_norm", 10.0), ("column", "body")):
        assert first_change(now, {**now, fact: value}) == fact
