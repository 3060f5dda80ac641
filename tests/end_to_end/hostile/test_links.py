"""Links, pipes and folders in place of files: not followed, not waited at, not written through."""

from __future__ import annotations

import json
import os
import shutil
import stat
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hostile import LIVE, RESUME, RESUME_CACHE, ends, read_all

import saekit
from saekit import SaekitError
from saekit.activations import ActivationCache
from saekit.files import replace_file

LINKS = {  # a file that is a link out of its folder, and what comes upon it
    "sae/cfg.json": "info sae",
    "sae/sae_weights.safetensors": "convert sae new",
    "dictionary_learning/ae.pt": "info dictionary_learning",
    "sparsify/sae.safetensors": "info sparsify",
    "finished/sae/cfg.json": "eval finished --cache cache",
    "finished/sae/sae_weights.safetensors": "train --resume --out finished",
    "cache/shard-00001.safetensors": "train --cache cache --out new",
    "cache/shard-00002.safetensors": "cache verify cache --quiet",
}


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("relative", [True, False])
def test_links_that_lead_out(name, relative, place, saekit_main):
    outside = place / "outside"
    (place / name).rename(outside)
    (place / name).symlink_to(os.path.relpath(outside, (place / name).parent) if relative else outside)
    done = saekit_main(*LINKS[name].split(), cwd=place)
    ends(done, 2)
    assert "is a link that leads out of its folder" in done.stderr
    assert Path(name).name in done.stderr


def test_a_folder_may_itself_be_a_link_and_links_may_stay_inside(place):
    (place / "linked").symlink_to("sae")
    (place / "sae/sae_weights.safetensors").rename(place / "sae/w")
    (place / "sae/sae_weights.safetensors").symlink_to("w")
    assert saekit.load(place / "linked").cfg.d_sae == 16
    (place / "linked cache").symlink_to(place / "cache")
    assert len(ActivationCache.open(place / "linked cache")) == 1000


def test_the_cache_of_the_hub(place):
    """There, what lies in ``snapshots/REVISION`` is a link into ``blobs``, and nowhere else."""
    hub = place / "models--someone--sae"
    (hub / "blobs").mkdir(parents=True)
    for folder, up in (("snapshots/abc", "../../blobs"), ("snapshots/def/layer_1/width_16", "../../../../blobs")):
        (hub / folder).mkdir(parents=True)
        for number, name in enumerate(("cfg.json", "sae_weights.safetensors")):
            shutil.copy(place / "sae" / name, hub / f"blobs/{number}")
            (hub / folder / name).symlink_to(f"{up}/{number}")
        assert saekit.load(hub / folder).cfg.d_sae == 16
    link = hub / "snapshots/abc/cfg.json"
    (hub / "refs").mkdir()
    for outside in (place / "sae/cfg.json", hub / "cfg.json", hub / "refs/main"):
        if not outside.exists():
            shutil.copy(place / "sae/cfg.json", outside)
        link.unlink()
        link.symlink_to(os.path.relpath(outside, link.parent))
        with pytest.raises(SaekitError, match="leads out of its folder"):
            saekit.load(hub / "snapshots/abc")


def secret(folder):
    """A dataset of one document that nobody offered."""
    from datasets import Dataset

    Dataset.from_dict({"text": ["the secret"] * 50}).save_to_disk(str(folder))
    return folder / "data-00000-of-00001.arrow"


@pytest.mark.parametrize(
    "name", ["../../secret/data-00000-of-00001.arrow", "/secret", "..", "a/b.arrow", "", None, 5, "\0"]
)
def test_a_saved_dataset_that_names_other_files(name, saved, marker):
    file = secret(saved / "secret")
    for path in ("saved", "splits"):
        state = saved / path / ("state.json" if path == "saved" else "train/state.json")
        found = json.loads(state.read_text())
        found["_data_files"] = [{"filename": str(file) if name == "/secret" else name}]
        state.write_text(json.dumps(found))
        assert read_all(saved / path) is None


