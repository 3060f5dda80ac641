"""Dictionaries on the hub, against a stand-in of it and its own client's cache: no network."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_stand_in import FIGURES, StandIn, make_run, stand_in

import saekit
from saekit import SaekitError, SparseAutoencoder
from saekit.formats import FORMATS
from saekit.publish import push

pytestmark = pytest.mark.filterwarnings("ignore:Cannot enable progress bars")
DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A hub that this process's client asks, with an empty cache and a token that may write."""
    from huggingface_hub import close_session, constants

    with stand_in() as standing:
        cache = str(tmp_path / "cache")
        settings = {
            "ENDPOINT": standing.url,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": cache,
            "HF_HUB_DISABLE_XET": True,
        }
        settings["HF_HUB_DISABLE_PROGRESS_BARS"] = True
        settings["HUGGINGFACE_CO_URL_TEMPLATE"] = standing.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        close_session()
        yield standing
        close_session()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def dictionary_files(name: str = "saelens_topk") -> dict[str, bytes]:
    return {file: (DATA / name / file).read_bytes() for file in ("cfg.json", "sae_weights.safetensors")}


def same(a: SparseAutoencoder, b: SparseAutoencoder) -> bool:
    return a.cfg == b.cfg and all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def test_push_and_load_by_the_commands(hub, run, tmp_path, saekit_main):
    done = saekit_main("push", run, "me/saes/layer 1/k3", "--message", "mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'saekit.load("hf://me/saes/layer 1/k3")' in done.stdout
    there = hub.files("me/saes")
    assert there.keys() - {".gitattributes"} == {
        "README.md",
        *(f"layer 1/k3/{name}" for name in ("cfg.json", "sae_weights.safetensors", "eval.json", "README.md")),
    }
    assert hub.repos["me/saes"].messages[-1] == "mine"
    hub.asked.clear()
    assert same(saekit.load("hf://me/saes/layer 1/k3"), saekit.load(run))
    assert hub.fetched() == [f"layer 1/k3/{name}" for name in ("cfg.json", "eval.json", "sae_weights.safetensors")]
    saekit.load("hf://me/saes/layer 1/k3")
    assert hub.fetched() == []  # all in the cache

    told = saekit_main("info", "hf://me/saes/layer 1/k3", cwd=tmp_path)
    assert json.loads(told.stdout)["d_sae"] == 20, told.stderr
    assert saekit_main("convert", "hf://me/saes/layer 1/k3", "here", cwd=tmp_path).returncode == 0
    assert torch.equal(saekit.load(tmp_path / "here").W_enc, saekit.load(run).W_enc)
    told = saekit_main("eval", "hf://me/saes/layer 1/k3", cwd=tmp_path)
    assert (told.returncode, told.stderr.count("\n")) == (2, 1)
    assert "'hf://me/saes/layer 1/k3' does not say which model it belongs to" in told.stderr


def test_no_path_of_this_machine_is_pushed(hub, run):
    sae = saekit.load(run).with_metadata(dataset_path="/home/me/secret/book.txt", saekit={"cache": "/home/me/secret/c"})
    (run / "eval.json").write_text(
        json.dumps({**FIGURES, "about": {"dictionary": "/home/me/secret/run", "part": "a/b"}})
    )
    sae.save(run / "sae", overwrite=True)
    push(run, "me/saes")
    there = hub.files("me/saes")
    assert not [name for name, content in there.items() if b"secret" in content]
    assert json.loads(there["cfg.json"])["metadata"]["dataset_path"] == "book.txt"
    assert json.loads(there["eval.json"])["about"] == {"dictionary": "run", "part": "a/b"}
    assert torch.equal(saekit.load("hf://me/saes").W_enc, sae.W_enc)


def test_what_is_there_is_not_replaced_unasked(hub, run, saekit_main, tmp_path):
    mine = ["push", run, "me/saes/a"]
    other = ["push", DATA / "saelens_jumprelu", "me/saes/a"]
    assert saekit_main(*mine, cwd=tmp_path).returncode == 0
    before = hub.files("me/saes")
    refused = saekit_main(*other, cwd=tmp_path)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "holds a/cfg.json already" in refused.stderr
    assert "--overwrite" in refused.stderr
    assert hub.files("me/saes") == before

    assert saekit_main(*other, "--overwrite", cwd=tmp_path).returncode == 0
    after = hub.files("me/saes")
    assert "a/eval.json" not in after  # it was the other one's
    assert "without an evaluation" in after["a/README.md"].decode()
    assert same(saekit.load("hf://me/saes/a"), saekit.load(DATA / "saelens_jumprelu"))
    assert saekit_main("push", run, "me/saes/a/b", cwd=tmp_path).returncode == 0  # beside it, not in its place
    assert after.items() <= hub.files("me/saes").items()


def test_a_card_of_their_own_stays(hub, run):
    hub.add("me/mine", {"README.md": b"my words", "notes.txt": b"more"})
    push(run, "me/mine")
    assert hub.files("me/mine")["README.md"] == b"my words"
    assert hub.files("me/mine")["notes.txt"] == b"more"
    assert same(saekit.load("hf://me/mine"), saekit.load(run))


def test_what_is_no_dictionary_s_stays_when_overwriting_too(hub, run):
    """A model's config and card, or those above sparsify's hook points."""
    theirs = {"config.json": b"{}", "model.safetensors": b"weights", "README.md": b"my words"}
    hub.add("me/model", theirs)
    with pytest.raises(SaekitError, match="holds config.json already"):
        push(run, "me/model")
    push(run, "me/model", overwrite=True)
    assert theirs.items() <= hub.files("me/model").items()
    assert same(saekit.load("hf://me/model"), saekit.load(run))


def test_branches_and_commits(hub, run):
    push(DATA / "saelens_standard", "me/x")
    first = hub.repos["me/x"].branches["main"]
    push(run, "me/x@wide%2Fer", overwrite=True)
    assert hub.repos["me/x"].branches["main"] == first
    assert same(saekit.load("hf://me/x"), saekit.load(DATA / "saelens_standard"))
    assert same(saekit.load("hf://me/x@wide%2Fer"), saekit.load(run))
    assert same(saekit.load(f"hf://me/x@{first}"), saekit.load(DATA / "saelens_standard"))
    with pytest.raises(SaekitError, match="'me/x' has no revision 'narrow'"):
        saekit.load("hf://me/x@narrow")
    with pytest.raises(SaekitError, match="names a commit"):
        push(run, f"me/x@{first}")


def test_private(hub, run, monkeypatch):
    push(run, "me/closed", private=True)
    assert hub.repos["me/closed"].private
    push(run, "me/open")
    with pytest.raises(SaekitError, match="'me/open' is public already"):
        push(run, "me/open/x", private=True)
    assert not any(name.startswith("x/") for name in hub.files("me/open"))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SaekitError, match="no repository 'me/closed' on the hub, or none that your token may see"):
        saekit.load("hf://me/closed")
    hub.repos["me/open"].gated = True
    with pytest.raises(SaekitError, match="'me/open' asks for an agreement"):
        saekit.load("hf://me/open")


