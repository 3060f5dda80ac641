"""Training steps against a plain dense trainer in float64 that shares no code with them."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from saekit import SAEConfig, SparseAutoencoder
from saekit.activations import ActivationCache
from saekit.trainers import TrainConfig, train
from saekit.trainers.auxiliary_losses import AUXILIARY
from saekit.trainers.calibration import global_threshold
from saekit.trainers.checkpoint import load_checkpoints
from saekit.trainers.data import training_data
from saekit.trainers.geometric_median import geometric_median
from saekit.trainers.lanes import SAMPLE
from saekit.trainers.optimizer import DictionaryAdam, learning_rate
from saekit.trainers.trainer import Trainer

# Losses and gradients of a step are sums of up to 256 products, each rounded by 2⁻⁵³ at most: 3e-14 a step, 6e-12 in
# 200 steps if all fall one way. What is left of this is for the growth of what was rounded before; a fault is far more.
ROUNDING = 1e-9


def config(source, tmp_path, **changes):
    base = {"cache": source, "out": tmp_path / "run", "width": 64, "k": 4, "batch_size": 128, "tokens": 128 * 50}
    return TrainConfig(**{**base, "buffer": 1024, "lr": 3e-3, "device": "cpu", "log_every": 5, **changes})


def start(cfg):
    data = training_data(cfg, torch.device("cpu"))
    stream = data.stream(cfg, None)
    trainer = Trainer(cfg, data, stream.peek(SAMPLE), torch.device("cpu"))
    width = trainer.d_in
    rows = list(itertools.islice(stream, cfg.steps))
    stream.close()
    return trainer, [(trainer.units(r[:, :width]), r[:, width:] if data.gradients else None) for r in rows]


def in_float64(trainer, batches):
    """Where no two matches are so near that sums in another order could swap them, and leave another way to go."""
    trainer.sae.double()
    trainer.optimizer = DictionaryAdam(trainer.sae, trainer.config.clip)
    return trainer, [tuple(None if part is None else part.double() for part in batch) for batch in batches]


def steps(trainer, batches):
    """Take a step on each batch; returns the losses."""
    losses = []
    for x, g in batches:
        losses.append(trainer.train_step(x, g)["loss"])
        trainer.step += 1
    return losses


def chosen_densely(pre, x, b_dec, W_dec, gradients, cfg, budgets):
    """0/1 matches by definition; budgets are of feature choice, once they are frozen."""
    score = pre.clone()
    if cfg.variant == "gradient_topk":
        influence = (gradients @ W_dec.T).abs()
        score = torch.relu(pre) * (1 + cfg.beta * influence / influence.pow(2).mean().sqrt())
    if cfg.variant in ("topk", "gradient_topk"):
        return torch.zeros_like(pre).scatter(1, score.topk(cfg.k, dim=1).indices, 1)
    if cfg.affinity_scale == "token_norm":
        score = score / (x - b_dec).norm(dim=1, keepdim=True)
    if budgets is None:
        return (score >= score.flatten().topk(cfg.k * len(x)).values[-1]).to(pre.dtype)
    order = score.argsort(dim=0, descending=True).argsort(dim=0)
    return (order < budgets).to(pre.dtype)


def pool_of(statistics, cfg):
    """Features of the auxiliary loss, or None where there is none."""
    return AUXILIARY[cfg.aux].pool(statistics, cfg.aux_settings, cfg.dead_after) if cfg.aux != "none" else None


def dense_loss(parameters, x, gradients, cfg, budgets, pool):
    """Reconstruction and auxiliary loss by dense autograd."""
    W_enc, b_enc, W_dec, b_dec = parameters
    pre = (x - b_dec) @ W_enc + b_enc
    with torch.no_grad():
        chosen = chosen_densely(pre, x, b_dec, W_dec, gradients, cfg, budgets)
    x_hat = (torch.relu(pre) * chosen) @ W_dec + b_dec
    loss = (x - x_hat).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    if pool is not None and pool.any():
        error = (x - x_hat).detach()
        masked = torch.where(pool, pre, -torch.inf)
        some = masked.topk(min(cfg.k_aux, int(pool.sum())), dim=1).indices
        part = torch.relu(pre) * torch.zeros_like(pre).scatter(1, some, 1)
        loss = loss + cfg.aux_alpha * (error - part @ W_dec).pow(2).sum() / (error - error.mean(0)).pow(2).sum()
    return loss


def dense_training(trainer, batches, cfg):
    """Loss by loss: dense autograd, Adam and projection written out; all in float64.

    Which features are dead and what budgets are frozen comes from the trainer; its own tests check those.
    """
    sae = copy.deepcopy(trainer.sae)
    W_enc, W_dec, b_enc, b_dec = (p.detach().clone() for p in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec))
    parameters = [W_enc, b_enc, W_dec, b_dec]
    first = [torch.zeros_like(p) for p in parameters]
    second = [torch.zeros_like(p) for p in parameters]
    found, losses = [], []
    for step, (x, g) in enumerate(batches):
        pool = pool_of(trainer.statistics, cfg)
        found += steps(trainer, [(x, g)])
        budgets = getattr(trainer.variant, "budgets", None)
        for p in parameters:
            p.requires_grad_(True)
        loss = dense_loss(parameters, x, g, cfg, budgets, pool)
        grads = list(torch.autograd.grad(loss, parameters))
        losses.append(loss.item())
        for p in parameters:
            p.requires_grad_(False)
        grads[2] = grads[2] - (grads[2] * W_dec).sum(1, keepdim=True) * W_dec
        norm = torch.cat([g.flatten() for g in grads]).norm()
        lr = learning_rate(step, cfg.steps, cfg.lr, cfg.warmup, cfg.decay)
        scale = torch.tensor(max(1.0, float(norm) / cfg.clip)).double()  # of float32, as torch's Adam takes it
        for p, g, m, v in zip(parameters, grads, first, second, strict=True):
            g = g / scale
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            p -= lr * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        W_dec /= W_dec.norm(dim=1, keepdim=True)
    return found, losses


ARMS = [
    {"variant": "topk"},
    {"variant": "topk", "aux": "aux_k", "dead_after": 130, "k_aux": 3},
    {"variant": "topk", "aux": "aux_zipf", "dead_after": 130, "tau": 0.5},
    {"variant": "mutual_choice"},
    {"variant": "mutual_choice", "affinity_scale": "none", "aux": "aux_zipf", "dead_after": 130},
    {"variant": "feature_choice", "feature_choice_fraction": 0.5, "aux": "aux_k", "dead_after": 130},
    {"variant": "feature_choice", "feature_choice_fraction": 1.0, "budgets": "uniform", "affinity_scale": "none"},
    {"variant": "gradient_topk", "beta": 2.0},
]


PRECISIONS = pytest.mark.parametrize("precision", ["fp32", "bf16_select"])


@PRECISIONS
@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: "-".join(map(str, arm.values())))
def test_the_sparse_step_learns_what_dense_autograd_learns(cache, tmp_path, arm, precision):
    trainer, batches = in_float64(*start(config(cache, tmp_path, clip=0.05, precision=precision, **arm)))
    found, expected = dense_training(trainer, batches, trainer.config)
    assert found[-1] < 0.8 * found[0]
    assert found == pytest.approx(expected, rel=ROUNDING)
    torch.testing.assert_close(trainer.sae.W_dec.norm(dim=1), torch.ones(64, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@PRECISIONS
@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: "-".join(map(str, arm.values())))
def test_sparse_gradients_equal_dense_autograd(cache, tmp_path, arm, precision, dtype, monkeypatch):
    trainer, batches = in_float64(*start(config(cache, tmp_path, tokens=128 * 10, precision=precision, **arm)))
    steps(trainer, batches[:9])  # to the same state everywhere, up to 2⁻⁵³, in which no two matches nearly tie
    trainer.sae.to(dtype)
    trainer.statistics.since_fired[::5] = 10_000  # some count as dead, whether they fire or not
    taken = []
    monkeypatch.setattr(
        DictionaryAdam, "step", lambda self, lr: taken.extend(p.grad.clone() for p in self.sae.parameters()) or 0.0
    )
    x, g = (None if part is None else part.to(dtype) for part in batches[9])
    cfg = trainer.config
    pool = pool_of(trainer.statistics, cfg)
    assert pool is None or pool.any(), "the auxiliary loss has something to do"
    trainer.train_step(x, g)
    sae = trainer.sae
    parameters = [p.detach().double().requires_grad_(True) for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)]
    budgets = getattr(trainer.variant, "budgets", None)
    loss = dense_loss(parameters, x.double(), None if g is None else g.double(), cfg, budgets, pool)
    names = [name for name, _ in sae.named_parameters()]
    for name, expected in zip(("W_enc", "b_enc", "W_dec", "b_dec"), torch.autograd.grad(loss, parameters), strict=True):
        error = (taken[names.index(name)].double() - expected).abs().max() / expected.abs().max()
        # sums over 128 tokens, 12 dimensions and 4 matches: so many roundings, were they all to fall one way
        assert float(error) < (128 + 12 + 4) * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("variant", ["topk", "mutual_choice"])
def test_two_hundred_steps_on_the_language_model(lm_activations, tmp_path, variant):
    found = {}
    for precision in ("fp32", "bf16_select"):
        cfg = config(lm_activations, tmp_path, variant=variant, width=1024, k=16, batch_size=256, tokens=256 * 200)
        cfg = cfg.replace(precision=precision, lr=3e-4, buffer=50_000)
        trainer, batches = in_float64(*start(cfg))
        if precision == "fp32":
            found[precision], expected = dense_training(trainer, batches, trainer.config)
        else:
            found[precision] = steps(trainer, batches)
        assert found[precision] == pytest.approx(expected, rel=ROUNDING)


def test_the_start(cache, tmp_path):
    cfg = config(cache, tmp_path)
    trainer, batches = start(cfg)
    sae = trainer.sae
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    x = torch.cat([x for x, _ in batches[:40]])
    assert float(x.norm(dim=1).mean()) == pytest.approx(12**0.5, rel=0.02)
    assert torch.equal(sae.b_enc, torch.zeros(64))


def test_the_geometric_median_has_the_least_mean_distance(generator):
    x = torch.randn(500, 3, generator=generator, dtype=torch.float64)
    x[:20] += 1e4  # outliers that would move the mean by 400
    found = geometric_median(x)
    best = float((x - found).norm(dim=1).mean())
    for _ in range(50):
        other = found + 1e-3 * torch.randn(3, generator=generator, dtype=torch.float64)
        assert float((x - other).norm(dim=1).mean()) >= best
    assert found.norm() < 1


def test_the_learning_rate_rises_and_falls():
    rates = [learning_rate(s, 1000, 2.0, warmup=0.1, decay=0.2) for s in range(1000)]
    assert rates[0] == pytest.approx(0.02)
    assert rates[99] == rates[500] == rates[799] == 2.0
    assert rates[900] == pytest.approx(1.0)
    assert rates[999] == pytest.approx(0.01)
    assert learning_rate(0, 10, 1.0, 0, 0) == 1.0


@torch.no_grad()
def decided(sae, x):
    """Pairs [n, F] that lie farther from their threshold than another order of sums, or other units, can move them.

    A sum of d + 2 numbers is off by at most (d + 2)·2⁻²⁴ of ‖x − b‖·‖w‖; two are compared, and raw activations, which
    are four times as long, are where one of them begins.
    """
    norms = (x - sae.b_dec).norm(dim=1, keepdim=True)
    bound = 4 * 2 * (sae.cfg.d_in + 2) * 2**-24 * norms * sae.W_enc.norm(dim=0)
    return (sae.pre_activations(x) - sae.threshold * norms).abs() > bound


def test_the_scale_is_folded_into_the_dictionary(cache, tmp_path):
    run = train(config(cache, tmp_path), quiet=True)
    raw = ActivationCache.open(cache).read(0, 500).x
    scale = run.sae.cfg.metadata["saekit"]["activation_scale"]
    state = load_checkpoints([tmp_path / "run/checkpoints"], torch.device("cpu"))[1][0]
    assert float(state["scale"]) == scale
    trained, x = copy.deepcopy(run.sae), (raw - state["centre"]) * scale
    trained.load_state_dict({**state["sae"], "threshold": run.sae.threshold})  # in units of the token's norm
    sure = decided(trained, x)
    assert torch.equal((run.sae.encode(raw) > 0)[sure], (trained.encode(x) > 0)[sure])
    sure = sure.all(1)
    assert sure.float().mean() > 0.99
    x_hat = (run.sae(raw) - state["centre"]) * scale
    torch.testing.assert_close(x_hat[sure], trained(x)[sure], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run.sae.W_dec.norm(dim=1), torch.ones(64))


@pytest.mark.parametrize("variant", ["topk", "mutual_choice"])
def test_a_run_is_the_same_for_a_seed_and_another_for_another(cache, tmp_path, variant):
    runs = [
        train(config(cache, tmp_path, variant=variant, out=tmp_path / str(i), seed=seed), quiet=True).sae
        for i, seed in enumerate((5, 5, 6))
    ]
    weights = [sae.W_dec for sae in runs]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_calibrated_threshold_gives_k_matches_a_token(cache, tmp_path):
    run = train(config(cache, tmp_path, variant="mutual_choice"), quiet=True)
    calibration = torch.cat([b.x for b in ActivationCache.open(cache).batches("calibration")])
    # raw and scaled arithmetic may round one pair to the other side
    assert run.sae.encode_sparse(calibration).tokens.numel() == pytest.approx(4 * len(calibration), abs=1)
    assert run.sae.threshold.unique().numel() == 1
    heldout = torch.cat([b.x for b in ActivationCache.open(cache).batches("heldout")])
    assert run.sae.encode_sparse(heldout).l0 == pytest.approx(4, rel=0.15)


@pytest.mark.parametrize("k", [1, 3, 60])
def test_the_threshold_is_exact_even_where_one_batch_holds_most(k, generator):
    sae = SparseAutoencoder(SAEConfig(4, 64, "jumprelu"))
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(4, 64, generator=generator))
        sae.b_enc.copy_(torch.randn(64, generator=generator) + 3)
    quiet, loud = torch.randn(90, 4, generator=generator) * 0.01, torch.randn(10, 4, generator=generator) * 30
    theta = global_threshold(sae, lambda: [quiet, loud], k)
    pre = sae.pre_activations(torch.cat([quiet, loud])).detach()
    assert int((pre > theta).sum()) == min(k * 100, int((pre > 0).sum()))


def test_the_threshold_sees_what_a_piece_hides():
    # ten tokens with 64 positive pairs each, a hundred with none: k·n = 110 pairs all come from the ten
    sae = SparseAutoencoder(SAEConfig(1, 64, "jumprelu"))
    with torch.no_grad():
        sae.W_enc.copy_(torch.linspace(1, 2, 64)[None])
    dense, silent = torch.linspace(1, 3, 10)[:, None], -torch.ones(100, 1)
    theta = global_threshold(sae, lambda: [dense, silent], 1)
    assert int((sae.pre_activations(torch.cat([dense, silent])) > theta).sum()) == 110
