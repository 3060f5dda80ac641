"""What is given twice is refused: of an option, a key of YAML or a key of JSON, one value would be lost silently."""

from __future__ import annotations

import pytest
from test_help import COMMANDS

from saekit import SaekitError
from saekit.reading import parse_json, read_yaml


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "--k", 8, "--k", 16], "--k is given 2 times (--k 8, --k 16)"),
        (["train", "--width=8", "--k", 8, "--width", 16], "--width is given 2 times (--width=8, --width 16)"),
        (["train", "--k", 8, "--k", 8, "--k", 8], "--k is given 3 times (--k 8, --k 8, --k 8)"),
        (["cache", "--streaming", "--no-streaming"], "--streaming is given 2 times (--streaming, --no-streaming)"),
        (["cache", "verify", "x", "--quiet", "--quiet"], "--quiet is given 2 times (--quiet, --quiet)"),
        (["eval", "x", "--tokens", 3000, "--tokens", 4], "--tokens is given 2 times (--tokens 3000, --tokens 4)"),
        (["convert", "a", "b", "--to", "sparsify", "--to", "saelens"], "--to is given 2 times"),
        (["push", "a", "b/c", "--message", "x", "--message", "y"], "--message is given 2 times"),
    ],
)
def test_an_option_given_twice_is_refused_by_name_with_its_values(saekit_main, arguments, told):
    done = saekit_main(*arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert "give it once" in done.stderr
    assert done.stderr.count("\n") == 1


def test_every_option_of_every_command_that_takes_one_value_is_refused_twice(saekit_main):
    """But those that may be given again."""
    again = []
    for words, command in COMMANDS.items():
        for option in command.params:
            if option.param_type_name != "option" or option.is_eager:
                continue
            if option.multiple:
                again.append(option.opts[0])
                continue
            given = [option.opts[0]] if option.is_flag else [option.opts[0], "1"]
            done = saekit_main(*words.split(), *given, *given)
            assert f"{option.opts[0]} is given 2 times" in done.stderr, (words, option.opts, done.stderr)
    assert sorted(again) == ["--dataset", "--dataset", "--dataset", "--earlier", "--hook", "--log"]


@pytest.mark.parametrize(
    ("text", "key"), [("k: 8\nk: 16\n", "'k'"), ("a: {b: 1, b: 2}", "'b'"), ("1: 2\n'1': 3", "'1'")]
)
def test_a_key_of_yaml_that_stands_there_twice(tmp_path, text, key):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(SaekitError, match=f"the key {key} stands there twice"):
        read_yaml(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("k: 8\nw: {k: 16}\n")
    assert read_yaml(tmp_path / "x.yaml") == {"k": 8, "w": {"k": 16}}


def test_a_key_of_json_that_stands_there_twice():
    with pytest.raises(SaekitError, match="the key 'k' stands there twice"):
        parse_json('{"a": {"k": 8, "k": 16}}', "x")
    assert parse_json('{"k": {"k": NaN}}', "x") == {"k": {"k": None}}
