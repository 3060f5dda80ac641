"""What ``saekit convert --lossy`` writes: the nearest dictionary that a format can hold, and what that costs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from saekit.errors import SaekitError
from saekit.formats.format import UNSUPPORTED
from saekit.sae import SparseAutoencoder

if TYPE_CHECKING:
    from saekit.evals import Evaluator

NEAREST = {  # where there is one
    "token_norm": "plain thresholds",
    "thresholds": "topk at the mean L0",
    "zero_rows": "silent features",
}


def nearest(sae: SparseAutoencoder, reason: str, path: str, evaluator: Evaluator) -> SparseAutoencoder:
    """The nearest dictionary without what a format cannot hold; prints what the change costs.

    Args:
        sae: the dictionary.
        reason: what the format cannot hold, one of ``NEAREST``.
        path: what the user calls it.
        evaluator: opens model, hook and text to set it on (calibration text) and to compare both on (held-out text).

    Raises:
        SaekitError: the evaluator finds no model or text, or they do not fit.
    """
    if reason == "zero_rows":
        silent = sae.W_dec.norm(dim=1) == 0
        print(f"{int(silent.sum())} features whose decoder row is zero are silenced; reconstructions stay")
        return _silenced(sae, silent)
    from saekit.evals import evaluate_activations
    from saekit.trainers.calibration import with_plain_thresholds

    sae = sae.to(evaluator.device)
    if reason == "token_norm":
        near = with_plain_thresholds(sae, lambda: (b.x for b in evaluator.activations(sae, path, "calibration")))
    else:
        near = _top_k(sae, max(1, round(_mean_l0(sae, evaluator, path))))
    rule = f"topk, k = {near.cfg.k}" if near.cfg.k else "plain thresholds"
    for name, each in ((_rule(sae), sae), (rule, near)):
        report = evaluate_activations(each, evaluator.activations(sae, path, "heldout"))
        l0, fvu = report["sparsity"]["l0"], report["reconstruction"]["fvu"]
        print(f"{name + ':':26} FVU {fvu:.4f} at L0 {l0:.1f} on {report['sparsity']['tokens']:,} held-out tokens")
    return near.cpu()


def _rule(sae: SparseAutoencoder) -> str:
    if sae.cfg.affinity_scale != "none":
        return "thresholds by token norm"
    return "thresholds" if sae.threshold is not None else "all that is positive"


@torch.no_grad()
def _mean_l0(sae: SparseAutoencoder, evaluator: Evaluator, path: str) -> float:
    """Active features a token, on calibration text."""
    matches = tokens = 0
    for batch in evaluator.activations(sae, path, "calibration"):
        code = sae.encode_sparse(batch.x)
        matches, tokens = matches + len(code.values), tokens + code.n_tokens
    if not tokens:
        raise SaekitError("no calibration text to measure the L0 on")
    return matches / tokens


def _top_k(sae: SparseAutoencoder, k: int) -> SparseAutoencoder:
    """The same weights with the k largest pre-activations of each token."""
    top_k = SparseAutoencoder(
        replace(sae.cfg, architecture="topk", k=k, affinity_scale="none"), sae.W_dec.dtype, sae.W_dec.device
    )
    top_k.load_state_dict({name: value for name, value in sae.state_dict().items() if name != "threshold"})
    return top_k.eval()


@torch.no_grad()
def _silenced(sae: SparseAutoencoder, silent: torch.Tensor) -> SparseAutoencoder:
    """The same reconstructions, with decoder rows of norm 1 for features that are never active."""
    silenced = SparseAutoencoder(sae.cfg, sae.W_dec.dtype)
    silenced.load_state_dict(sae.state_dict())
    silenced.W_enc[:, silent] = 0
    silenced.b_enc[silent] = 0
    silenced.W_dec[silent, 0] = 1
    return silenced.eval()


def refusal(source: str, to: str, reason: str) -> SaekitError:
    """What to say where a format cannot hold a dictionary."""
    cannot = f"'{source}' has {UNSUPPORTED.get(reason, reason)}, which the format of {to} cannot hold"
    if reason not in NEAREST:
        return SaekitError(f"{cannot}, nor anything near it")
    return SaekitError(f"{cannot}; --lossy writes {NEAREST[reason]} instead and says what that costs")
