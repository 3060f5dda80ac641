"""The study of features against plain loops over a dense float64 code."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import pytest
import torch

from saekit.activations import ContextBatch, harvest
from saekit.errors import SaekitError
from saekit.evals.activity import Histograms
from saekit.evals.features import spread_over_densities, study_features
from saekit.evals.pieces import pieces
from saekit.evals.sparsity import histogram
from saekit.sae import SAEConfig, SparseAutoencoder

HOOK, TOP, QUANTILES, WINDOW, BATCH, F = "blocks.1.hook_resid_post", 4, 3, 9, 3, 40


@pytest.fixture(scope="module")
def text():
    """Twenty contexts of thirty tokens: BOS, documents that end anywhere, one context twice, one partly."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(50, 4000, (20, 30), generator=generator)
    documents = torch.cumsum(torch.rand(20, 30, generator=generator) < 0.06, 1) + 100 * torch.arange(20)[:, None]
    kept = torch.ones(20, 30, dtype=torch.bool)
    kept[:, 0] = False
    kept[:, 1:] &= documents[:, 1:] == documents[:, :-1]  # a separator
    tokens[7], documents[7], kept[7] = tokens[3], documents[3] + 5000, kept[3]
    tokens[11, 1:15], documents[11, :15], kept[11, 1:15] = tokens[4, 1:15], 9000, True
    tokens[4, 1:15], documents[4, :15], kept[4, 1:15] = tokens[11, 1:15], 9001, True
    return ContextBatch(tokens, documents, kept)


@pytest.fixture(scope="module")
def sae(source):
    """A random dictionary in float64; its last feature never fires."""
    torch.manual_seed(1)
    made = SparseAutoencoder(SAEConfig(256, F, "topk", k=6), dtype=torch.float64)
    for name, parameter in made.named_parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64) * (0.3 if name == "b_enc" else 1.0)
    made.b_enc.data[-1] = -1e6
    return made.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def study(sae, source, text):
    return study_features(sae, source.model, text, hook=HOOK, top=TOP, quantiles=QUANTILES, window=WINDOW, batch=BATCH)


@pytest.fixture(scope="module")
def dense(sae, source, text):
    """[20, 30, F]: the code of every position, nothing where there is no text."""
    code = torch.zeros(20, 30, F, dtype=torch.float64)
    x = torch.cat([found.x for found in harvest(source.model, HOOK, text.split(BATCH))]).double()
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    ranks = pre.argsort(dim=1, descending=True).argsort(dim=1)
    code[text.kept] = torch.where(ranks < 6, pre.clamp_min(0), 0)
    return code.float().double()  # activations are kept in float32


def run_around(text: ContextBatch, c: int, t: int) -> tuple[int, int]:
    """Bounds of the text tokens of one document that stand together around a position."""
    low = high = t
    while low > 0 and text.kept[c, low - 1] and text.documents[c, low - 1] == text.documents[c, t]:
        low -= 1
    while high < 30 and text.kept[c, high] and text.documents[c, high] == text.documents[c, t]:
        high += 1
    return low, high


def test_densities_and_l0(study, dense, text):
    n = int(text.kept.sum())
    assert study.tokens == n
    torch.testing.assert_close(study.density, (dense > 0).double().sum((0, 1)) / n)
    l0 = (dense > 0).sum(2)[text.kept]
    assert study.l0_counts.tolist() == [int((l0 == i).sum()) for i in range(int(l0.max()) + 1)]
    for j in range(F):
        fires = dense[..., j][dense[..., j] > 0]
        assert study.fired(j) == len(fires)
        assert study.mean(j) == pytest.approx(float(fires.mean()) if len(fires) else 0)
        assert study.peak(j) == pytest.approx(float(fires.max()) if len(fires) else 0)


