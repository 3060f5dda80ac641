"""Pickles that leave a trace, and what the tests ask of commands."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import torch

import saekit
from saekit import SaekitError
from saekit.activations import open_text
from saekit.activations.manifest import MANIFEST
from saekit.activations.shards import checksum
from saekit.activations.text import SPLITS
from saekit.seal import BLANK, stamp

EMBEDDED = Path(saekit.__file__).parent / "embedded"


RESUME = "train --resume --out stopped --eval-tokens 0 --quiet"


LIVE = "cache --model model --dataset text.txt --tokens 100 --context-length 8 --out new --quiet"


RESUME_CACHE = "cache --resume --out begun --quiet"


class Evil:
    """What makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def payloads(marker):
    """The ways in which files carry a pickle."""
    zipped, legacy, array = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"a": Evil(marker)}, zipped)
    torch.save({"a": Evil(marker)}, legacy, _use_new_zipfile_serialization=False)
    np.save(array, np.array([Evil(marker)], dtype=object), allow_pickle=True)
    return {
        "pickle": pickle.dumps(Evil(marker)),
        "pickle in ASCII": pickle.dumps(Evil(marker), protocol=0),
        "zip of torch": zipped.getvalue(),
        "old file of torch": legacy.getvalue(),
        "array of numpy": array.getvalue(),
    }


KINDS = tuple(payloads("x"))


def ends(done, *codes):
    """A command ended as it should: 0 for success, 2 for a mistake that it names in a line."""
    assert done.returncode in codes, (done.args, done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    if done.returncode:
        assert done.stderr.strip().splitlines()[-1].startswith("saekit: ")


def write_manifest(folder, facts):
    """A manifest with a good seal."""
    text = json.dumps({**facts, "seal": BLANK} if "seal" in facts else {"seal": BLANK, **facts})
    (folder / MANIFEST).write_bytes(stamp(text.encode()))


def read_all(path, **options):
    """Every document of a dataset; None where it is refused."""
    try:
        text = open_text(str(path), **options)
        return [document for part in SPLITS for document in text.documents(part)]
    except SaekitError:
        return None


def vouch_for(folder, number, **facts):
    """Make the manifest tell what stands in a shard."""
    manifest = json.loads((folder / MANIFEST).read_text())
    file = folder / manifest["shards"][number]["file"]
    manifest["shards"][number] |= {"bytes": file.stat().st_size, "xxh3_128": checksum(file), **facts}
    write_manifest(folder, manifest)
