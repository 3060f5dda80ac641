"""Plain token ids: padding is no text, on either side, and what is no token id is named."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from tiny import write_tiny

from saekit import SAEConfig, SaekitError, SparseAutoencoder
from saekit.activations import ContextBatch, contexts_of, harvest, load_model
from saekit.errors import SaekitWarning
from saekit.evals import evaluate
from saekit.evals.features import study_features

HOOK = "blocks.1.hook_resid_post"
LENGTHS = (12, 7, 9, 3)
PAD = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    found = load_model(str(write_tiny(tmp_path_factory.mktemp("gpt2"), "gpt2")))
    found.special_tokens = found.special_tokens._replace(pad=PAD)
    return found


@pytest.fixture(scope="module")
def sae():
    torch.manual_seed(0)
    made = SparseAutoencoder(SAEConfig(32, 64, "topk", 4, metadata={"hook_name": HOOK}))
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape))
    return made


def padded(side):
    """Rows of several lengths, padded, with their mask; and the texts alone."""
    draw = torch.Generator().manual_seed(2)
    texts = [torch.randint(10, 4096, (n,), generator=draw) for n in LENGTHS]
    tokens = torch.full((len(texts), max(LENGTHS)), PAD)
    mask = torch.zeros_like(tokens)
    for row, text in enumerate(texts):
        where = slice(0, len(text)) if side == "right" else slice(max(LENGTHS) - len(text), None)
        tokens[row, where], mask[row, where] = text, 1
    return tokens, mask, texts


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_rows_give_what_their_texts_give_alone(model, side):
    tokens, mask, texts = padded(side)
    (found,) = harvest(model, HOOK, [contexts_of(model, tokens, attention_mask=mask)])
    with torch.no_grad():
        alone = [model.original_model(text[None], output_hidden_states=True).hidden_states[2][0, 1:] for text in texts]
    expected = torch.cat(alone)
    assert found.x.shape == expected.shape
    assert torch.equal(found.tokens, torch.cat([text[1:] for text in texts]))
    assert float((found.x - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert found.documents.tolist() == [row for row, n in enumerate(LENGTHS) for _ in range(n - 1)]


@pytest.mark.parametrize("side", ["right", "left"])
def test_figures_of_padded_rows_are_those_of_their_texts(model, sae, side):
    """Next-token figures too: each text alone, by the number of its predictions."""
    tokens, mask, texts = padded(side)
    report = evaluate(sae, model, tokens, attention_mask=mask)
    alone = [evaluate(sae, model, text[None]) for text in texts]
    counts = [each["downstream"]["tokens"] for each in alone]
    nats = sum(c * each["downstream"]["ce_clean"] for c, each in zip(counts, alone, strict=True)) / sum(counts)
    assert report["sparsity"]["tokens"] == sum(n - 1 for n in LENGTHS)
    if side == "left":  # turned, so that a pad follows the last token of a row
        assert report.groups == evaluate(sae, model, *padded("right")[:1], attention_mask=padded("right")[1]).groups
    assert report["downstream"]["tokens"] == sum(counts)
    assert report["downstream"]["ce_clean"] == pytest.approx(nats, rel=1e-5)
    study = study_features(sae, model, tokens, attention_mask=mask, features=[0, 1])
    assert study.tokens == sum(n - 1 for n in LENGTHS)


def test_padding_that_no_mask_names_is_told(model, sae):
    for side, where in (("right", "end"), ("left", "start")):
        tokens, mask, _ = padded(side)
        pads = int((mask == 0).sum()) - (3 if side == "left" else 0)  # the first of a row is no text anyway
        told = rf"^{pads if side == 'right' else pads + 3} tokens at the {where} of 3 rows hold the pad token \(id 5\)"
        with pytest.warns(SaekitWarning, match=told) as seen:
            evaluate(sae, model, tokens)
        assert seen[0].filename == __file__
        with pytest.warns(SaekitWarning, match=told):
            study_features(sae, model, tokens, features=[0])
        with pytest.warns(SaekitWarning, match=told):
            contexts_of(model, tokens)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            evaluate(sae, model, tokens, attention_mask=mask)
            evaluate(sae, model, tokens, kept=mask)
            contexts_of(model, torch.where(tokens == PAD, 17, tokens))


def test_one_pad_token_may_be_bos_or_eos(model):
    tokens = torch.randint(10, 4096, (3, 8))
    tokens[:, 0] = tokens[:, -1] = PAD
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert int(contexts_of(model, tokens).kept.sum()) == 3 * 7


@pytest.mark.parametrize("kind", [list, np.array, np.int32, torch.int32, torch.int16])
def test_token_ids_of_any_whole_numbers(model, kind):
    tokens = torch.randint(10, 4096, (2, 6))
    given = {list: tokens.tolist(), np.array: tokens.numpy(), np.int32: tokens.numpy().astype(np.int32)}
    found = contexts_of(model, given.get(kind, tokens.to(kind) if isinstance(kind, torch.dtype) else None))
    assert torch.equal(found.tokens, tokens)
    assert found.kept.tolist() == [[False, *[True] * 5]] * 2


def test_masks_of_whole_numbers_are_masks(model):
    """Ones and zeros are no indices."""
    tokens = torch.randint(10, 4096, (2, 6))
    kept = torch.tensor([[1, 1, 0, 0, 1, 1]] * 2)
    assert contexts_of(model, tokens, kept=kept).kept.tolist() == [[False, True, False, False, True, True]] * 2


def test_what_cannot_be_contexts_is_named(model, sae, tmp_path):
    tokens = torch.randint(10, 4096, (2, 6))
    ones = torch.ones(2, 6)
    gap = torch.tensor([[1, 1, 0, 0, 1, 1], [1] * 6])
    for given, masks, told in (
        (tokens[0], {}, r"contexts \[c, t\], not of shape \[6\]"),
        ([[1, 2], [3]], {}, "rows of one length"),
        (tokens.float(), {}, "whole numbers, not float32"),
        (tokens.bool(), {}, "whole numbers, not bool"),
        (torch.tensor([[1, -100]]), {}, r"token id -100 at \[0, 1\] is none of the model's 4,096"),
        (torch.tensor([[1, 2], [4096, 3]]), {}, r"token id 4096 at \[1, 0\]"),
        (["some text", "b"], {}, "ids, not text"),
        ("some text", {}, "ids, not text"),
        (torch.ones(1, 65, dtype=torch.long), {}, "contexts of 65 tokens are longer than the 64 that the model takes"),
        (tokens, {"attention_mask": ones[:, :5]}, r"attention_mask of shape \[2, 5\]"),
        (tokens, {"kept": ones[:1]}, r"kept of shape \[1, 6\]"),
        (tokens, {"attention_mask": gap}, "attention_mask has gaps"),
    ):
        for call in (contexts_of, lambda m, t, **masks: evaluate(sae, m, t, **masks)):
            with pytest.raises(SaekitError, match=told):
                call(model, given, **masks)
    contexts = contexts_of(model, tokens)
    assert isinstance(contexts, ContextBatch)
    with pytest.raises(SaekitError, match="attention_mask is for plain token ids"):
        evaluate(sae, model, contexts, attention_mask=ones)
    by_gradients = SparseAutoencoder(
        SAEConfig(32, 64, "topk", 4, metadata={"hook_name": HOOK, "saekit": {"beta": 1.0}})
    )
    with pytest.raises(SaekitError, match="selects by gradients.*without padding"):
        evaluate(by_gradients, model, tokens, attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6]))
    with pytest.raises(SaekitError, match="no held-out text"):
        evaluate(sae, model, tokens, attention_mask=torch.zeros(2, 6))
    bert = load_model(str(write_tiny(tmp_path / "bert", "bert")))
    with pytest.raises(SaekitError, match="padding changes what this model computes.*contexts of one length"):
        contexts_of(bert, tokens, attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6]))
    assert contexts_of(bert, tokens, attention_mask=ones).kept[:, 1:].all()
    with pytest.raises(SaekitError, match="GPT2LMHeadModel has no hooks; .*load_model"):
        evaluate(sae, model.original_model, tokens)
    for size in (0, -1, 2.0):
        with pytest.raises(SaekitError, match=f"at least 1, not {size}"):
            evaluate(sae, model, tokens, batch=size)
    for features, told in (("a", "'str' object"), ([1.7], "'float' object"), (3, "not iterable")):
        with pytest.raises(SaekitError, match=f"features are a sequence of whole numbers.*{told}"):
            study_features(sae, model, tokens, features=features)


def test_what_a_tokenizer_gives_is_taken_with_its_mask(model):
    texts = ["def f(x):", "import os", "class A: pass  # of some length"]
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.padding_side = "left"
    given = tokenizer(texts, padding=True, return_tensors="pt")
    assert not given["attention_mask"].all()
    found = contexts_of(model, given)
    expected = contexts_of(model, given["input_ids"], attention_mask=given["attention_mask"])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert int(found.kept.sum()) == int(given["attention_mask"].sum()) - len(texts)
