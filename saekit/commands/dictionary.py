"""``saekit convert`` and ``saekit info``: what a dictionary is, here and in other formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from saekit.errors import SaekitError
from saekit.files import check_free, check_writable

if TYPE_CHECKING:
    from saekit.sae import SparseAutoencoder


def convert(
    source: str = typer.Argument(help="folder of a dictionary or run, or hf://owner/repo/path"),
    target: Path = typer.Argument(help="folder to write"),
    to: str = typer.Option("saelens", help="format: saelens"),
    lossy: bool = typer.Option(False, help="write the nearest dictionary where the format cannot hold this one"),
    model: str | None = typer.Option(None, help="--lossy: the model [what the dictionary names]"),
    hook: str | None = typer.Option(None, help="--lossy: the hook point [what the dictionary names]"),
    dataset: str | None = typer.Option(None, help="--lossy: text to set thresholds on [what the dictionary names]"),
    cache: Path | None = typer.Option(None, help="--lossy: activation cache to set them on instead"),
    tokens: int = typer.Option(131_072, min=1024, help="--lossy: tokens to set them on, and to compare both on"),
    overwrite: bool = typer.Option(False, help="replace a dictionary in the target folder"),
    device: str = typer.Option("auto", help="auto, cpu, cuda, mps"),
    trust_remote_code: bool = typer.Option(False, help="--lossy: let code run that comes with the model"),
) -> None:
    """Write a dictionary in the format of another package."""
    import saekit

    check_free(target, overwrite=overwrite, hint="choose another folder, or pass --overwrite")
    check_writable(target)
    if to != "saelens":
        raise SaekitError(f"unknown format '{to}'; choose from saelens")
    sae = saekit.load(source)
    if sae.cfg.affinity_scale != "none":
        if not lossy:
            raise SaekitError(
                f"the thresholds of '{source}' follow each token's norm, which the format of SAELens cannot hold; "
                f"--lossy writes the nearest plain ones and compares both"
            )
        facts: dict[str, Any] = {"model": model, "hook": hook, "dataset": dataset, "cache": cache, "tokens": tokens}
        facts["trust_remote_code"] = trust_remote_code
        sae = _plain(sae, source, device, **facts)
    sae.save(target, overwrite=overwrite)
    print(f"dictionary: {target}")


def _plain(sae: SparseAutoencoder, path: str, device: str, **facts: Any) -> SparseAutoencoder:
    """The dictionary with plain thresholds; prints what the change costs."""
    from saekit.evals import Judge, evaluate_activations
    from saekit.trainers.calibration import with_plain_thresholds
    from saekit.trainers.trainer import pick_device

    judge = Judge(device=str(pick_device(device)), **facts)
    sae = sae.to(judge.device)
    plain = with_plain_thresholds(sae, lambda: judge.activations(sae, path, "calibration"))
    for name, each in (("thresholds by token norm", sae), ("plain thresholds", plain)):
        report = evaluate_activations(each, judge.activations(sae, path, "heldout"))
        l0, fvu = report["sparsity"]["l0"], report["reconstruction"]["fvu"]
        print(f"{name + ':':26} FVU {fvu:.4f} at L0 {l0:.1f} on {report['sparsity']['tokens']:,} held-out tokens")
    return plain.cpu()


def info(
    path: str = typer.Argument(help="a dictionary, hf://owner/repo/path, a run or an activation cache"),
) -> None:
    """Say what a folder holds."""
    import saekit
    from saekit.activations import ActivationCache
    from saekit.activations.manifest import MANIFEST

    if (Path(path) / MANIFEST).is_file():
        found = ActivationCache.open(path)
        facts: dict[str, Any] = {"cache": path, "tokens": len(found), "d_in": found.d_in, "dtype": found.dtype}
        facts |= {"shards": len(found.shards), "passport": found.passport}
    else:
        sae = saekit.load(path)
        facts = {"dictionary": path, **{k: v for k, v in vars(sae.cfg).items() if v is not None}}
    print(json.dumps(facts, indent=2))