@pytest.mark.parametrize("splits", [["../secret"], ["../saved/../secret"], ["/absolute"], [".."]])
def test_a_dictionary_of_datasets_that_names_other_folders(splits, saved, marker):
    secret(saved / "secret")
    splits = [str(saved / "secret") if split == "/absolute" else split for split in splits]
    (saved / "splits/dataset_dict.json").write_text(json.dumps({"splits": splits}))
    for split in ("train", *splits):
        assert read_all(saved / "splits", split=split) is None


@pytest.mark.parametrize("what", ["table", "state", "folder of a split"])
def test_a_saved_dataset_that_is_a_link(what, saved):
    """Files and folders in it that are links out of it are not followed."""
    file = secret(saved / "secret")
    link, target = {
        "table": (saved / "saved" / file.name, file),
        "state": (saved / "saved/state.json", saved / "secret/state.json"),
        "folder of a split": (saved / "splits/train", saved / "secret"),
    }[what]
    clear(link)
    link.symlink_to(target)
    for path in ("saved", "splits"):
        assert not any("secret" in text for text in read_all(saved / path) or ())


IN_THE_WAY = {  # a file in whose place something else stands, and what comes upon it
    "sae/cfg.json": "info sae",
    "sae/sae_weights.safetensors": "info sae",
    "dictionary_learning/ae.pt": "info dictionary_learning",
    "any.pt": "info any.pt",
    "finished/sae/cfg.json": "train --resume --out finished --eval-tokens 0 --quiet",
    "finished/eval.json": "train --resume --out finished --quiet",
    "finished/config.yaml": "train --resume --out finished --eval-tokens 0 --quiet",
    "cache/manifest.json": "info cache",
    "cache/shard-00000.safetensors": "train --cache cache --out new",
    "cache/shard-00001.safetensors": "cache verify cache --quiet",
    "cache/shard-00002.safetensors": "eval sae --cache cache --quiet",
    "begun.part/harvest.jsonl": RESUME_CACHE,
    "begun.part/manifest.json": RESUME_CACHE,
    "begun.part": RESUME_CACHE,
    "stopped/config.yaml": RESUME,
    "stopped/checkpoints/step-8.safetensors": RESUME,
    "stopped/checkpoints/step-10.safetensors": RESUME,
    "stopped/checkpoints/step-10.pt": RESUME,
    "stopped/checkpoints/step-10.safetensors.part": RESUME,
    "stopped/metrics.jsonl": RESUME,
    "stopped/metrics.jsonl.part": RESUME,
    "stopped/config.yaml.part": RESUME,
    "stopped/statistics.safetensors": RESUME,
    "stopped/statistics.safetensors.part": RESUME,
    "stopped/eval.json": RESUME.replace(" --eval-tokens 0", ""),
    "stopped/sae": RESUME,
    "stopped/sae/cfg.json": RESUME,
    "stopped/sae/cfg.json.part": RESUME,
    "several/sweep.yaml": "train --resume --out several",
    "model/config.json": LIVE,
    "model/tokenizer.json": LIVE,
    "model/tokenizer_config.json": LIVE,
    "model/model.safetensors": LIVE,
    "text.txt": "cache --dataset text.txt --out new",
    "splits/train/state.json": "cache --dataset splits --out new",
    "saved/state.json": "cache --dataset saved --out new",
    "saved/dataset_info.json": "cache --dataset saved --out new",
    "saved/data-00000-of-00001.arrow": "cache --dataset saved --out new",
    "saved/more.arrow": "cache --dataset saved --out new --tokens 100 --context-length 8 --quiet",
    "texts/train.jsonl": "cache --dataset texts --out new",
}


def waiting(fifo):
    """What somebody waits for at a FIFO, at this moment; it is let go."""
    for mode, waits in ((os.O_WRONLY, "to read"), (os.O_RDONLY, "to write")):
        with suppress(OSError):  # there is no reader to write to, or the FIFO has gone
            number = os.open(fifo, mode | os.O_NONBLOCK)
            try:
                if stat.S_ISFIFO(os.fstat(number).st_mode) and (mode == os.O_WRONLY or has_writer(number)):
                    return waits
            finally:
                os.close(number)
    return None


