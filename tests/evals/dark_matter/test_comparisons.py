"""Error against width, token by token, from earlier parts, and the control with planted errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saekit import SAEConfig, SparseAutoencoder
from saekit.activations import ActivationCache
from saekit.code import SparseCode
from saekit.evals.dark_matter import DarkMatter, ErrorBatch, dark_matter, fit_width_law
from saekit.evals.dark_matter.decomposition import Norms
from saekit.evals.dark_matter.earlier_parts import EarlierParts
from saekit.evals.dark_matter.error_parts import fit_error, write_error_part
from saekit.evals.dark_matter.scaling import TokenScaling, alike, width_scaling
from saekit.evals.dark_matter.splits import in_test_half
from saekit.evals.dark_matter.synthetic import synthetic_control, without_weakest

WIDTHS = (512, 1024, 2048, 4096, 8192)


def dictionary(d=16, width=64, k=4, seed=0):
    """A random TopK dictionary with unit rows."""
    sae = SparseAutoencoder(SAEConfig(d, width, "topk", k=k))
    with torch.no_grad():
        rows = torch.randn(width, d, generator=torch.Generator().manual_seed(seed))
        sae.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec.T)
    return sae


@given(st.floats(0, 0.5), st.floats(0.5, 20), st.floats(0.1, 1.5))
def test_the_law_of_exact_points_is_found_again(c, a, m):
    values = [c + a * width**-m for width in WIDTHS]
    law = fit_width_law(WIDTHS, values)
    assert law(1000) == pytest.approx(c + a * 1000**-m, rel=1e-3)
    assert law.rms < 1e-4 * max(values)
    assert law.m == pytest.approx(m, rel=0.02)


def test_the_law_of_a_constant_and_of_a_rise():
    flat = fit_width_law(WIDTHS, [0.3] * 5)
    assert flat.rms == pytest.approx(0, abs=1e-9)
    assert flat(100_000) == pytest.approx(0.3, abs=1e-3)
    rising = fit_width_law(WIDTHS, [0.1, 0.2, 0.3, 0.4, 0.5])
    assert rising.a == 0, "the law cannot rise"
    assert rising.c == pytest.approx(0.3)


def test_a_noisy_law_against_brute_force():
    generator = np.random.default_rng(0)
    values = [0.05 + 3 * width**-0.5 + 0.002 * generator.standard_normal() for width in WIDTHS]
    F, y = np.array(WIDTHS, dtype=float), np.array(values)

    def left(c, m):
        power = F**-m
        return np.square(y - c - power * (power @ (y - c)) / (power @ power)).sum()

    best = min(left(c, m) for c in np.arange(0, 0.1, 0.002) for m in np.arange(0.1, 1.5, 0.02))
    law = fit_width_law(WIDTHS, values)
    assert np.square(law(F) - y).sum() <= best + 1e-12


def test_intervals_over_documents():
    generator = np.random.default_rng(0)
    variance = generator.uniform(50, 150, 64)
    truth = np.array([0.1 + 4 * width**-0.5 for width in WIDTHS])
    noise = 1 + 0.2 * generator.standard_normal((1, 64))  # of documents, the same for every width
    found = width_scaling(WIDTHS, truth[:, None] * variance * noise, variance)
    assert found["fvu"] == pytest.approx(list(truth * (variance * noise[0]).sum() / variance.sum()))
    for value, (low, high) in zip(found["fvu"], found["fvu_interval"], strict=True):
        assert low < value < high
        # the spread of a ratio of sums over 64 blocks, by the delta method
        expected = value * np.sqrt(np.sum((variance * (noise[0] - noise[0].mean())) ** 2)) / variance.sum()
        assert (high - low) / 3.29 == pytest.approx(expected, rel=0.25)
    assert found["slope_interval"][1] - found["slope_interval"][0] < 1e-9, "shared noise leaves the slope alone"
    low, high = found["law_interval"]["m"]
    assert low - 0.02 <= 0.5 <= high + 0.02


def test_two_widths_have_a_slope_and_no_law():
    found = width_scaling((100, 400), np.array([[4.0, 4.0], [2.0, 2.0]]), np.array([10.0, 10.0]))
    assert found["slope"] == pytest.approx(-0.5)
    assert "law" not in found


def test_one_error_foretold_from_another():
    generator = torch.Generator().manual_seed(0)
    small, nonlinear, noise = torch.rand(3, 40_000, generator=generator)
    large = 0.5 * small + 0.5 * nonlinear + noise
    test = in_test_half(torch.arange(40_000), 0)
    scaling = TokenScaling(["small", "large"])
    for rows in torch.arange(40_000).chunk(9):
        scaling.update(
            {
                "small": Norms(small[rows], nonlinear[rows], test[rows]),
                "large": Norms(large[rows], nonlinear[rows], test[rows]),
            }
        )
    found = scaling.between("small", "large")
    # variances: 0.25, 0.25 and 1 of a twelfth
    assert found["r2"] == pytest.approx(1 / 6, abs=0.01)
    assert found["r2_with_nonlinear"] == pytest.approx(2 / 6, abs=0.01)
    assert found["gain"] == pytest.approx((1 / 6) / (5 / 6), abs=0.015)


def test_groups_of_like_sparsity():
    l0 = {"a": 16.0, "b": 63.0, "c": 15.2, "d": 64.0, "e": 130.0}
    assert alike(l0) == [["c", "a"], ["b", "d"], ["e"]]


def test_earlier_parts_against_direct_regressions():
    generator = torch.Generator().manual_seed(0)
    n, d = 4000, 6
    x = torch.randn(n, d, generator=generator)
    parts = {"mlp": torch.randn(n, 3, generator=generator), "attn": torch.randn(n, 4, generator=generator) + 2}
    error = 0.3 * x @ torch.randn(d, d, generator=generator) + parts["mlp"] @ torch.randn(3, d, generator=generator)
    error += 0.5 * torch.randn(n, d, generator=generator)
    documents = torch.arange(n) // 20
    analysis, earlier = DarkMatter(d), EarlierParts({name: part.shape[1] for name, part in parts.items()}, d)
    test = in_test_half(documents, 0)
    for rows in torch.arange(n).chunk(3):
        analysis.update(ErrorBatch(x[rows], x[rows] - error[rows], documents[rows]))
        earlier.update({k: v[rows] for k, v in parts.items()}, x[rows], x[rows] - error[rows], test[rows])
    analysis.fit()
    b = analysis.b["document"]
    found = earlier.result(b, analysis.moments("document"))
    targets = {"error": error.double(), "linear": x.double() @ b.weight}
    targets["nonlinear"] = targets["error"] - targets["linear"]
    inputs = {name: part.double() for name, part in parts.items()}
    inputs["together"] = torch.cat([*inputs.values()], 1)
    for name, z in inputs.items():
        z = torch.cat([z, torch.ones(n, 1)], 1)
        for target, y in targets.items():
            left = (y - z @ torch.linalg.lstsq(z[~test], y[~test]).solution)[test].square().sum(0)
            total = (y[test] - y[test].mean(0)).square().sum(0)
            assert found[name][target]["r2"] == pytest.approx(float((1 - left / total).mean()), abs=1e-6)
            assert found[name][target]["r2_pooled"] == pytest.approx(float(1 - left.sum() / total.sum()), abs=1e-6)
    assert found["mlp"]["nonlinear"]["r2_pooled"] > 0.5
    assert abs(found["attn"]["nonlinear"]["r2_pooled"]) < 0.05


def test_introduced_noise_is_recovered_as_nonlinear_error():
    x = torch.randn(100_000, 16, generator=torch.Generator().manual_seed(1))
    found = synthetic_control(dictionary(), x, reconstruction_noise=1.0)
    assert found["planted_absent"] == found["planted_activation"] == 0
    assert found["nonlinear_over_introduced"] == pytest.approx(1, abs=0.02)
    assert found["r2_pooled"] == pytest.approx(0, abs=0.01)


def test_planted_parts_of_the_control_add_up():
    x = torch.randn(50_000, 16, generator=torch.Generator().manual_seed(1))
    sae = dictionary()
    found = synthetic_control(sae, x, activation_noise=0.5, reconstruction_noise=0.5, removed=0.5)
    unit = float((x - sae(x)).square().mean().detach())
    assert found["planted_introduced"] == pytest.approx(16 * 0.25 * unit, rel=0.02)
    assert found["planted_activation"] == pytest.approx(16 * 0.25 * unit, rel=0.02)
    total = found["planted_absent"] + found["planted_activation"] + found["planted_introduced"]
    assert found["linear"] + found["nonlinear"] == pytest.approx(total, rel=0.02)
    assert found["planted_absent"] > 0
    assert found["nonlinear_over_introduced"] > 1, "a part that is missing is not wholly linear"
    assert synthetic_control(sae, x, activation_noise=1.0)["nonlinear_over_introduced"] is None


def test_the_weakest_matches_of_each_token_go():
    tokens, features = torch.tensor([0, 0, 0, 0, 1, 1, 3]), torch.tensor([5, 1, 2, 0, 3, 4, 6])
    code = SparseCode(tokens, features, torch.tensor([4.0, 1.0, 3.0, 2.0, 1.0, 9.0, 1.0]), 4, 7)
    half = without_weakest(code, 0.5)
    assert half.tokens.tolist() == [0, 0, 1, 3], "half of one match is none, rounded to even"
    assert half.features.tolist() == [5, 2, 4, 6]
    assert len(without_weakest(code, 0.0).values) == 7
    assert len(without_weakest(code, 1.0).values) == 0


def test_error_parts_as_caches(tmp_path):
    x = torch.randn(6000, 16, generator=torch.Generator().manual_seed(2)) + 1
    cache, sae = ActivationCache.from_tensor(tmp_path / "x", x), dictionary()
    b = fit_error(sae, cache)
    train = cache.division.holds("train", 0, cache.documents(0, 6000))
    with torch.no_grad():
        error = x - sae(x)
    direct = torch.linalg.lstsq(x[train].double(), error[train].double()).solution
    torch.testing.assert_close(b.weight, direct, rtol=1e-5, atol=1e-6)
    parts = [write_error_part(tmp_path / part, sae, cache, b, part) for part in ("linear", "nonlinear")]
    linear, nonlinear = (part.read(0, 6000).x for part in parts)
    torch.testing.assert_close(linear, (x.double() @ direct).float(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(linear + nonlinear, error, rtol=1e-3, atol=1e-5)
    assert all(part.division == cache.division for part in parts)


def test_a_picture_of_every_kind(tmp_path):
    from saekit.evals.dark_matter.figures import draw

    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    names = ["runs/a", "runs/b"]
    figures = {name: dark_matter(x, (0.5 + 0.2 * i) * x) for i, name in enumerate(names)}
    blocks = [figures[name]["blocks"] for name in names]
    scaled = width_scaling((8, 16), np.array([b["error"] for b in blocks]), np.array(blocks[0]["variance"]))
    group = {"dictionaries": names, "l0": [4, 4], "total": scaled, "nonlinear": scaled}
    pair = {"small": names[0], "large": names[1], "r2": 0.5, "r2_with_nonlinear": 0.6, "gain": 0.2}
    drawn = draw(figures, {"width": [group], "token": [pair]}, tmp_path)
    assert {path.stem.removeprefix("dark_matter_") for path in drawn} == {"r2", "shares", "width", "tokens"}
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in drawn)