def test_nobody_is_overtaken(hub, run):
    """A commit that comes between looking and writing is not built over."""
    hub.add("me/x", {})
    hub.before_commit = lambda: hub.repos["me/x"].commit("main", {"cfg.json": b"theirs"})
    with pytest.raises(SaekitError, match="somebody else has written to 'me/x' meanwhile"):
        push(run, "me/x")
    assert hub.files("me/x") == {"cfg.json": b"theirs"}


@pytest.mark.parametrize(
    ("token", "message"),
    [(None, "there is no token to write to the hub with"), ("hf_reader", "may not write to 'me/x'")],
)
def test_no_right_to_write(token, message, hub, run, monkeypatch, saekit_main, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    for known in (False, True):
        if known:
            hub.add("me/x", {})
        done = saekit_main("push", run, "me/x", cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert message in done.stderr
    assert hub.files("me/x").keys() == {".gitattributes"}


def test_nothing_broken_is_pushed(hub, run, tmp_path):
    weights = run / "sae/sae_weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    with pytest.raises(SaekitError, match="damaged"):
        push(run, "me/x")
    weights.write_bytes(whole)
    (run / "eval.json").write_text(json.dumps({**FIGURES, "about": {"d_in": 7}}))
    with pytest.raises(SaekitError, match="another d_in"):
        push(run, "me/x")
    (tmp_path / "private.key").write_text("{}")
    (run / "eval.json").unlink()
    (run / "eval.json").symlink_to(tmp_path / "private.key")
    with pytest.raises(SaekitError, match="leads out of its folder"):
        push(run, "me/x")
    assert not hub.repos


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("hf://me/nothing", "there is no repository 'me/nothing'"),
        ("hf://me/x/layer_11", "'me/x' holds no dictionary at 'layer_11'; did you mean 'layer_1' or 'layer_2'"),
        ("hf://me/x", "'me/x' holds no dictionary at its root; choose from layer_1, layer_2"),
        ("hf://me/empty", "'me/empty' holds no dictionary in a known format"),
        ("hf://me/empty/model.safetensors", "'me/empty' holds no dictionary in a known format"),
        ("hf://me", "'hf://me' names no repository of the hub; write hf://owner/repo/path"),
        ("hf://me/x/../../y", "names no folder of a repository"),
        ("hf://me/x/..%2f", "no dictionary at '..%2f'"),
        ("hf://me/x@a/../b", "names no folder"),
        ("hf://me/x@..%2Fb", "names no revision after '@'"),
        ("hf://../x/y", "names no repository"),
    ],
)
def test_mistakes(path, message, hub, tmp_path, saekit_main):
    files = {f"{folder}/{name}": b"{}" for folder in ("layer_1", "layer_2") for name in dictionary_files()}
    hub.add("me/x", files)
    hub.add("me/empty", {"model.safetensors": b"x"})
    done = saekit_main("info", path, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert message in done.stderr
    assert hub.fetched() == []


def test_only_what_is_needed_is_fetched(hub):
    extra = dict.fromkeys(("optimizer.pt", "README.md", "checkpoints/step-1.safetensors", "sae/model.bin"), b"x" * 99)
    files = {f"l1/{name}": content for name, content in {**dictionary_files(), **extra}.items()}
    files |= {f"l2/sae/{name}": content for name, content in dictionary_files("saelens_standard").items()}
    hub.add("me/x", {**files, "l2/eval.json": b"{}", "l1/other/cfg.json": b"{}"})
    assert same(saekit.load("hf://me/x/l1"), saekit.load(DATA / "saelens_topk"))
    assert hub.fetched() == ["l1/cfg.json", "l1/sae_weights.safetensors"]
    assert same(saekit.load("hf://me/x/l2"), saekit.load(DATA / "saelens_standard"))
    assert hub.fetched() == ["l2/eval.json", "l2/sae/cfg.json", "l2/sae/sae_weights.safetensors"]


PACKAGES = {
    "dictionary_learning_AutoEncoderTopK": "",
    "saelens_layer_norm": "",
    "sparsify": "layers.3",
    "gemma_scope/gemma-scope-2b-pt-res": "layer_20/width_16k/average_l0_71",
    "gemma_scope_2/gemma-scope-2-270m-pt": "resid_post/layer_9_width_16k_l0_small",
    "openai_topk": "gpt2-small/resid_post_mlp_v5_32k/autoencoders/6.pt",
}


@pytest.mark.parametrize("name", PACKAGES)
def test_dictionaries_of_other_packages(name, hub, tmp_path):
    """They are what they are in a folder, and go to the hub as saekit and SAELens write them."""
    home, place = DATA / name, PACKAGES[name]
    repo = f"google/{home.name}" if "gemma" in name else "me/x"
    hub.add(repo, {str(file.relative_to(home)): file.read_bytes() for file in home.rglob("*") if file.is_file()})
    local, remote = saekit.load(home / place), saekit.load(f"hf://{repo}/{place}")
    assert same(local, remote)
    assert not any("expected" in file for file in hub.fetched())
    push(home / place, "me/pushed/x")
    assert {"x/cfg.json", "x/sae_weights.safetensors", "x/README.md"} < hub.files("me/pushed").keys()
    assert not any(file.endswith((".pt", ".npz")) for file in hub.files("me/pushed"))
    pushed = saekit.load("hf://me/pushed/x")
    torch.testing.assert_close(pushed.W_enc, local.W_enc)
    for fact in ("model_name", "hook_name"):
        assert pushed.cfg.metadata.get(fact) == local.cfg.metadata.get(fact)


def test_a_format_of_another_package(hub, monkeypatch):
    """The hub's half knows of files what the registry says."""

    class Renamed(type(FORMATS["saelens"])):
        weights, requires, optional = ("theirs.safetensors",), ("theirs.json",), ("../common.json",)

        def read(self, file):
            raise SaekitError(f"{sorted(each.name for each in file.parent.iterdir())} beside {file.parents[1].name}")

    files = {"a/theirs.safetensors": b"x", "a/theirs.json": b"{}", "a/cfg.json": b"{}", "common.json": b"[]"}
    hub.add("me/x", files)
    with pytest.raises(SaekitError, match="holds no dictionary in a known format"):
        saekit.load("hf://me/x/a")
    monkeypatch.setitem(FORMATS, "renamed", Renamed())
    with pytest.raises(SaekitError, match=r"\['theirs.json', 'theirs.safetensors'\] beside"):
        saekit.load("hf://me/x/a")
    assert hub.fetched() == ["a/theirs.json", "a/theirs.safetensors", "common.json"]


def test_a_download_that_was_cut_off_is_no_dictionary(hub, monkeypatch):
    """The configs come first, so what lacks the weights is not taken for whole."""
    from huggingface_hub import constants

    hub.add("me/x", dictionary_files())
    hub.missing = "sae_weights.safetensors"
    with pytest.raises(SaekitError, match="hf://me/x' cannot be read"):
        saekit.load("hf://me/x")
    assert hub.fetched() == ["cfg.json"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SaekitError, match="'hf://me/x' is not in the cache"):
        saekit.load("hf://me/x")


def test_files_of_strangers_are_checked(hub):
    hub.add("me/x", {"cfg.json": b"{" * 99, "sae_weights.safetensors": b"x"})
    with pytest.raises(SaekitError, match="damaged"):
        saekit.load("hf://me/x")


def test_a_cache_that_shares_blobs(hub, tmp_path):
    """The client keeps some blobs for all repositories, under their hashes; other links out are not followed."""
    hub.add("me/x", dictionary_files())
    expected = saekit.load("hf://me/x")
    cache = tmp_path / "cache"
    store = cache / "blobs" / "ab" / ("ab" * 32)
    store.parent.mkdir(parents=True)
    weights = next(cache.glob("models--me--x/snapshots/*/sae_weights.safetensors"))
    blob = weights.resolve()
    assert blob.parent.name == "blobs"
    blob.rename(store)
    blob.symlink_to(os.path.relpath(store, blob.parent))
    assert same(saekit.load("hf://me/x"), expected)
    outside = store.rename(cache / "elsewhere")
    store.symlink_to(outside)
    with pytest.raises(SaekitError, match="leads out of its folder"):
        saekit.load("hf://me/x")


def test_without_a_network(hub, tmp_path, monkeypatch, saekit_main):
    from huggingface_hub import constants

    hub.add("me/x", {f"{folder}/{name}": c for folder in ("a", "b/sae") for name, c in dictionary_files().items()})
    expected = saekit.load("hf://me/x/a")
    saekit.load("hf://me/x/b")
    hub.broken = 503
    done = saekit_main("info", "hf://me/x/a", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr == "saekit: the hub does not answer (503); using the copy of 'hf://me/x/a' in the cache\n"
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        assert same(saekit.load("hf://me/x/a"), expected)
        done = saekit_main("info", "hf://me/y", cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "the hub cannot be reached (" in done.stderr
        assert "'hf://me/y' is not in the cache" in done.stderr
        done = saekit_main("push", DATA / "saelens_topk", "me/x/c", cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    done = saekit_main("info", "hf://me/x/b", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for path in ("me/x/c", "me/x@other/a", "me/y"):
        with pytest.raises(SaekitError, match=f"HF_HUB_OFFLINE is set.*'hf://{path}' is not in the cache"):
            saekit.load(f"hf://{path}")
    with pytest.raises(SaekitError, match="HF_HUB_OFFLINE"):
        push(DATA / "saelens_topk", "me/x/c")
    assert not hub.asked


def test_offline_in_a_process_of_its_own(hub, tmp_path):
    hub.add("me/x", {f"y/{name}": content for name, content in dictionary_files().items()})
    saekit.load("hf://me/x/y")
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    script = "import saekit; print(saekit.load('hf://me/x/y').cfg.d_sae)"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert (done.stdout, done.stderr) == ("20\n", "")
