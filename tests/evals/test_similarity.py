"""The nearest directions of two dictionaries, against every pair by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saekit import SAEConfig, SaekitError, SparseAutoencoder
from saekit.evals import compare, similarity


def dictionary(W_dec):
    sae = SparseAutoencoder(SAEConfig(W_dec.shape[1], W_dec.shape[0], "standard"))
    with torch.no_grad():
        sae.W_dec.copy_(W_dec)
    return sae


def brute(a, b):
    """Nearest and cosine of each row of a in b, in float64, a pair at a time."""
    found = [[float(x @ y / np.linalg.norm(x) / np.linalg.norm(y)) for y in b] for x in a]
    return np.argmax(found, 1), np.max(found, 1)


@given(st.integers(1, 24), st.integers(1, 24), st.integers(2, 6), st.integers(1, 40), st.integers(0, 1000))
def test_the_nearest_are_those_of_every_pair(n, m, d, chunk, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(n, d, generator=generator), 3 * torch.randn(m, d, generator=generator)
    b[: min(n, m) // 2] = 0.5 * a[: min(n, m) // 2]  # some are shared
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(similarity, "_CHUNK", chunk)
        found = compare(dictionary(a), dictionary(b))
    there, back = (brute(*(w.double().numpy() for w in pair)) for pair in ((a, b), (b, a)))
    for side, (nearest, cosines) in ((found.first, there), (found.second, back)):
        assert side.features.tolist() == nearest.tolist()
        np.testing.assert_allclose(side.cosines, cosines, atol=1e-6)
        assert side.share(0.7) == np.mean(np.float32(cosines) >= 0.7)
    mutual = {(i, int(j)) for i, j in enumerate(there[0]) if back[0][j] == i}
    assert set(map(tuple, found.matches.tolist())) == mutual
    assert (found.first.cosines[found.matches[:, 0]].diff() <= 0).all()
    figures = found.to_dict()
    assert figures["matches"] == len(mutual) >= min(n, m) // 2
    assert figures["second"]["matched"] == len(mutual) / m
    assert figures["first"]["mean_cosine"] == pytest.approx(np.mean(there[1]), abs=1e-6)


def test_a_dictionary_in_another_order_is_the_same():
    W = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    found = compare(dictionary(W), dictionary(2 * W[order]))
    assert torch.equal(order[found.first.features], torch.arange(300))
    first, second = (found.to_dict()[side] for side in ("first", "second"))
    assert first == pytest.approx(second, rel=1e-6), "a mean of the same numbers in another order"
    assert found.first.share(0.9999) == found.to_dict()["first"]["matched"] == 1
    other = compare(dictionary(W), dictionary(torch.randn(300, 64, generator=torch.Generator().manual_seed(2))))
    assert other.first.share(0.7) == 0
    assert float(other.first.cosines.mean()) == pytest.approx((2 * np.log(300) / 64) ** 0.5, rel=0.2), "as documented"
    assert '<td style="text-align:left">300</td>' in found._repr_html_()


def test_the_order_of_two_precisions_does_not_matter():
    W = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    coarse, fine = dictionary(W).to(torch.bfloat16), dictionary(W + 0.3 * W.roll(1))
    found, back = compare(coarse, fine), compare(fine, coarse)
    for side, other in ((found.first, back.second), (found.second, back.first)):
        assert torch.equal(side.features, other.features)
        torch.testing.assert_close(side.cosines, other.cosines, rtol=0, atol=1e-6)


def test_null_directions_are_like_nothing_and_widths_must_agree():
    W = torch.randn(5, 4)
    W[2] = 0
    found = compare(dictionary(W), dictionary(W))
    assert float(found.first.cosines[2]) == 0
    assert found.first.cosines.isfinite().all()
    with pytest.raises(SaekitError, match="d_in = 4 and d_in = 6"):
        compare(dictionary(W), dictionary(torch.randn(5, 6)))
