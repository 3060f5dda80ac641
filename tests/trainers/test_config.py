"""Configs: YAML and flags together, and one line for every mistake."""

from __future__ import annotations

import pytest

from saekit import SaekitError
from saekit.trainers import TrainConfig


def test_flags_win_over_the_file_and_the_result_reads_back(tmp_path):
    (tmp_path / "a.yaml").write_text("k: 8\nwidth: 512\nvariant: topk\n")
    config = TrainConfig.from_yaml(tmp_path / "a.yaml", k=16, lr=None)
    assert (config.k, config.width, config.variant) == (16, 512, "topk")
    assert TrainConfig.from_yaml(tmp_path / "a.yaml", expansion=8.0).width is None
    assert config.out.as_posix() == "runs/topk"
    (tmp_path / "b.yaml").write_text(config.to_yaml())
    assert TrainConfig.from_yaml(tmp_path / "b.yaml") == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"variant": "mutual"}, "unknown variant 'mutual'; did you mean 'mutual_choice'"),
        ({"widht": 512}, "unknown setting 'widht'; did you mean 'width'"),
        ({"k": 0}, r"k = 0: input should be greater than 0"),
        ({"k": "many"}, r"k = 'many'"),
        ({"tokens": -5}, r"tokens = -5"),
        ({"k": 65, "width": 64}, "k = 65 is larger than the width of 64"),
        ({"tokens": 100}, "fewer than one batch"),
        ({"warmup": 0.6, "decay": 0.6}, "overlap"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"dtype": "fp32"}, "dtype = 'fp32'"),
        ({"lr": float("nan")}, "lr = nan"),
        ({"expansion": float("inf")}, "expansion = inf"),
    ],
)
def test_impossible_values_are_named_in_one_line(values, message):
    with pytest.raises(SaekitError, match=message) as caught:
        TrainConfig(**values)
    assert "\n" not in str(caught.value)


def test_the_learning_rate_falls_with_the_root_of_the_steps():
    assert TrainConfig(tokens=4096 * 500).peak_lr == 4e-3
    assert TrainConfig(tokens=4096 * 100_000).peak_lr == pytest.approx(4e-4)
    assert TrainConfig(lr=1e-4).peak_lr == 1e-4


@pytest.mark.parametrize("content", ["- a\n- b\n", "k: [\n", "\x00", "just words"])
def test_files_that_are_no_mapping_are_refused(tmp_path, content):
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(SaekitError, match=r"a.yaml"):
        TrainConfig.from_yaml(tmp_path / "a.yaml")
    with pytest.raises(SaekitError, match="cannot read"):
        TrainConfig.from_yaml(tmp_path / "none.yaml")


def test_yaml_cannot_construct_objects(tmp_path):
    (tmp_path / "a.yaml").write_text("out: !!python/object/apply:os.mkdir ['pwned']\n")
    with pytest.raises(SaekitError, match="not YAML"):
        TrainConfig.from_yaml(tmp_path / "a.yaml")
