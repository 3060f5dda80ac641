"""Every figure against numbers worked out by hand or by plain formulas."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from rich.console import Console

from saekit import SAEConfig, SaekitError, SparseAutoencoder
from saekit.activations import ContextBatch
from saekit.code import SparseCode
from saekit.evals import Report, evaluate, evaluate_activations, table
from saekit.evals.costs import costs
from saekit.evals.downstream import downstream, edited_logits
from saekit.evals.reconstruction import Reconstruction
from saekit.evals.report import WIDTH
from saekit.evals.sparsity import Sparsity


def test_reconstruction_by_hand():
    x = torch.tensor([[1.0, 0], [3.0, 0], [5.0, 4.0]])  # mean (3, 4/3); variance 4 + 16/9 + 0 + 16/9 + 4 + 64/9 = 56/3
    x_hat = torch.tensor([[1.0, 1.0], [3.0, 0], [0, 4.0]])  # errors 1, 0, 25
    figures = Reconstruction(2)
    figures.update(x[:1], x_hat[:1])
    figures.update(x[1:], x_hat[1:])
    found = figures.result()
    assert found["tokens"] == 3
    assert found["fvu"] == pytest.approx(26 / (56 / 3))
    assert found["explained_variance"] == pytest.approx(1 - 26 / (56 / 3))
    assert found["mse"] == pytest.approx(26 / 3)
    assert found["normalized_mse"] == pytest.approx(26 / 51)
    assert found["cosine"] == pytest.approx((1 / math.sqrt(2) + 1 + 4 / math.sqrt(41)) / 3)
    assert found["norm_ratio"] == pytest.approx((math.sqrt(2) + 1 + 4 / math.sqrt(41)) / 3)
    assert figures.mean().tolist() == pytest.approx([3, 4 / 3])


def left_out(x, x_hat, documents, figure):
    """The jackknife by a plain loop: each document left out and all worked out anew."""
    each = [figure(x[documents != d], x_hat[documents != d]) for d in documents.unique()]
    without = torch.stack(each)
    return float(((without - without.mean()).square().sum() * (len(each) - 1) / len(each)).sqrt())


def test_standard_errors_leave_out_each_document(generator):
    documents = torch.randint(0, 12, (700,), generator=generator)
    level = torch.randn(12, 6, dtype=torch.float64, generator=generator)[documents] * 3 + 100  # far from the origin
    x = level + torch.randn(700, 6, dtype=torch.float64, generator=generator)
    x_hat = x + torch.randn(700, 6, dtype=torch.float64, generator=generator) * (1 + documents[:, None] / 6)
    figures = Reconstruction(6)
    for rows in torch.arange(700).split(130):
        figures.update(x[rows], x_hat[rows], documents[rows])
    found = figures.result()
    assert found["documents"] == 12

    def fvu(x, x_hat):
        return (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()

    expected = {
        "fvu": fvu,
        "explained_variance": lambda x, x_hat: 1 - fvu(x, x_hat),
        "mse": lambda x, x_hat: (x - x_hat).square().sum(1).mean(),
        "normalized_mse": lambda x, x_hat: (x - x_hat).square().sum() / x.square().sum(),
        "cosine": lambda x, x_hat: torch.cosine_similarity(x, x_hat, dim=1).mean(),
        "norm_ratio": lambda x, x_hat: (x_hat.norm(dim=1) / x.norm(dim=1)).mean(),
    }
    for name, figure in expected.items():
        assert found[name] == pytest.approx(float(figure(x, x_hat)), rel=1e-9), name
        assert found[f"{name}_se"] == pytest.approx(left_out(x, x_hat, documents, figure), rel=1e-6), name


def test_rows_without_documents_are_documents(generator):
    x, x_hat = torch.randn(2, 50, 3, dtype=torch.float64, generator=generator)
    report = evaluate_activations(identity(3), [x.float()])
    assert report["reconstruction"]["documents"] == report["sparsity"]["documents"] == 50
    figures = Reconstruction(3)
    figures.update(x, x_hat)
    alone = left_out(x, x_hat, torch.arange(50), lambda x, x_hat: (x - x_hat).square().sum(1).mean())
    assert figures.result()["mse_se"] == pytest.approx(alone, rel=1e-9)


def test_one_document_has_no_error(source, contexts):
    batch = ContextBatch(contexts.tokens[:2], torch.zeros_like(contexts.documents[:2]), contexts.kept[:2])
    report = evaluate(identity(256), source.model, batch, hook=source.hook)
    for group, name in (("sparsity", "l0_se"), ("reconstruction", "fvu_se"), ("downstream", "ce_increase_se")):
        assert report[group]["documents"] == 1
        assert report[group][name] is None
    assert "no standard errors: all of the text is one document" in repr(report)


def test_a_constant_bias_counts_as_error():
    x = torch.tensor([[-1.0], [1.0]])
    figures = Reconstruction(1)
    figures.update(x, x + 2)
    assert figures.result()["fvu"] == pytest.approx(4)  # the variance of the residual alone would say 0


def test_one_ratio_at_the_end_not_a_mean_of_ratios():
    figures = Reconstruction(1)
    figures.update(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [1.0]]))  # alone: FVU 1
    figures.update(torch.tensor([[10.0], [20.0]]), torch.tensor([[10.0], [20.0]]))  # alone: FVU 0
    assert figures.result()["fvu"] == pytest.approx(2 / (64 + 36 + 4 + 144))


def test_a_mean_far_from_the_origin_loses_no_precision():
    torch.manual_seed(0)
    noise = torch.randn(1000, 4, dtype=torch.float64)
    x_hat = 0.9 * noise
    near, far = Reconstruction(4), Reconstruction(4)
    for rows in range(0, 1000, 100):
        near.update(noise[rows : rows + 100], x_hat[rows : rows + 100])
        far.update(noise[rows : rows + 100] + 1e7, x_hat[rows : rows + 100] + 1e7)
    assert far.result()["fvu"] == pytest.approx(near.result()["fvu"], rel=1e-6)


def test_sparsity_by_hand():
    figures = Sparsity(4)
    figures.update(SparseCode(torch.tensor([0, 0, 1]), torch.tensor([0, 2, 0]), torch.ones(3), 3, 4))
    figures.update(SparseCode(torch.tensor([0]), torch.tensor([0]), torch.ones(1), 1, 4))
    found = figures.result()
    assert (found["tokens"], found["dead"], found["features"], found["dead_share"]) == (4, 2, 4, 0.5)
    assert found["l0"] == 1.0
    assert found["l0_max"] == 2
    assert found["l0_std"] == pytest.approx(math.sqrt(0.5))
    assert found["density_quantiles"]["1.0"] == 0.75
    assert found["density_mean"] == pytest.approx(0.25)


def identity(d):
    """A dictionary that reconstructs everything: a feature for each direction and its opposite."""
    sae = SparseAutoencoder(SAEConfig(d, 2 * d, "standard"))
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([torch.eye(d), -torch.eye(d)]))
        sae.W_enc.copy_(sae.W_dec.T)
    return sae


def test_underutilised_features_lie_far_below_the_fitted_law():
    generator = torch.Generator().manual_seed(0)
    density = 0.5 * (1 + torch.arange(200) / 5.0) ** -1
    density[[3, 150]] = 1e-5  # one busy rank and one quiet rank made all but silent
    active = (torch.rand(20_000, 200, generator=generator) < density).nonzero()
    figures = Sparsity(200)
    figures.update(SparseCode(active[:, 0], active[:, 1], torch.ones(len(active)), 20_000, 200))
    found = figures.result()
    assert found["underutilised"] == 2
    assert found["underutilised_share"] == 0.01
    assert found["zipf"]["exponent"] == pytest.approx(1, abs=0.1)
    assert found["zipf"]["r2"] > 0.98
    ranked = figures.matches.sort(descending=True).values / 20_000
    by_rank = found["density_by_rank"]
    assert by_rank["rank"][0] == 1
    assert by_rank["rank"][-1] == 200
    assert by_rank["density"] == pytest.approx([float(ranked[r - 1]) for r in by_rank["rank"]])


def test_a_perfect_dictionary_costs_nothing(source, contexts):
    batch = ContextBatch(*(column[:4] for column in contexts))
    report = evaluate(identity(256), source.model, batch, hook=source.hook)
    assert report["reconstruction"]["fvu"] < 1e-10
    assert report["downstream"]["ce_increase"] == pytest.approx(0, abs=1e-5)
    assert report["downstream"]["recovered_share"] == pytest.approx(1, abs=1e-5)
    assert report["downstream"]["kl"] == pytest.approx(0, abs=1e-5)
    assert report["sparsity"]["l0"] == pytest.approx(256, rel=0.01)


def test_downstream_against_plain_hooks(source, contexts):
    """Cross-entropies worked out anew with a hook on the plain Hugging Face model."""
    from transformers import AutoModelForCausalLM

    from saekit.activations.model import model_path

    documents = torch.arange(256) // 90 + 3 * torch.arange(3)[:, None]
    batch = ContextBatch(contexts.tokens[:3], documents, contexts.kept[:3])
    mean = torch.linspace(-1, 1, 256)
    edits = {
        "clean": None,
        "reconstructed": lambda x: 0.7 * x,
        "zero": torch.zeros_like,
        "mean": lambda x: mean.expand_as(x),
    }
    found = downstream(costs(source.model, source.hook, [batch], edits, ["reconstructed"]))
    plain = AutoModelForCausalLM.from_pretrained(
        model_path("embedded"), dtype=torch.float32, attn_implementation="eager"
    )

    def logits(change):
        def hook(module, inputs, output):
            x = output[0] if isinstance(output, tuple) else output
            x = torch.where(batch.kept[..., None], change(x), x)
            return (x, *output[1:]) if isinstance(output, tuple) else x

        handle = plain.model.layers[1].register_forward_hook(hook)
        with torch.no_grad():
            result = plain(batch.tokens).logits.double().log_softmax(-1)
        handle.remove()
        return result

    changes = {
        "ce_clean": lambda x: x,
        "ce_reconstructed": lambda x: 0.7 * x,
        "ce_zero": torch.zeros_like,
        "ce_mean": lambda x: mean.expand_as(x),
    }
    scored = batch.kept[:, :-1]
    log_p = {}
    for name, change in changes.items():
        log_p[name] = logits(change)[:, :-1][scored]
        ce = -log_p[name].gather(1, batch.tokens[:, 1:][scored][:, None]).mean()
        assert found[name] == pytest.approx(float(ce), abs=2e-4), name
    kl = (log_p["ce_clean"].exp() * (log_p["ce_clean"] - log_p["ce_reconstructed"])).sum(-1).mean()
    assert found["kl"] == pytest.approx(float(kl), abs=2e-4)
    assert found["tokens"] == int(scored.sum())
    share = (found["ce_zero"] - found["ce_reconstructed"]) / (found["ce_zero"] - found["ce_clean"])
    assert found["recovered_share"] == pytest.approx(share)
    documents = batch.documents[:, :-1][scored]
    assert found["documents"] == 9
    nats = {n: -p.gather(1, batch.tokens[:, 1:][scored][:, None])[:, 0] for n, p in log_p.items()}
    table = torch.stack([*nats.values()], dim=1)
    increase = left_out(table, table, documents, lambda a, _: (a[:, 1] - a[:, 0]).mean())
    share = left_out(table, table, documents, lambda a, _: 1 - (a[:, 1] - a[:, 0]).sum() / (a[:, 2] - a[:, 0]).sum())
    assert found["ce_increase_se"] == pytest.approx(increase, rel=1e-3)
    assert found["recovered_share_se"] == pytest.approx(share, rel=1e-3)


def test_only_kept_positions_are_replaced(source, contexts):
    batch = ContextBatch(contexts.tokens[:1], contexts.documents[:1], torch.zeros_like(contexts.kept[:1]))
    clean = edited_logits(source.model, source.hook, batch, None)
    assert torch.equal(edited_logits(source.model, source.hook, batch, torch.zeros_like), clean)
    batch.kept[0, 100] = True
    edited = edited_logits(source.model, source.hook, batch, torch.zeros_like)
    assert torch.equal(edited[:, :100], clean[:, :100])
    assert not torch.allclose(edited[:, 100], clean[:, 100])


@pytest.mark.parametrize("start", [0, 1], ids=["BOS", "no BOS"])
def test_plain_tokens_leave_out_the_first_position(source, contexts, start):
    tokens = contexts.tokens[:2, start:]
    assert bool((tokens[:, 0] == source.model.tokenizer.bos_token_id).all()) == (start == 0)
    report = evaluate(identity(256), source.model, tokens, hook=source.hook)
    assert report["sparsity"]["tokens"] == 2 * (tokens.shape[1] - 1)
    assert report["downstream"]["tokens"] == 2 * (tokens.shape[1] - 2)
    kept = torch.zeros_like(tokens, dtype=torch.bool)
    kept[:, [0, 5]] = True  # the first is left out even where it is asked for
    report = evaluate(identity(256), source.model, tokens, hook=source.hook, kept=kept)
    assert report["sparsity"]["tokens"] == 2
    assert bool(kept[:, 0].all())


def test_a_first_position_like_no_other_is_not_scored(source, contexts):
    """An attention sink a thousand times as long as the rest: it moves no figure, nor what it is compared with."""
    tokens = contexts.tokens[:2, 1:]
    sae = identity(256)
    with torch.no_grad():
        sae.W_dec.mul_(0.5)  # an error that depends on the activations

    def sink(x, hook):
        x = x.clone()
        x[:, 0] *= 1000
        return x

    def reconstruction():
        return evaluate(sae, source.model, tokens, hook=source.hook)["reconstruction"]

    plain = reconstruction()
    with source.model.hooks(fwd_hooks=[(source.hook, sink)]):
        assert reconstruction() == plain


def test_what_does_not_fit_is_refused(source, contexts):
    with pytest.raises(SaekitError, match="does not name its hook"):
        evaluate(identity(256), source.model, contexts)
    with pytest.raises(SaekitError, match=r"takes width 8, but 'blocks.1.hook_resid_post' has width 256"):
        evaluate(identity(8), source.model, contexts, hook=source.hook)
    with pytest.raises(SaekitError, match="no hook 'blocks.1.hook_resid_pots'"):
        evaluate(identity(256), source.model, contexts, hook="blocks.1.hook_resid_pots")
    with pytest.raises(SaekitError, match="no activations"):
        evaluate_activations(identity(8), [])


def test_reports_are_written_and_read(tmp_path):
    report = Report({"sparsity": {"tokens": 3, "l0": 1.5}, "downstream": {"recovered_share": float("inf")}}, {"a": 1})
    report.save(tmp_path / "eval.json")
    assert json.loads((tmp_path / "eval.json").read_text())["downstream"]["recovered_share"] is None
    assert json.loads((tmp_path / "eval.json").read_text())["sparsity"] == report["sparsity"]


def shown(reports, width=WIDTH):
    console = Console(width=width, file=io.StringIO())
    console.print(table(reports))
    return console.file.getvalue()


def test_tables_show_standard_errors():
    with_errors = Report(
        {
            "sparsity": {"l0": 31.94, "l0_se": 0.41, "dead": 7, "tokens": 5000, "documents": 204},
            "reconstruction": {"fvu": 0.1234, "fvu_se": 0.0021, "cosine": 0.98, "cosine_se": 0.00001},
        }
    )
    alone = shown({"runs/k32": with_errors})
    assert "± standard error over 204 documents (jackknife)" in alone
    row = next(line for line in alone.splitlines() if "FVU" in line)
    assert [cell.strip() for cell in row.split("│")[1:4]] == ["FVU", "0.1234", "0.0021"]
    assert "1e-05" in alone, "what rounds to nothing is written out"
    assert "0.1234 ± 0.0021" in repr(with_errors)
    several = shown({"runs/k32": with_errors, "runs/k64": with_errors})
    assert several.count("±0.0021") == 2
    old = Report({"sparsity": {"l0": 31.94, "tokens": 5000}, "reconstruction": {"fvu": 0.1234}})
    assert "±" not in shown({"old": old}) + repr(old)
    both = shown({"old": old, "new": with_errors})
    assert both.count("0.1234") == 2
    assert both.count("±0.0021") == 1


def test_a_table_never_squeezes_the_names():
    few = Report({"sparsity": {"l0": 31.94, "tokens": 5000}, "reconstruction": {"fvu": 0.1234}})
    plain = {"fvu_nonlinear": 0.1, "r2": 0.2, "r2_pooled": 0.2}
    norms = {part: {"from_x_with_intercept": 0.5} for part in ("error", "nonlinear")}
    document = {"fvu": 0.1, "plain": plain, "shrinkage": {"r2": 0.3}, "norms": norms}
    cost = {"recovered_linear": 0.1, "recovered_nonlinear": 0.9}
    parts = {"l0": 32.0, "tokens": 20_088, "document": document, "random": {"plain": plain}, "cost": cost}
    for report, in_rows in ((few, True), (Report({"dark_matter": parts}), False)):
        shown = Console(width=WIDTH, file=io.StringIO())
        shown.print(table({"runs/k32": report, "runs/k64": report}))
        lines = shown.file.getvalue().splitlines()
        assert sum("runs/k32" in line for line in lines) == sum("runs/k64" in line for line in lines) == 1
        assert any("runs/k32" in line and "runs/k64" in line for line in lines) is not in_rows
