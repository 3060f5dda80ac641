"""Files of tensors from strangers: nothing in them runs, and nothing is made that the file does not hold."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

import saekit
from saekit import SaekitError
from saekit.formats.tensor_files import read_tensors, write_torch

DATA = Path(__file__).parents[1] / "data"
CLASS = DATA / "dictionary_learning_AutoEncoderTopK"


def zipped(path, files, how=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def unzipped(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture
def place(tmp_path):
    """A good dictionary in an archive of torch."""
    return Path(shutil.copytree(CLASS, tmp_path / "sae"))


def refused(path, message):
    with pytest.raises(SaekitError, match=message):
        read_tensors(path, path.parent)


def test_what_is_read_of_each_kind(tmp_path):
    """Transposed views, dtypes, scalars, texts and the order of numpy's columns."""
    wide = torch.arange(6.0).view(2, 3)
    state = OrderedDict(a=wide.T, b=torch.tensor(4, dtype=torch.int32), c=wide.bfloat16()[:, 1:], d="text", e={"k": 3})
    torch.save(state, tmp_path / "x.pt")
    found = read_tensors(tmp_path / "x.pt", tmp_path)
    assert torch.equal(found["a"], wide.T)
    assert found["b"] == 4
    assert torch.equal(found["c"], state["c"])
    assert (found["d"], found["e"]) == ("text", {"k": 3})
    module = torch.nn.Linear(3, 2)
    torch.save(dict(module.named_parameters()), tmp_path / "x.pt")
    assert torch.equal(read_tensors(tmp_path / "x.pt", tmp_path)["weight"], module.weight)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", a=np.asfortranarray(wide.numpy()), b=np.float64(2.5))
        found = read_tensors(tmp_path / "x.npz", tmp_path)
        assert torch.equal(found["a"], wide)
        assert found["b"] == 2.5


class Calls:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "arguments"),
    [(os.mkdir, ("made",)), (bytearray, (1 << 40,)), (torch.Size, ((1,),)), (torch.device, ("cpu",)), (set, ([1],))],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_calls_in_a_pickle(function, arguments, protocol, place, monkeypatch):
    """Those that torch would let run too: one of them makes a terabyte."""
    monkeypatch.chdir(place)
    torch.save({"a": Calls(function, *arguments)}, "ae.pt", pickle_protocol=protocol)
    refused(place / "ae.pt", "holds more than tensors: its pickle would call")
    assert not Path("made").exists()


def test_archives_that_torch_does_not_write(place):
    files = unzipped(place / "ae.pt")
    (program,) = (name for name in files if name.endswith("data.pkl"))
    path = place / "ae.pt"
    for how in (zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA):
        zipped(path, {**files, "ae/bomb": bytes(1 << 22)}, how)
        refused(path, "is compressed")
    for change, message in (
        ({program: files[program] + bytes(1 << 16)}, "no archive of named tensors"),
        ({"b/data.pkl": files[program]}, "no archive of named tensors"),
        ({program: pickle.dumps([1, 2], 2)}, "holds no tensors by name"),
        ({program: pickle.dumps({1: 2}, 2)}, "holds no tensors by name"),
        ({program: files[program][:100]}, "is damaged"),
        ({program: b""}, "is damaged"),
    ):
        zipped(path, files | change)
        refused(path, message)
    zipped(path, {name: content for name, content in files.items() if name != program})
    refused(path, "no archive of named tensors")
    zipped(path, {name: content for name, content in files.items() if "/data/" not in name})
    refused(path, "is damaged")
    torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    refused(path, "no archive as torch writes them since version 1.6")
    path.write_bytes(b"PK\3\4" + bytes(100))
    refused(path, "no archive as torch writes them")


@pytest.mark.parametrize("shape", [(2**31, 2**31), (2**31,), (5, 10**9), (10**12, 1)])
def test_shapes_that_a_few_bytes_stand_for(shape, place):
    """Repeated rows take no room in a file, however many there are."""
    torch.save({"W_enc": torch.zeros(1).expand(*shape)}, place / "ae.pt")
    assert (place / "ae.pt").stat().st_size < 5000
    refused(place / "ae.pt", "holds less than the shapes in it say|is damaged")


def test_a_program_that_asks_for_more_than_its_storage_holds(place):
    """Sizes are whole numbers in the pickle: larger ones reach past the end of the storage."""
    files = unzipped(place / "ae.pt")
    (program,) = (name for name in files if name.endswith("data.pkl"))
    for size in (2**30, 2**31 - 1):
        larger = files[program].replace(b"K\x20K\x08\x86", b"J" + struct.pack("<i", size) + b"K\x08\x86")
        assert larger != files[program]
        zipped(place / "ae.pt", files | {program: larger})
        refused(place / "ae.pt", "is damaged")


def npy(shape, dtype="<f4", data=b"", order=False):
    header = repr({"descr": dtype, "fortran_order": order, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + data


def test_archives_of_numpy(tmp_path):
    path = tmp_path / "params.npz"
    zipped(path, {"a.npy": npy((2, 3), data=bytes(24))})
    assert read_tensors(path, tmp_path)["a"].shape == (2, 3)
    stream = io.BytesIO()
    np.save(stream, np.array([Calls(os.mkdir, "made")], dtype=object), allow_pickle=True)
    for files, message in (
        ({"a.npy": npy((10**13,), data=bytes(24))}, "'a.npy' is not as long as it says"),
        ({"a.npy": npy((-1, -6), data=bytes(24))}, "is not as long as it says"),
        ({"a.npy": npy((2, 3), data=bytes(25))}, "is not as long as it says"),
        ({"a.npy": npy((2, 3), "|O", bytes(48))}, "holds more than numbers: 'a.npy' is of object"),
        ({"a.npy": npy((2,), [("x", "<f4")], bytes(8))}, "holds more than numbers"),
        ({"a.npy": npy((2,), "<U4", bytes(32))}, "holds more than numbers"),
        ({"a.npy": stream.getvalue()}, "holds more than numbers"),
        ({"a.npy": b"\x93NUMPY\3\0" + bytes(50)}, "is damaged"),
        ({"a.npy": pickle.dumps([1])}, "is damaged"),
        ({"a.txt": b"text"}, "is damaged"),
        ({"a.npy": npy("x" * 20_000)}, "is damaged"),
    ):
        zipped(path, files)
        refused(path, message)
    zipped(path, {"a.npy": npy((1 << 22,), data=bytes(1 << 24))}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 15
    refused(path, "grows more than weights do")
    path.write_bytes(b"not a zip")
    refused(path, "is damaged")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_told_as_such():
    """Also where torch writes, which has other words for it."""
    for tensors in ({"a": torch.zeros(3)}, {"a": torch.zeros(1 << 16), "b": torch.zeros(1 << 16)}):
        with pytest.raises(OSError, match="No space left on device"):
            write_torch(tensors, Path("/dev/full"))


def test_links_out_of_the_folder(place, tmp_path):
    (place / "ae.pt").rename(tmp_path / "outside.pt")
    (place / "ae.pt").symlink_to("../outside.pt")
    with pytest.raises(SaekitError, match="is a link that leads out of its folder"):
        saekit.load(place)


def test_two_formats_do_not_share_a_folder(place):
    """A later file of the same name would belong to neither."""
    sae = saekit.load(place)
    with pytest.raises(SaekitError, match=r"holds a dictionary of another format \(ae.pt\)"):
        sae.save(place, overwrite=True)
    assert json.loads((place / "config.json").read_text())["trainer"]["dict_class"] == "AutoEncoderTopK"
