"""``saekit convert`` and ``saekit info``: what a dictionary is, here and in other formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from saekit.commands.help import among
from saekit.errors import SaekitError, did_you_mean
from saekit.files import check_free, check_writable, expanded


def convert(
    source: str = typer.Argument(help="a dictionary or run in any format that is read, or hf://owner/repo/path"),
    target: Path = typer.Argument(help="folder to write"),
    to: str = typer.Option(
        "saelens",
        help="saelens (saekit's own too), dictionary_learning or sparsify",
        autocompletion=among("saelens", "dictionary_learning", "sparsify"),
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
    import saekit
    from saekit.commands.nearest import NEAREST, nearest, refusal
    from saekit.formats import WRITABLE

    target = expanded(target)
    check_free(target, overwrite=overwrite, hint="choose another folder, or pass --overwrite")
    check_writable(target)
    if to not in WRITABLE:
        raise SaekitError(f"unknown format '{to}'{did_you_mean(to, WRITABLE)}")
    writer, sae = WRITABLE[to], saekit.load(source)
    lack = writer.lacks(sae)
    if lack is not None:
        if not lossy or lack not in NEAREST:
            raise refusal(source, to, lack)
        from saekit.evals import Evaluator
        from saekit.machine import pick_device

        facts: dict[str, Any] = {"model": model, "hook": hook, "dataset": dataset, "cache": cache, "tokens": tokens}
        facts["dataset_config"] = dataset_config
        evaluator = Evaluator(device=str(pick_device(device)), trust_remote_code=trust_remote_code, **facts)
        sae = nearest(sae, lack, source, evaluator)
    writer.write(sae, target, overwrite=overwrite)
    print(f"dictionary: {target}")


def info(
    path: str = typer.Argument(help="a dictionary, hf://owner/repo/path, a run or an activation cache"),
) -> None:
    """Say what a folder holds."""
    import saekit
    from saekit.activations import ActivationCache
    from saekit.activations.manifest import MANIFEST
    from saekit.formats import format_of
    from saekit.hub import local_folder

    if (Path(path) / MANIFEST).is_file():
        found = ActivationCache.open(path)
        facts: dict[str, Any] = {"cache": path, "tokens": len(found), "d_in": found.d_in, "dtype": found.dtype}
        facts |= {"shards": len(found.shards), "parts": found.division.rows.model_dump()}
        facts |= {"held_out": found.division.told, "provenance": found.provenance}
    else:
        folder = local_folder(path)
        sae = saekit.load(folder if folder.exists() else path)
        facts = {"dictionary": path, "format": format_of(folder)[0]}
        facts |= {key: value for key, value in vars(sae.cfg).items() if value is not None}
    print(json.dumps(facts, indent=2))
