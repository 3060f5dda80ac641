"""Models of sixteen families, tiny and random, through cache, train, eval and splice; nothing is installed by any."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers
from families import FAMILIES, LAYERS, WIDTH, Family

import saekit
from saekit.activations import ActivationCache, ActivationSource, load_model
from saekit.activations.model import truncated
from saekit.card import card
from saekit.special_tokens import special_tokens


@pytest.fixture(scope="module", autouse=True)
def called(tmp_path_factory):
    """The file that is there once anything has called a stand-in for pip, uv, conda or ``python -m pip``.

    It is of the module and comes first, so that models are loaded under it too.
    """
    home = tmp_path_factory.mktemp("installers")
    with pytest.MonkeyPatch.context() as patch:
        for key, value in families.write_installers(home).items():
            patch.setenv(key, value)
        yield home / "called"


@pytest.fixture(autouse=True)
def nothing_is_installed(called):
    """No test leaves a stand-in called."""
    yield
    assert not called.exists(), called.read_text()


@dataclass(frozen=True)
class Made:
    """A family's model in a folder, and the same model as transformers has it."""

    name: str
    family: Family
    folder: Path
    text: Path

    def plain(self) -> Any:
        kind = getattr(transformers, self.family.model)
        return kind.from_pretrained(self.folder, dtype=torch.float32).eval()

    def hidden_states(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """What each block leaves in the residual stream, by transformers alone; the last has passed the final norm."""
        model = self.plain()
        with torch.no_grad():
            run = model if self.family.causal or self.name == "bert" else model.encoder
            states = run(tokens, output_hidden_states=True).hidden_states
        return list(states[self.family.first :])[:LAYERS] if self.family.first else [*states[: LAYERS - 1], states[-1]]


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    families.write_model(folder / "model", FAMILIES[request.param])
    return Made(request.param, FAMILIES[request.param], folder / "model", families.write_text(folder / "text.jsonl"))


@pytest.fixture(scope="module")
def bridge(made):
    return load_model(str(made.folder), device="cpu")


def some_tokens(rows=2, length=24):
    """Ordinary ones, no special ones among them."""
    return torch.randint(8, families.VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_activations_are_the_models_own(made, bridge):
    tokens = some_tokens()
    expected = made.hidden_states(tokens)
    for layer, state in enumerate(expected):
        with truncated(bridge, [made.family.hook.format(layer)]) as run:
            x = run(tokens)[0]
        assert x.shape == (*tokens.shape, WIDTH)
        if layer == LAYERS - 1 and made.family.norm:  # the hook is before the norm, output_hidden_states after it
            x = made.plain().get_submodule(made.family.norm)(x).detach()
        close(x, state)


def test_contexts_begin_as_the_family_does_and_the_mask_says_so(made, bridge):
    source = ActivationSource.open(
        str(made.folder), made.family.hook.format(0), str(made.text), context_length=16, loaded=bridge
    )
    batch = next(source.contexts("train"))
    assert int(batch.tokens.max()) < families.VOCABULARY  # no row of the embedding that nobody trained
    own = transformers.AutoTokenizer.from_pretrained(made.folder)
    if made.family.bos is None:
        assert (batch.tokens[:, 0] >= len(set(made.family.special.values()))).sum() > len(batch.tokens) / 2
    else:
        assert (batch.tokens[:, 0] == own.convert_tokens_to_ids(made.family.bos)).all()
    assert not batch.kept[:, 0].any()
    end = own.convert_tokens_to_ids(made.family.special.get("eos_token") or made.family.special["sep_token"])
    assert torch.equal(batch.kept[:, 1:], batch.tokens[:, 1:] != end)  # the text itself holds no special token
    assert len(batch.documents.unique()) > 3
    assert source.provenance("train")["mask"].startswith("text positions; the first of each context, BOS")


def test_cache_train_and_eval(made, bridge, saekit_main, tmp_path):
    hook = made.family.hook.format(0)
    where = ["--model", made.folder, "--dataset", made.text, "--context-length", 16, "--quiet"]
    where += ["--hook", hook] if made.name == "t5" else []  # of the others it is the one that is taken if not given
    done = saekit_main("cache", *where, "--tokens", 1200, "--dtype", "float32", "--out", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    cache = ActivationCache.open(tmp_path / "cache")
    rows = cache.read(0, 300)
    source = ActivationSource.open(str(made.folder), hook, str(made.text), context_length=16, loaded=bridge, pool=1200)
    contexts = next(source.mixed("train"))
    expected = made.hidden_states(contexts.tokens)[0][contexts.kept][:300]
    close(rows.x[: len(expected)], expected)
    assert int(rows.positions.min()) == 1
    done = saekit_main(
        "train", *where, "--tokens", 2048, "--batch-size", 256, "--width", 64, "--k", 4, "--buffer", 1024,
        "--calibration-tokens", 256, "--eval-tokens", 400, "--features-shown", 8, "--out", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = saekit_main("eval", tmp_path / "run", "--tokens", 400, "--out", tmp_path / "report.json", "--quiet")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert json.loads((tmp_path / "run/eval.json").read_text())["reconstruction"] == report["reconstruction"]
    assert report["about"]["hook"] == hook
    assert 0 < report["reconstruction"]["fvu"] < 1
    page = (tmp_path / "run/report.html").read_text()
    why = "no next-token figures: the model is not causal: its predictions depend on later tokens"
    if made.family.causal:
        assert report["downstream"]["ce_zero"] > 0
        assert "no_downstream" not in report["about"]
    else:
        assert set(report) == {"about", "sparsity", "reconstruction"}
        assert report["about"]["no_downstream"] == why
        assert why in " ".join(done.stdout.split())
        assert why in page
        assert why in card(tmp_path / "run")


def test_splice_changes_text_and_leaves_the_first_position(made, bridge):
    """On the bridge and on the plain model alike: x̂ is at each position but the first and where BOS is."""
    tokens = some_tokens()
    model, hook, layer = made.plain(), made.family.hook.format(0), f"{made.family.layers}.0"
    known = special_tokens(bridge).bos is not None
    if known:
        tokens[1, 5] = special_tokens(bridge).bos
    x = made.hidden_states(tokens)[0]
    sae = dictionary()
    kept = torch.ones_like(tokens, dtype=torch.bool)
    kept[:, 0] = False
    kept[1, 5] = not known
    expected = torch.where(kept[..., None], sae(x).detach(), x)
    with saekit.splice(bridge, sae, hook), truncated(bridge, [hook]) as run:
        close(run(tokens)[0], expected)
    if made.name == "bert":  # whose configuration does not tell its tokenizer's [CLS]
        expected[1, 5] = sae(x[1, 5]).detach()
    decoder = {"decoder_input_ids": tokens[:, :3]} if made.name == "t5" else {}
    with saekit.splice(model, sae, layer), outputs_of(model.get_submodule(layer)) as found, torch.no_grad():
        model(input_ids=tokens, **decoder)
    close(found[0], expected)


@pytest.mark.parametrize("made", [name for name, family in FAMILIES.items() if family.causal], indirect=True)
@pytest.mark.parametrize("padded", [False, True])
def test_splice_while_text_is_generated(made, padded):
    """With a cache, later passes of one token are no first positions; padding on the left moves the first one."""
    tokens = some_tokens(2, 9)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0 if padded else 1
    model, layer, sae = made.plain(), f"{made.family.layers}.0", dictionary()
    block = model.get_submodule(layer)
    with saekit.splice(model, sae, layer, positions="all", add_error=True), outputs_of(block) as plain:
        new = model.generate(tokens, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert new.shape == (2, 13)
    assert [each.shape[1] for each in plain] == [9, 1, 1, 1]
    with saekit.splice(model, sae, layer, steer={3: 50.0}, add_error=True), outputs_of(block) as steered:
        model.generate(tokens, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    moved = (steered[0] - plain[0]).norm(dim=-1) > 1
    expected = mask.bool() & (mask.cumsum(1) > 1)
    assert torch.equal(moved, expected)
    for each in steered[1:]:
        assert bool(((each @ sae.W_dec[3]).abs() > 20).all())


def dictionary():
    """Random directions, by whose inner products they are active."""
    sae = saekit.SparseAutoencoder(saekit.SAEConfig(WIDTH, 64, "topk", k=4))
    directions = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(directions))
        sae.W_enc.copy_(sae.W_dec.T)
    return sae.requires_grad_(False)


@contextmanager
def outputs_of(module):
    """The first output of each pass of a module, after hooks that are there already."""
    found = []
    handle = module.register_forward_hook(
        lambda module, args, out: found.append((out if isinstance(out, torch.Tensor) else out[0]).clone())
    )
    try:
        yield found
    finally:
        handle.remove()


@pytest.mark.parametrize("made", ["bert"], indirect=True)
def test_the_errors_of_an_encoder_are_taken_apart_without_their_cost(made, saekit_main, tmp_path):
    sae = dictionary()
    sae.cfg.metadata.update(model_name=str(made.folder), hook_name=made.family.hook.format(0), context_size=16)
    sae.cfg.metadata["dataset_path"] = str(made.text)
    sae.save(tmp_path / "sae")
    done = saekit_main(
        "eval", tmp_path / "sae", "--suite", "dark_matter", "--tokens", 400, "--out", tmp_path / "r.json", "--quiet"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert "cost" not in report["dark_matter"]
    assert "not causal" in report["about"]["no_downstream"]
