"""What a dictionary's metadata tell of its model and text is honoured, refused by name, or warned of."""

from __future__ import annotations

import json
import random
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_tiny

import saekit
from saekit import SAEConfig, SaekitError, SparseAutoencoder
from saekit.activations import ActivationCache, load_model, model
from saekit.errors import SaekitWarning
from saekit.evals import Evaluator, evaluate, evaluate_activations
from saekit.evals.features import study_features

HOOK = "blocks.1.hook_resid_post"
PROCESSED = {"center_writing_weights": True, "fold_ln": True, "center_unembed": True, "fold_value_biases": True}
PROCESSED |= {"n_devices": 1, "device": "cuda", "default_prepend_bos": True, "refactor_factored_attn_matrices": True}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return str(write_tiny(tmp_path_factory.mktemp("gpt2"), "gpt2"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Some documents."""
    draw, file = random.Random(0), tmp_path_factory.mktemp("text") / "texts.jsonl"
    words = [f"{a}{b}" for a in ("re", "un", "over", "in", "out") for b in ("turn", "take", "set", "line", "go", "do")]
    texts = [" ".join(draw.choices(words, k=draw.randint(20, 120))) for _ in range(600)]
    file.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    return str(file)


@pytest.fixture
def saved(tmp_path, gpt2, text):
    """Save a dictionary with such metadata; returns its folder."""

    def save(**facts):
        torch.manual_seed(0)
        told = {"model_name": gpt2, "hook_name": HOOK, "context_size": 32, "dataset_path": text, **facts}
        sae = SparseAutoencoder(SAEConfig(32, 64, "topk", 8, metadata=told))
        with torch.no_grad():
            for p in sae.parameters():
                p.copy_(torch.randn(p.shape) / 4)
        return str(sae.save(tmp_path / "sae", overwrite=True))

    return save


def contexts_of(path, tokens=400, **settings):
    source, contexts = Evaluator(tokens=tokens, **settings).text_of(saekit.load(path), path)
    return source, contexts


def fvu(x, x_hat):
    return float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())


@torch.no_grad()
def test_a_dictionary_is_judged_on_the_processed_model_that_it_names(saved, gpt2):
    """The stream of a model with centred writing weights is its own without the mean over the width."""
    path = saved(model_from_pretrained_kwargs=PROCESSED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = Evaluator(tokens=400)(path)
    _, contexts = contexts_of(path)
    untouched = load_model(gpt2).original_model
    x = untouched(contexts.tokens, output_hidden_states=True).hidden_states[2][contexts.kept].double()
    sae = saekit.load(path)
    figures = [fvu(each, sae(each).double()) for each in (x - x.mean(1, keepdim=True), x)]
    assert report["reconstruction"]["fvu"] == pytest.approx(figures[0], rel=1e-3)
    assert abs(figures[1] - figures[0]) > 0.01, "without it the figure is another"
    assert report.about["processing"] == ["fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"]
    plain = Evaluator(tokens=400)(
        saved(model_from_pretrained_kwargs={"center_writing_weights": False, "fold_ln": None})
    )
    assert plain["reconstruction"]["fvu"] == pytest.approx(figures[1], rel=1e-3)
    assert plain["downstream"]["ce_clean"] == pytest.approx(report["downstream"]["ce_clean"], rel=1e-4)


def test_models_processed_otherwise_are_other_models(saved):
    evaluator = Evaluator(tokens=100)
    for kwargs in ({}, PROCESSED, {"fold_ln": True}, {}):
        evaluator(saved(model_from_pretrained_kwargs=kwargs))
    assert len(evaluator._models) == 3


@pytest.mark.parametrize(("told", "asked", "expected"), [
    (None, None, True), (True, None, True), (False, None, False), (False, True, True), (True, False, False),
])  # fmt: skip
def test_contexts_begin_with_bos_as_the_dictionary_or_the_user_says(saved, told, asked, expected):
    source, contexts = contexts_of(saved(prepend_bos=told), prepend_bos=asked)
    bos = source.model.tokenizer.bos_token_id
    assert bool((contexts.tokens[:, 0] == bos).all()) is expected
    assert source.provenance("heldout")["prepend_bos"] is expected
    assert not contexts.kept[:, 0].any()
    assert contexts.tokens.shape[1] == 32


def test_the_command_line_says_whether_contexts_begin_with_bos(saved, saekit_main, tmp_path):
    path = saved(prepend_bos=False)
    for flags, expected in (([], False), (["--prepend-bos"], True), (["--no-prepend-bos"], False)):
        out = tmp_path / f"{len(flags)}{expected}.json"
        done = saekit_main("eval", path, "--tokens", 200, "--out", out, "--quiet", *flags)
        assert done.returncode == 0, done.stderr
        assert json.loads(out.read_text())["about"]["prepend_bos"] is expected
    done = saekit_main("eval", path, "--cache", tmp_path, "--prepend-bos")
    assert "not by --cache and --prepend-bos" in done.stderr


def test_bos_that_a_tokenizer_does_not_have_is_not_promised(saved, monkeypatch):
    from saekit.activations import source

    monkeypatch.setattr(source, "special_tokens", lambda model: saekit.special_tokens.SpecialTokens(None, 0, None))
    found, _ = contexts_of(saved(prepend_bos=True))
    assert found.prepend_bos is False
    with pytest.raises(SaekitError, match="has no BOS to prepend"):
        contexts_of(saved(), prepend_bos=True)


@pytest.mark.parametrize(
    ("positions", "expected"),
    [([None], range(32)), ([], range(32)), (None, range(32)), ([5, -5], range(5, 27)), ([2, None, 3], range(2, 32, 3))],
)
def test_positions_that_were_left_out_of_training_are_left_out(saved, tmp_path, positions, expected):
    """In long documents too, of which parts are drawn."""
    where = torch.zeros(32, dtype=torch.bool)
    where[list(expected)] = True
    draw, file = random.Random(1), tmp_path / "long.jsonl"
    texts = [" ".join(draw.choices(["alpha", "beta", "gamma", "delta"], k=1000)) for _ in range(100)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for facts in ({}, {"dataset_path": str(file)}):
        source, contexts = contexts_of(saved(seqpos_slice=positions, **facts), tokens=10**6)
        _, plain = contexts_of(saved(**facts), tokens=10**6)
        assert torch.equal(contexts.tokens, plain.tokens)
        assert torch.equal(contexts.kept, plain.kept & where)
        batch, whole = (next(each.contexts("heldout")) for each in (source, contexts_of(saved(**facts))[0]))
        assert torch.equal(batch.kept, whole.kept & where)
    assert source.provenance("heldout").get("seqpos_slice") == (positions if len(expected) < 32 else None)


def test_tokens_that_were_left_out_of_training_are_left_out(saved):
    plain = next(contexts_of(saved())[0].contexts("heldout"))
    common = int(plain.tokens[plain.kept].mode().values)
    source, _ = contexts_of(saved(exclude_special_tokens=[common, 7]))
    assert torch.equal(
        next(source.contexts("heldout")).kept, plain.kept & (plain.tokens != common) & (plain.tokens != 7)
    )
    assert source.provenance("heldout")["exclude_special_tokens"] == [common, 7]
    special, _ = contexts_of(saved(exclude_special_tokens=True))
    found = special.rules.narrowed(plain, SimpleNamespace(all_special_ids=[common]))
    assert torch.equal(found.kept, plain.kept & (plain.tokens != common))
    assert special.provenance("heldout")["exclude_special_tokens"] is True
    assert "exclude_special_tokens" not in contexts_of(saved(exclude_special_tokens=False))[0].provenance("heldout")


def test_what_stood_between_documents_stands_there(saved):
    def made(**facts):
        source, _ = contexts_of(saved(**facts), tokens=2000)
        batch = next(source.contexts("heldout", 200))
        return batch, batch.tokens[:, 1:][~batch.kept[:, 1:]]

    plain, own = made()
    for fact, token in (("bos", 0), ("eos", 1), (17, 17)):
        batch, separators = made(sequence_separator_token=fact)
        assert len(separators) == len(own) > 3
        assert set(separators.tolist()) == {token}
    batch, separators = made(sequence_separator_token=None)
    assert len(separators) == 0
    assert batch.documents.max() >= plain.documents.max()


def test_saelens_before_6_tells_the_same(tmp_path, saved):
    path = saved()
    save_file(load_file(f"{path}/sae_weights.safetensors"), f"{path}/sae_weights.safetensors")  # as others write it
    old = {"d_in": 32, "d_sae": 64, "dtype": "torch.float32", "activation_fn_str": "topk", "hook_point": HOOK}
    old |= {"activation_fn_kwargs": {"k": 8}, "model_from_pretrained_kwargs": {"fold_ln": True}, "seqpos_slice": [1, 3]}
    old |= {"exclude_special_tokens": [4], "hook_point_head_index": 2, "prepend_bos": False}
    (tmp_path / "sae/cfg.json").write_text(json.dumps(old))
    facts = saekit.load(path).cfg.metadata
    assert facts == {
        "model_from_pretrained_kwargs": {"fold_ln": True}, "seqpos_slice": [1, 3], "exclude_special_tokens": [4],
        "hook_head_index": 2, "prepend_bos": False, "hook_name": HOOK,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({"hook_head_index": 1}, r"head 1 of .* alone \(hook_head_index\)"),
        ({"model_from_pretrained_kwargs": {"load_in_8bit": True}}, "load_in_8bit = 'True' of its model.* --model"),
        ({"model_from_pretrained_kwargs": {"checkpoint_value": 1000}}, "checkpoint_value = '1000' of its model"),
        ({"model_from_pretrained_kwargs": {"dtype": "float64"}}, "its model in float64.* --model-dtype"),
        ({"model_from_pretrained_kwargs": {"revision": "step1000"}}, "has no revision 'step1000'"),
        ({"model_from_pretrained_kwargs": {"fold_ln": "yes"}}, r"model_from_pretrained_kwargs\.fold_ln is neither"),
        ({"model_from_pretrained_kwargs": [1]}, "the dictionary's metadata: model_from_pretrained_kwargs"),
        ({"prepend_bos": "no"}, "the dictionary's metadata: prepend_bos"),
        ({"seqpos_slice": [1, 2, 3, 4]}, "the dictionary's metadata: seqpos_slice"),
        ({"seqpos_slice": [40, 50]}, r"seqpos_slice = \[40, 50\] leaves nothing of 32 positions"),
        ({"seqpos_slice": [0, 5, 0]}, r"seqpos_slice = \[0, 5, 0\] leaves nothing"),
        ({"exclude_special_tokens": ["a"]}, "the dictionary's metadata: exclude_special_tokens"),
        ({"sequence_separator_token": "stop"}, "the dictionary's metadata: sequence_separator_token"),
        (
            {"hook_name": "blocks.1.attn.hook_z", "model_from_pretrained_kwargs": PROCESSED},
            "refactor_factored_attn_matrices cannot be had",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(saved, facts, told):
    with pytest.raises(SaekitError, match=told):
        Evaluator(tokens=100)(saved(**facts))


def test_the_users_own_model_has_the_users_own_weights(saved, gpt2):
    """Its revision and what it was loaded with are the user's affair, its processing is not."""
    kwargs = {"revision": "step1000", "load_in_8bit": True, "center_writing_weights": True}
    source, _ = contexts_of(saved(model_from_pretrained_kwargs=kwargs), model=gpt2)
    assert source.provenance("heldout")["processing"] == ["center_writing_weights"]


def test_revision_and_dtype_are_those_that_the_dictionary_names(saved, monkeypatch):
    asked = []

    def load(name, **settings):
        asked.append(settings)
        return load_model(name, **{**settings, "revision": None})

    monkeypatch.setattr(model, "load_model", load)
    monkeypatch.setattr("saekit.activations.source.load_model", load)
    path = saved(model_from_pretrained_kwargs={"revision": "step1000", "dtype": "torch.bfloat16"})
    source, _ = contexts_of(path)
    contexts_of(path, dtype="float32")
    assert [(each["revision"], each["dtype"]) for each in asked] == [("step1000", "bfloat16"), ("step1000", "float32")]
    assert source.provenance("heldout")["model_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({"disable_concat_sequences": True}, "beginnings of documents alone"),
        ({"hook_name": "blocks.1.ln1.hook_normalized"}, "now calls 'blocks.1.ln1.hook_out'"),
    ],
)
def test_what_is_not_done_here_is_told(saved, facts, told):
    with pytest.warns(SaekitWarning, match=told):
        Evaluator(tokens=100)(saved(**facts))


def test_a_model_of_the_users_that_is_processed_otherwise_is_told(saved, gpt2):
    plain, processed = load_model(gpt2), load_model(gpt2, processing=["center_writing_weights"])
    hugging_face = plain.original_model
    centred = saekit.load(saved(model_from_pretrained_kwargs={"center_writing_weights": True, "center_unembed": True}))
    silent = saekit.load(saved())
    tokens = torch.randint(1, 4096, (2, 8))

    def uses(sae, model, hook=HOOK):
        yield lambda: saekit.splice(model, sae, hook).__enter__()
        if hook == HOOK:
            yield lambda: evaluate(sae, model, tokens)
            yield lambda: study_features(sae, model, tokens, features=[0])

    lacks = "was trained on a model with center_writing_weights, which this one lacks"
    for sae, model_, told in ((centred, plain, lacks), (silent, processed, "was not trained on a model with center")):
        for use in uses(sae, model_):
            with pytest.warns(SaekitWarning, match=told) as seen:
                use()
            assert seen[0].filename == __file__
            model_.reset_hooks(including_permanent=True)
            for name in ("hook_features", "hook_reconstruction"):
                point = model_.hook_dict[HOOK]
                if hasattr(point, name):
                    delattr(point, name)
                    model_._hook_registry.pop(f"{HOOK}.{name}")
    with pytest.warns(SaekitWarning, match=lacks):
        saekit.splice(hugging_face, centred, "transformer.h.1").__enter__()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(centred, processed, tokens)
        evaluate(silent, plain, tokens)


def test_a_cache_of_another_kind_is_told(saved, gpt2, tmp_path):
    facts = {"model": gpt2, "hook": HOOK, "prepend_bos": True}
    ActivationCache.from_tensor(tmp_path / "cache", torch.randn(4096, 32), provenance=facts)
    for told, match in (
        ({"prepend_bos": False}, "prepend_bos"),
        ({"model_from_pretrained_kwargs": PROCESSED}, "fold_ln"),
    ):
        with pytest.warns(SaekitWarning, match=f"the cache .* differs .*{match}"):
            Evaluator(tokens=1024, cache=tmp_path / "cache")(saved(**told))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Evaluator(tokens=1024, cache=tmp_path / "cache")(saved(prepend_bos=True))


def test_judging_by_no_tokens_is_refused():
    for settings, told in (({"tokens": 0}, "tokens = 0"), ({"context_length": -4}, "context_length = -4")):
        with pytest.raises(SaekitError, match=f"{told} is no number of tokens"):
            Evaluator(**settings)


@pytest.mark.parametrize("x", [torch.randn(3, 32), [[1.0] * 32], [torch.randn(2, 3, 32)], [np.ones((3, 32))]])
def test_activations_that_come_in_no_batches_are_named(saved, x):
    with pytest.raises(SaekitError, match=r"batches, each a tensor \[m, d_in\], not (of shape|list|ndarray)"):
        evaluate_activations(saekit.load(saved()), x)