def test_top_passages(study, dense, text):
    def alike(c: int, t: int) -> tuple[int, ...]:
        return tuple(text.tokens[c, max(run_around(text, c, t)[0], t - 11) : t + 1].tolist())

    repeated = 0
    for j in range(F):
        peaks = [(-float(dense[c, :, j].max()), c, int(dense[c, :, j].argmax())) for c in range(20)]
        expected, seen = [], set()
        for value, c, t in sorted(peak for peak in peaks if peak[0] < 0):
            repeated += alike(c, t) in seen
            if alike(c, t) not in seen:
                seen.add(alike(c, t))
                expected.append((c * 30 + t, -value))
        found = [each for each in study.examples(j) if each.kind == "top"]
        assert [each.place + each.at for each in found] == [place for place, _ in expected[:TOP]]
        assert [each.values[each.at] for each in found] == [value for _, value in expected[:TOP]]
        assert all(each.band == 0 for each in found)
    assert repeated  # passages that stand twice in the text were met


def test_passages_stay_in_their_document(study, dense, text):
    for j in range(F):
        for example in study.examples(j):
            c, start = divmod(example.place, 30)
            low, high = run_around(text, c, start + example.at)
            stop = start + len(example.tokens)
            assert low <= start <= start + example.at < stop <= high
            assert len(example.tokens) == min(WINDOW, high - low)
            assert example.tokens == text.tokens[c, start:stop].tolist()
            assert example.values == dense[c, start:stop, j].tolist()