def has_writer(number):
    try:
        return bool(os.read(number, 1))
    except BlockingIOError:  # who has written nothing yet
        return True


@contextmanager
def nobody_waits(fifo):
    """See that nothing waits at a FIFO that nobody else opens: for who does, there is no end of it."""
    done, waited = threading.Event(), []

    def watch():
        while not done.wait(0.05):
            if (waits := waiting(fifo)) is not None:
                waited.append(waits)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    assert not waited, f"waited for '{fifo.name}' {waited[0]}"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.parametrize(("mode", "expected"), [("r", "to read"), ("w", "to write")])
def test_whoever_waits_is_seen_and_let_go(tmp_path, mode, expected):
    seen = threading.Event()
    os.mkfifo(tmp_path / "fifo")

    def use():
        with open(tmp_path / "fifo", mode):
            seen.wait()

    thread = threading.Thread(target=use)
    thread.start()
    while (found := waiting(tmp_path / "fifo")) is None:
        time.sleep(0.01)
    seen.set()
    thread.join()
    assert found == expected


@pytest.fixture
def full_place(place, saved):
    """With datasets beside the rest."""
    for name in ("saved", "splits"):
        (saved / name).rename(place / name)
    (place / "texts").mkdir()
    (place / "texts/train.jsonl").write_text('{"text": "a"}\n')
    return place


def clear(path):
    """Make room for something else in place of a file or folder."""
    path.parent.mkdir(exist_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("name", IN_THE_WAY)
def test_a_folder_in_place_of_a_file(name, full_place, saekit_main):
    clear(full_place / name)
    (full_place / name / "precious").mkdir(parents=True)
    done = saekit_main(*IN_THE_WAY[name].split(), cwd=full_place)
    ends(done, 0, 2)
    assert (full_place / name / "precious").is_dir(), "it is not for us to remove"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.parametrize("name", IN_THE_WAY)
def test_nothing_waits_at_a_fifo(name, full_place, saekit_main):
    clear(full_place / name)
    os.mkfifo(full_place / name)
    with nobody_waits(full_place / name):
        done = saekit_main(*IN_THE_WAY[name].split(), cwd=full_place)
    ends(done, 0, 2)


@pytest.mark.parametrize("name", IN_THE_WAY)
def test_a_link_to_itself_in_place_of_a_file(name, full_place, saekit_main):
    clear(full_place / name)
    (full_place / name).symlink_to(Path(name).name)
    ends(saekit_main(*IN_THE_WAY[name].split(), cwd=full_place), 0, 2)


@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.jsonl", "statistics.safetensors", "sae/cfg.json", "eval.json"]
)
@pytest.mark.parametrize("suffix", ["", ".part"])
def test_a_run_is_not_written_through_links(name, suffix, place, saekit_main):
    """They are replaced, not followed: what they lead to stays as it is."""
    victim = place / "victim"
    victim.write_text((place / "stopped/config.yaml").read_text())
    before = victim.read_bytes()
    clear(place / f"stopped/{name}{suffix}")
    (place / f"stopped/{name}{suffix}").symlink_to(victim)
    ends(saekit_main(*RESUME.split(), cwd=place), 0, 2)
    assert victim.read_bytes() == before


def test_a_temporary_file_that_is_a_link_is_not_followed(tmp_path):
    """As in a cache of somebody else's that is repaired, where they might stand beside each shard."""
    for name in ("x", "shard-00000.safetensors"):
        victim = tmp_path / "victim"
        victim.write_text("precious")
        (tmp_path / f"{name}.part").symlink_to(victim)
        replace_file(tmp_path / name, lambda part: part.write_text("new"))
        assert victim.read_text() == "precious"
        assert (tmp_path / name).read_text() == "new"
        assert not (tmp_path / name).is_symlink()
