"""Predictions in pieces are those of the model at once, and their memory is bounded."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.nn.functional import cross_entropy

from saekit.activations import unembedding
from saekit.activations.gradients import with_gradients
from saekit.activations.harvesting import harvest_hooks
from saekit.activations.model import load_model
from saekit.activations.unembedding import Unembedding
from saekit.evals.costs import costs

HOOK = "blocks.0.hook_resid_post"


def save(folder, kind: str):
    """A tiny random model with the embedded one's tokenizer."""
    import transformers

    from saekit.activations.model import model_path

    sizes = dict(vocab_size=4096, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    config = getattr(transformers, f"{kind}Config")
    torch.manual_seed(0)
    options = dict(final_logit_softcapping=0.5, head_dim=8) if kind == "Gemma2" else {}
    if kind == "Granite":
        options = dict(logits_scaling=3.0)
    config = config(**sizes, num_key_value_heads=2, initializer_range=0.5, **options)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast.from_pretrained(model_path("embedded")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["Llama", "Gemma2", "Granite"])
def model(request, tmp_path_factory):
    return load_model(str(save(tmp_path_factory.mktemp(request.param), request.param)), device="cpu")


@pytest.fixture(params=["whole batches", "pieces"])
def cut(request, monkeypatch):
    if request.param == "pieces":
        monkeypatch.setattr(unembedding, "_PASS", 3 * 4 * 16 * 256)  # three contexts of rows, or one of logits
        monkeypatch.setattr(unembedding, "_PIECE", 7 * 4 * 4096)


def plain(model, batch, change):
    """Log-probabilities [m, v] in float64 at the scored positions, by a hook of the test's own."""

    def hook(x, hook):
        return torch.where(batch.kept[..., None], change(x), x)

    with torch.no_grad(), model.hooks(fwd_hooks=[(HOOK, hook)]):
        logits = model(batch.tokens, return_type="logits")
    return logits[:, :-1][batch.kept[:, :-1]].double().log_softmax(-1)


def test_which_models_end_in_their_unembedding(tmp_path):
    for kind, whole, linear in (("Llama", False, True), ("Gemma2", False, False), ("Granite", True, False)):
        found = load_model(str(save(tmp_path / kind, kind)), device="cpu")
        assert Unembedding.of(found, HOOK).whole is whole, kind
        assert Unembedding.of(found, HOOK).linear is linear, kind
        for hook in ("unembed.hook_in", "unembed.hook_out"):
            assert Unembedding.of(found, hook).whole, "what is changed there is seen in all logits alone"


def test_costs_against_plain_log_probabilities(model, contexts, cut):
    batch = contexts.rows(0, 5)
    edits = {"clean": None, "half": lambda x: x / 2, "zero": torch.zeros_like}
    found = costs(model, HOOK, [batch], edits, ["half"])
    expected = {name: plain(model, batch, edit or (lambda x: x)) for name, edit in edits.items()}
    targets = batch.tokens[:, 1:][batch.kept[:, :-1]]
    for name, log_p in expected.items():
        assert found.ce[name] == pytest.approx(-float(log_p.gather(1, targets[:, None]).mean()), abs=1e-5)
    kl = (expected["clean"].exp() * (expected["clean"] - expected["half"])).sum(1).mean()
    means = found.means(found.sums.total())
    assert float(means["kl_half"]) == pytest.approx(float(kl), abs=1e-5, rel=1e-5)
    assert found.tokens == len(targets)
    documents = batch.documents[:, :-1][batch.kept[:, :-1]]
    assert found.sums.documents == len(set(documents.tolist()))


def test_rounded_logits_are_compared_as_they_are(tmp_path):
    """By the slope alone their rounding would stand in the divergence."""
    found = load_model(str(save(tmp_path / "Llama", "Llama")), device="cpu", dtype="bfloat16")
    assert not Unembedding.of(found, HOOK).linear


def test_losses_against_plain_cross_entropy(model, contexts, cut):
    batch = contexts.rows(0, 5)
    (found,) = harvest_hooks(model, [HOOK], [batch], losses=True)
    with torch.no_grad():
        logits = model(batch.tokens, return_type="logits").double()
    nats = torch.full(batch.tokens.shape, torch.nan, dtype=torch.float64)
    nats[:, :-1] = cross_entropy(logits[:, :-1].transpose(1, 2), batch.tokens[:, 1:], reduction="none")
    # each layer adds up d_model products, the loss d_vocab exponentials, each rounded by 2⁻²⁴ of what is added up
    bound = 2**-24 * (model.cfg.n_layers * model.cfg.d_model * float(logits.abs().max()) + model.cfg.d_vocab)
    assert bound < 0.1 * float(nats[:, :-1].std())
    torch.testing.assert_close(found.losses.double(), nats[batch.kept], rtol=0, atol=bound, equal_nan=True)


def test_gradients_against_plain_autograd(model, contexts, cut):
    tokens = contexts.tokens[:5]
    x, gradient = with_gradients(model, HOOK)(tokens)
    kept = []

    def leaf(activation, hook):
        kept.append(activation.detach().requires_grad_(True))
        return kept[-1]

    with torch.enable_grad(), model.hooks(fwd_hooks=[(HOOK, leaf)]):
        logits = model(tokens, return_type="logits")[:, :-1]
        cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
    torch.testing.assert_close(x, kept[0].detach(), rtol=0, atol=1e-4 * float(x.abs().max()))
    size = float(kept[0].grad.abs().max())
    torch.testing.assert_close(gradient, kept[0].grad, rtol=0, atol=1e-4 * size)


def test_sampled_labels_do_not_depend_on_the_pieces(model, contexts, monkeypatch):
    tokens = contexts.tokens[:5]
    _, once = with_gradients(model, HOOK, "sampled", seed=1)(tokens)
    _, true = with_gradients(model, HOOK)(tokens)
    monkeypatch.setattr(unembedding, "_PASS", 3 * 4 * 16 * 256)
    monkeypatch.setattr(unembedding, "_PIECE", 7 * 4 * 4096)
    _, again = with_gradients(model, HOOK, "sampled", seed=1)(tokens)
    near = ((again - once).flatten(2).norm(dim=2) < 1e-3 * once.norm(dim=2).mean()).float().mean()
    assert near > 0.5, "a label that rounding turns changes the positions before it in its context"
    assert not torch.allclose(true, once, rtol=0.1)


def test_labels_are_drawn_from_the_predictions():
    from saekit.activations.gradients import _sampled

    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]]).expand(40_000, 4)
    drawn = _sampled(logits, torch.rand(40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    share = torch.bincount(drawn, minlength=4) / 40_000
    torch.testing.assert_close(share, logits[0].softmax(0), rtol=0, atol=0.01)  # four standard errors
    assert _sampled(logits[:2], torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist() == [0, 3]


MEMORY = """
import resource, sys
from pathlib import Path
import torch
from saekit import SAEConfig, SparseAutoencoder
from saekit.activations import ContextBatch, load_model, unembedding
from saekit.activations.gradients import with_gradients
from saekit.activations.harvesting import harvest_hooks
from saekit.evals import evaluate

def most():
    status = Path("/proc/self/status")
    if status.exists():  # what the system says of usage begins with that of the process which started this one
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
folder, hook, whole = sys.argv[1], sys.argv[2], sys.argv[3] == "whole"
if whole:
    unembedding._is_the_end = lambda model: False
model = load_model(folder, device="cpu")
sae = SparseAutoencoder(SAEConfig(16, 32, "topk", k=4, metadata={"hook_name": hook, "saekit": {"beta": 1.0}}))
def batch(contexts, length=256):
    tokens = torch.randint(0, 4096, (contexts, length), generator=torch.Generator().manual_seed(0))
    documents = torch.arange(contexts)[:, None].expand_as(tokens)
    kept = torch.arange(length).expand_as(tokens) > 0
    return ContextBatch(tokens, documents, kept)
evaluate(sae, model, batch(2, 4))
statm = Path("/proc/self/statm")
before = int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else most()
if whole:
    evaluate(sae, model, batch(2), batch=2)
else:
    sae.with_metadata(saekit={})
    evaluate(sae, model, batch(5))
    for found in harvest_hooks(model, [hook], [batch(2)], losses=True):
        assert found.losses.shape == (2 * 255,)
    with_gradients(model, hook, "sampled")(batch(2).tokens)
print(most() - before)
"""


@pytest.mark.parametrize("how", ["split", "whole"])
def test_memory_with_a_vocabulary_of_256_000(how, tmp_path):
    """Under 1 GiB beyond the model, where the logits of five contexts alone have more, each time they are made."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from saekit.activations.model import model_path

    config = LlamaConfig(
        vocab_size=256_000, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(model_path("embedded")).save_pretrained(tmp_path)
    command = [sys.executable, "-c", MEMORY, str(tmp_path), HOOK, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    used = int(done.stdout.split()[-1])
    assert 2**26 < used < 2**30, f"{used / 2**20:,.0f} MiB"
