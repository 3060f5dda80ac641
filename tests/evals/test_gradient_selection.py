"""Selection by gradients at evaluation time against a plain dense computation."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from saekit import SAEConfig, SaekitError, SparseAutoencoder
from saekit.activations import ContextBatch, harvest
from saekit.evals import evaluate
from saekit.evals.costs import costs
from saekit.evals.gradient_selection import gradient_selection

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def few(contexts):
    return ContextBatch(*(column[:4] for column in contexts))


@pytest.fixture(scope="module")
def sae(source, few):
    """Directions of the activations themselves: crude, but better than nothing."""
    (found,) = harvest(source.model, HOOK, [few])
    torch.manual_seed(0)
    dictionary = SparseAutoencoder(SAEConfig(256, 512, "topk", k=16, metadata={"hook_name": HOOK}))
    with torch.no_grad():
        rows = found.x[torch.randperm(len(found.x))[:512]] - found.x.mean(0)
        dictionary.W_dec.copy_(torch.nn.functional.normalize(rows, dim=1))
        dictionary.W_enc.copy_(dictionary.W_dec.T / 4)
        dictionary.b_dec.copy_(found.x.mean(0))
    return dictionary


def test_true_labels_by_hand(source, few, sae):
    clean = costs(source.model, HOOK, [few], {"clean": None})
    figures = gradient_selection(sae, source.model, HOOK, lambda: [few], 2.0, clean)
    (found,) = harvest(source.model, HOOK, [few], gradients=True)
    with torch.no_grad():
        pre = sae.pre_activations(found.x)
        influence = (found.gradients @ sae.W_dec.T).abs()
        score = torch.relu(pre) * (1 + 2.0 * influence / influence.square().mean().sqrt())
        kept = torch.zeros_like(pre).scatter(1, score.topk(16, dim=1).indices, 1)
        x_hat = (torch.relu(pre) * kept) @ sae.W_dec + sae.b_dec
    fvu = float((found.x - x_hat).square().sum() / (found.x - found.x.mean(0)).square().sum())
    assert figures["fvu_true_labels_leaking"] == pytest.approx(fvu, rel=1e-4)

    def splice(x, hook):
        x = x.clone()
        x[few.kept] = x_hat
        return x

    with source.model.hooks(fwd_hooks=[(HOOK, splice)]), torch.no_grad():
        logits = source.model(few.tokens, return_type="logits")
    scored = few.kept[:, :-1]
    nats = float(cross_entropy(logits[:, :-1][scored], few.tokens[:, 1:][scored]))
    assert figures["ce_reconstructed_true_labels_leaking"] == pytest.approx(nats, rel=1e-4)
    assert figures["ce_increase_true_labels_leaking"] == pytest.approx(nats - clean.ce["clean"], rel=1e-3)
    assert figures["fvu_sampled"] != figures["fvu_true_labels_leaking"]


def test_without_weight_both_are_plain_topk(source, few, sae):
    report = evaluate(sae, source.model, few)
    assert "gradient_selection" not in report.groups, "plain TopK never saw gradients"
    sae.with_metadata(saekit={"beta": 0.0})
    calls = []
    report = evaluate(sae, source.model, few, on_batch=calls.append)
    sae.with_metadata(saekit={})
    found, plain = report["gradient_selection"], report["downstream"]["ce_reconstructed"]
    assert found["ce_reconstructed_sampled"] == pytest.approx(plain, rel=1e-5)
    assert found["ce_reconstructed_true_labels_leaking"] == pytest.approx(plain, rel=1e-5)
    assert sum(calls) == 4 * 5


def test_only_topk_dictionaries_can_be_selected_so(source, few):
    other = SparseAutoencoder(SAEConfig(256, 512, "jumprelu"))
    with pytest.raises(SaekitError, match="for topk dictionaries, not for jumprelu"):
        gradient_selection(
            other, source.model, HOOK, lambda: [few], 1.0, costs(source.model, HOOK, [few], {"clean": None})
        )


def test_the_influence_is_scaled_over_sixteen_contexts(source, contexts, sae):
    """Of whatever size the passes are by which the other figures are found."""
    some = contexts.rows(0, 18)
    clean = costs(source.model, HOOK, some.split(16), {"clean": None})
    expected = gradient_selection(sae, source.model, HOOK, lambda: some.split(16), 2.0, clean)
    sae.with_metadata(saekit={"beta": 2.0})
    found = evaluate(sae, source.model, some)["gradient_selection"]
    sae.with_metadata(saekit={})
    for name in ("fvu_sampled", "ce_reconstructed_true_labels_leaking"):
        assert found[name] == pytest.approx(expected[name], rel=1e-9)
