"""``saekit convert`` and ``saekit info``: what a dictionary is, here and in other formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from saekit.commands.flags import among
from saekit.files import check_free, check_writable, expanded
from saekit.formats.registry import FORMATS


def convert(
    source: str = typer.Argument(help="a dictionary or run in any format that is read, or hf://owner/repo/path"),
    target: Path = typer.Argument(help="folder to write"),
    to: str = typer.Option(
        "saelens",
        help=f"{', '.join(FORMATS.writable())}; saekit's own is saelens",
        autocompletion=lambda incomplete: among(*FORMATS.writable())(incomplete),
    ),
    lossy: bool = typer.Option(
        False, help="where the format cannot hold this dictionary: write the nearest one, and print what that costs"
    ),
    model: str | None = typer.Option(None, help="--lossy: the model; by default what the dictionary names"),
    hook: str | None = typer.Option(None, help="--lossy: the hook point; by default what the dictionary names"),
    dataset: str | None = typer.Option(
        None,
        help="--lossy: text to set thresholds or k on, and to compare both on; by default what the dictionary names",
    ),
    dataset_config: str | None = typer.Option(None, help="--lossy: configuration of a dataset that has several"),
    cache: Path | None = typer.Option(None, help="--lossy: activation cache to use instead of a model and text"),
    tokens: int = typer.Option(131_072, min=1024, help="--lossy: tokens to set them on, and to compare both on"),
    overwrite: bool = typer.Option(False, help="replace a dictionary of the same format in the target folder"),
    device: str = typer.Option("auto", help="auto, cpu, cuda, mps"),
    trust_remote_code: bool = typer.Option(False, help="--lossy: let code run that comes with the model"),
) -> None:
    """Write a dictionary in the format of another package.

    Features and reconstructions stay as they are, up to rounding; otherwise it refuses and says what would be lost. Of
    an AutoEncoder of dictionary_learning decoder rows have norm 1, and features come in units of that.
    """
    from saekit.commands.nearest import NEAREST, nearest, refusal
    from saekit.formats.registry import save, writer
    from saekit.loading import load

    target = expanded(target)
    check_free(target, overwrite=overwrite, hint="choose another folder, or pass --overwrite")
    check_writable(target)
    chosen, sae = writer(to), load(source)
    reason = chosen.unsupported(sae)
    if reason is not None:
        if not lossy or reason not in NEAREST:
            raise refusal(source, to, reason)
        from saekit.evals import Evaluator
        from saekit.machine import pick_device

        facts: dict[str, Any] = {"model": model, "hook": hook, "dataset": dataset, "cache": cache, "tokens": tokens}
        facts["dataset_config"] = dataset_config
        evaluator = Evaluator(device=str(pick_device(device)), trust_remote_code=trust_remote_code, **facts)
        sae = nearest(sae, reason, source, evaluator)
    save(sae, target, to, overwrite=overwrite)
    print(f"dictionary: {target}")


def info(
    path: str = typer.Argument(help="a dictionary, hf://owner/repo/path, a run or an activation cache"),
) -> None:
    """Say what a folder holds."""
    from saekit.activations import ActivationCache
    from saekit.activations.manifest import MANIFEST
    from saekit.hub import local_folder
    from saekit.loading import find, load

    if (Path(path) / MANIFEST).is_file():
        cache = ActivationCache.open(path)
        facts: dict[str, Any] = {"cache": path, "tokens": len(cache), "d_in": cache.d_in, "dtype": cache.dtype}
        facts |= {"shards": len(cache.shards), "parts": cache.division.rows.model_dump()}
        facts |= {"held_out": cache.division.told, "provenance": cache.provenance}
    else:
        folder = local_folder(path)
        sae = load(folder if folder.exists() else path)
        facts = {"dictionary": path, "format": find(folder)[0]}
        facts |= {key: value for key, value in vars(sae.cfg).items() if value is not None}
    print(json.dumps(facts, indent=2))
