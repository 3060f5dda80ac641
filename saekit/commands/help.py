"""What ``--help`` shows beside the flags' own words: panels and examples. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.markup import escape

_RUN = ("out", "config", "resume", "overwrite", "device", "trust_remote_code", "quiet")

# by command and title, parameters that stand in a panel of their own, where their settings do not say which
_PANELS: dict[str, dict[str, tuple[str, ...]]] = {
    "cache": {"Run": _RUN},
    "eval": {"Run": (*_RUN, "html", "features_shown")},
    "convert": {
        "With --lossy": ("model", "hook", "dataset", "dataset_config", "cache", "tokens", "trust_remote_code", "device")
    },
}

_EXAMPLES: dict[str, tuple[str, ...]] = {
    "saekit": ("saekit train --out runs/demo", "saekit eval runs/demo", "saekit train --help"),
    "train": (
        "saekit train --variant mutual_choice --width 4096 --k 32 --tokens 2000000 --out runs/demo",
        "saekit train --cache caches/gpt2-6 --k 64 --aux aux_zipf --log tensorboard --out runs/k64",
        "saekit train --k 16,32,64 --seed 0,1 --out runs/grid",
        "saekit train --out runs/k64 --resume",
    ),
    "sweep": ("saekit sweep show runs/grid",),
    "show": ("saekit sweep show runs/grid --html grid.html",),
    "cache": (
        "saekit cache --model gpt2 --hook blocks.6.hook_resid_post --dataset monology/pile-uncopyrighted "
        "--tokens 50000000 --out caches/gpt2-6",
        "saekit cache --out caches/gpt2-6 --resume",
    ),
    "verify": ("saekit cache verify caches/gpt2-6",),
    "repair": ("saekit cache repair caches/gpt2-6",),
    "eval": (
        "saekit eval runs/k32 runs/k64",
        "saekit eval hf://owner/repo/path --tokens 500000",
        "saekit eval --suite dark_matter runs/k32 runs/k64 --figures figures",
    ),
    "convert": (
        "saekit convert runs/k32 saelens/k32 --lossy",
        "saekit convert hf://owner/repo/path here --to dictionary_learning",
    ),
    "info": ("saekit info runs/k32", "saekit info hf://owner/repo/path"),
    "push": ("saekit push runs/k32 owner/repo/layer_6/k32", "saekit push runs/k32 owner/repo --private"),
}


def explain(command: Any) -> Any:
    """Give a command, and those below it, their panels and examples, and let brackets in their texts be seen.

    Args:
        command: as Typer makes it; it is changed in place and returned.
    """
    for each in _below(command):
        name = "saekit" if each is command else each.name
        titles = {parameter: title for title, names in _PANELS.get(name, {}).items() for parameter in names}
        for parameter in each.params:
            parameter.rich_help_panel = titles.get(parameter.name, parameter.rich_help_panel)
            if getattr(parameter, "help", None):
                parameter.help = escape(parameter.help)  # or rich takes [...] for markup
            if parameter.default is False:
                parameter.show_default = False  # a flag that is not given
        panels = dict.fromkeys(parameter.rich_help_panel for parameter in each.params)
        order = [None, *(panel for panel in panels if panel not in (None, "Run")), "Run"]
        each.params.sort(key=lambda parameter: order.index(parameter.rich_help_panel))
        each.help = escape(each.help or "")
        if examples := _EXAMPLES.get(name):
            each.epilog = escape("\n\n".join(["Examples:" if len(examples) > 1 else "Example:", *examples]))
    return command


def _below(command: Any) -> Iterator[Any]:
    yield command
    for each in getattr(command, "commands", {}).values():
        yield from _below(each)