def test_quantiles_come_from_every_band(study, dense):
    banded = 0
    for j in range(F):
        examples = study.examples(j)
        assert len({each.place // 30 for each in examples}) == len(examples)  # distinct contexts
        quantiles = [each for each in examples if each.kind == "quantile"]
        assert [each.band for each in quantiles] == sorted({each.band for each in quantiles})
        values = [each.values[each.at] for each in quantiles]
        assert values == sorted(values, reverse=True)
        ranked = dense[..., j][dense[..., j] > 0].sort(descending=True).values.tolist()
        if 0 < len(ranked) <= 32:  # the sample is all there is: bands are known exactly
            for each in quantiles:
                rank = ranked.index(each.values[each.at])
                assert (each.band - 1) * len(ranked) // QUANTILES <= rank < each.band * len(ranked) // QUANTILES
        banded += len(quantiles) == QUANTILES
    assert banded > F / 2


def test_the_sample_is_fair(source, sae):
    """Of a feature that fires everywhere, the sample is spread over text and strength alike."""
    always = SparseAutoencoder(SAEConfig(256, 64, "standard"), dtype=torch.float64)
    always.b_enc.data.fill_(1000.0)
    always.W_enc.data.normal_()
    tokens = torch.randint(50, 4000, (16, 65), generator=torch.Generator().manual_seed(2))
    contexts = ContextBatch(tokens, torch.zeros_like(tokens), torch.ones_like(tokens, dtype=torch.bool))
    found = study_features(always, source.model, contexts, hook=HOOK)
    places = torch.tensor([each.place for j in range(64) for each in found._activity.sample.of(j)]).double()
    assert len(places) == 64 * 32
    n = 16 * 65
    assert abs(float(places.mean()) - n / 2) < 5 * n / math.sqrt(12 * len(places))
    assert len(places.unique()) > 0.8 * n  # by chance, 1 − e⁻² of them


def test_histograms(study, dense):
    for j in range(F):
        edges, counts = study.histogram(j)
        fires = dense[..., j][dense[..., j] > 0]
        if not len(fires):
            assert (edges, counts) == ([0.0], [])
            continue
        assert 32 < len(counts) <= 64 or len(counts) == 33
        assert edges[-2] <= float(fires.max()) < edges[-1]
        expected = [int(((fires >= a) & (fires < b)).sum()) for a, b in itertools.pairwise(edges)]
        assert counts == expected


def test_a_histogram_of_l0():
    generator = torch.Generator().manual_seed(4)
    for spread, tail in ((5, 0), (30, 0), (300, 3)):
        l0 = [*torch.randint(0, spread, (5000,), generator=generator).tolist(), *[4000] * tail]
        found = histogram(torch.bincount(torch.tensor(l0)))
        width, bins = found["width"], len(found["counts"])
        assert bins <= 40
        assert (bins - 1) * width < spread
        assert found["counts"] == [sum(i * width <= each < (i + 1) * width for each in l0) for i in range(bins)]
        assert found["beyond"] == sum(each >= bins * width for each in l0) <= 5


def test_histograms_grow_exactly():
    """Values that grow by many powers of two, from denormal ones to the largest, in any order of rows."""
    histograms, seen = Histograms(3), defaultdict(list)
    generator = torch.Generator().manual_seed(3)
    for power in (-140, -20, -19, 0, 1, 7, 30, 126):
        row = torch.randint(0, 2, (50,), generator=generator)
        value = torch.ldexp(torch.rand(50, generator=generator) + 0.5, torch.tensor(power))
        histograms.update(row, value)
        for r, v in zip(row.tolist(), value.tolist(), strict=True):
            seen[r].append(v)
    for r in (0, 1):
        edges, counts = histograms.of(r)
        assert sum(counts) == len(seen[r])
        assert counts == [sum(a <= v < b for v in seen[r]) for a, b in itertools.pairwise(edges)]
    assert histograms.of(2) == ([0.0], [])


def test_neighbours(study, sae):
    unit = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)
    for j in (0, 17, F - 1):
        expected = sorted(((float(unit[i] @ unit[j]), i) for i in range(F) if i != j), reverse=True)
        found = study.neighbours(j, 8)
        assert [i for i, _ in found] == [i for _, i in expected[:8]]
        assert [c for _, c in found] == pytest.approx([c for c, _ in expected[:8]])
    assert len(study.neighbours(0, 1000)) == F - 1
    for absent in (-1, F):
        for asked in (study.neighbours, study.logits):
            with pytest.raises(SaekitError, match=f"no feature {absent}: the dictionary has features 0 to {F - 1}"):
                asked(absent)


def test_a_study_in_one_line(study):
    assert repr(study) == f"FeatureStudy({F} of {F} features on {study.tokens:,} tokens)"


def test_neighbours_of_a_dictionary_in_bfloat16(source, text):
    """They are those of its own rows, not of products in its own precision."""
    sae = SparseAutoencoder(SAEConfig(256, 400, "topk", k=6), dtype=torch.bfloat16).requires_grad_(False)
    sae.W_dec.normal_(generator=torch.Generator().manual_seed(0))
    found = study_features(sae, source.model, text.rows(0, 1), hook=HOOK).neighbours_of(range(400), 3)
    unit = sae.W_dec.double() / sae.W_dec.double().norm(dim=1, keepdim=True)
    best = (unit @ unit.T).fill_diagonal_(-2).topk(3)
    assert [[i for i, _ in each] for each in found] == best.indices.tolist()
    torch.testing.assert_close(torch.tensor([[c for _, c in each] for each in found]), best.values.float())


def test_logits_against_the_models_last_layers(study, source, sae):
    """By its own modules, and by hand from its weights: a root mean square norm and a matrix, no biases."""
    model, row = source.model, sae.W_dec[5].float()
    with torch.no_grad():
        effect = model.unembed(model.ln_final(row[None, None]))[0, 0]
    effect = effect - effect.mean()
    hugging_face = model.original_model
    scaled = row.double() / row.double().square().mean().sqrt() * hugging_face.model.norm.weight.double()
    by_hand = hugging_face.lm_head.weight.double() @ scaled
    torch.testing.assert_close(effect.double(), by_hand - by_hand.mean(), atol=1e-3, rtol=1e-3)
    raised, lowered = study.logits(5, 10)
    assert [v for _, v in raised] == pytest.approx(effect.sort(descending=True).values[:10].tolist(), abs=1e-4)
    assert [v for _, v in lowered] == pytest.approx(effect.sort().values[:10].tolist(), abs=1e-4)
    assert [name for name, _ in raised] == study.pieces(effect.sort(descending=True).indices[:10].tolist())
    [again, _] = study.logits_of([5, 6], 10)
    assert again[0] == [(name, pytest.approx(value, abs=1e-4)) for name, value in raised]


def test_where_there_are_no_logits(source, text):
    narrow = SparseAutoencoder(SAEConfig(256, 8, "topk", k=2)).requires_grad_(False)
    narrow.W_enc.data.normal_()
    found = study_features(narrow, source.model, text, hook="blocks.1.attn.hook_z")
    assert "not in the space of the residual stream" in (found.no_logits or "")
    assert found.logits(3) == ([], [])


def test_some_features(sae, source, text, study):
    few = study_features(
        sae, source.model, text, hook=HOOK, features=[17, 3], top=TOP, quantiles=QUANTILES, window=WINDOW, batch=BATCH
    )
    assert few.features == [3, 17]
    assert torch.equal(few.density, study.density)
    for j in (3, 17):
        assert [e.place for e in few.examples(j)] == [e.place for e in study.examples(j)]
        assert few.histogram(j) == study.histogram(j)
    # in other batches activations are rounded otherwise, and which of two passages alike comes first may change with it
    other = study_features(sae, source.model, text, hook=HOOK, features=[17, 3], batch=7)
    assert float((other.density - study.density).abs().max()) * study.tokens <= 1
    for j in (3, 17):
        assert other.peak(j) == pytest.approx(study.peak(j), rel=1e-4)
    with pytest.raises(SaekitError, match="feature 4 is not among the 2"):
        few.examples(4)
    with pytest.raises(SaekitError, match="features 0 to 39"):
        study_features(sae, source.model, text, hook=HOOK, features=[F])
    for nonsense in ({"top": 0}, {"window": 0}, {"batch": 0}, {"quantiles": -1}):
        with pytest.raises(SaekitError, match="at least 1"):
            study_features(sae, source.model, text, hook=HOOK, **nonsense)


def test_a_decoder_that_is_not_finite(source, text):
    broken = SparseAutoencoder(SAEConfig(256, 8, "topk", k=2)).requires_grad_(False)
    broken.W_dec[3, 5] = torch.nan
    with pytest.raises(SaekitError, match="decoder rows that are NaN or infinite"):
        study_features(broken, source.model, text, hook=HOOK)


def test_features_spread_over_densities(sae, source, text, study):
    few = spread_over_densities(sae, source.model, text, 5, hook=HOOK)
    ranked = study.density.sort(descending=True, stable=True).indices.tolist()
    assert few == sorted(ranked[rank] for rank in (0, 10, 20, 29, 39))
    assert spread_over_densities(sae, source.model, text, 100, hook=HOOK) == list(range(F))


def test_pieces_of_the_embedded_tokenizer(source):
    tokenizer = source.model.tokenizer
    text = "def f(x):\n\treturn 'e'  # ok"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(pieces(tokenizer, ids)).replace("↵", "\n").replace("⇥", "\t") == text
    assert pieces(tokenizer, tokenizer("é", add_special_tokens=False)["input_ids"]) == ["\\xc3", "\\xa9"]  # a byte each


def test_pieces_of_other_kinds_of_tokenizers():
    class Plain:
        all_special_ids = (0,)
        backend_tokenizer = None
        names = ("<s>", "▁the", "<0x0A>", "<0xE2>", "‮x", "<img onerror=alert(1)>")

        def convert_ids_to_tokens(self, ids):
            return [self.names[i] if i < len(self.names) else None for i in ids]

    found = pieces(Plain(), range(7))
    assert found == ["<s>", " the", "↵", "\\xe2", "\\u202ex", "<img onerror=alert(1)>", "<6>"]
