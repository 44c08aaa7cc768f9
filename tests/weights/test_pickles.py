# SPDX-License-Identifier: Apache-2.0
"""A pickle that would take all memory or all time is refused before torch.load runs it."""

import argparse
import collections
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch

from dino.errors import UserError
from dino.weights.files import DamagedFile, read

PROTOCOL = b"\x80\x02"
NESTED = b")" + b"".join(b"q%cj%c\0\0\0\x86" % (i, i) for i in range(45))  # t = (t, t), 45 times
ORDERED = b"ccollections\nOrderedDict\n)R"


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def long(number):
    content = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def called(function, *args):
    return b"c" + function.replace(".", "\n").encode() + b"\n(" + b"".join(args) + b"tR"


def archive(path, content, name="data.pkl"):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"archive/{name}", PROTOCOL + content + b".")
        file.writestr("archive/byteorder", "little")
        file.writestr("archive/version", "3\n")


BOMBS = {
    "a dict with a tuple as a key": b"}" + NESTED + b"Ns",
    "a dict with a large number as a key": b"}" + long(2**61 - 1) + b"Ns",
    "a dict with a float as a key": b"}G\x3f\xf0\0\0\0\0\0\0Ns",
    "a dict with a _codecs.encode as a key": b"}"
    + called("_codecs.encode", text("a"), text("latin1"))
    + b"Ns",
    "code (__builtin__.set)": called("__builtin__.set", b"]" + NESTED + b"a"),
    "code (__builtin__.bytearray)": called("__builtin__.bytearray", long(6 * 2**30)),
    "code (torch.Tensor)": called("torch.Tensor", long(10**5), long(10**5)),
    "code (torch.FloatStorage)": called("torch.FloatStorage", long(10**10)),
    "code (_codecs.encode)": called("_codecs.encode", text("ab" * 10), text("punycode")),
    "code (collections.Counter)": called("collections.Counter", b"]" + NESTED + b"a"),
    "code (numpy.dtype)": called("numpy.dtype", text("V2000000000"), b"\x89\x88"),
    "attributes of collections.OrderedDict": ORDERED + b"}" + text("items") + b"K\5sb",
    "attributes of argparse.Namespace": b"cargparse\nNamespace\n)\x81]" + NESTED + b"N\x86ab",
}
KEY_OF_PAIRS = called("collections.OrderedDict", b"]" + NESTED + b"N\x86a")


@pytest.mark.parametrize("said", BOMBS)
def test_what_a_pickle_may_not_do_is_named_and_not_done(tmp_path, said):
    archive(tmp_path / "bomb.pth", BOMBS[said])
    with pytest.raises(UserError) as error:
        read(tmp_path / "bomb.pth")
    assert f"{said}; refused" in str(error.value) or f"({said}); refused" in str(error.value)
    assert not isinstance(error.value, DamagedFile), "else a run goes back to an older one"


def test_keys_are_checked_in_pairs_and_in_every_pickle_of_an_older_file(tmp_path):
    archive(tmp_path / "pairs.pth", KEY_OF_PAIRS)
    torch.save({}, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "legacy.pth").read_bytes()
    names = content.rindex(PROTOCOL)  # of storages, after the content
    (tmp_path / "legacy.pth").write_bytes(content[:names] + PROTOCOL + b"}" + NESTED + b"Ns.")
    for name in ("pairs.pth", "legacy.pth"):
        with pytest.raises(UserError, match="a dict with a tuple as a key"):
            read(tmp_path / name)


def test_the_pickle_that_torch_finds_is_the_one_that_is_checked(tmp_path):
    """torch's reader takes names in any case, and other offsets than zipfile."""
    archive(tmp_path / "case.pth", BOMBS["a dict with a tuple as a key"], "DATA.PKL")
    with pytest.raises(UserError, match="a dict with a tuple as a key"):
        read(tmp_path / "case.pth")


def test_a_storage_that_grows_when_it_is_loaded_is_refused(tmp_path):
    """An older file whose list of storages leaves out one of 4 GB: torch.load reserves it."""
    path = tmp_path / "legacy.pth"
    torch.save({"a": torch.zeros(5)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    names = content.rindex(PROTOCOL)
    size = content.index(b"K\5\x85")
    content = content[:size] + long(10**9) + content[size + 2 : names] + PROTOCOL + b"]."
    path.write_bytes(content)
    with pytest.raises(UserError, match="4000000000 bytes of tensors are claimed by a file of"):
        read(path)


def test_an_expanded_part_of_a_sparse_tensor_is_refused(tmp_path):
    """torch.load looks at every index, of which a stride of 0 makes any number."""
    parts = torch.zeros(1, 1, dtype=torch.int64).expand(1, 10**6), torch.zeros(1).expand(10**6)
    sparse = torch.sparse_coo_tensor(*parts, (5,), check_invariants=False, is_coalesced=True)
    torch.save({"a": sparse}, tmp_path / "sparse.pth")
    with pytest.raises(UserError, match="_rebuild_sparse_tensor"):
        read(tmp_path / "sparse.pth")


def test_a_weight_of_any_name_that_is_not_a_tensor_of_numbers_is_named_in_a_line(tmp_path):
    """The name of 1 MB was once copied for each of the values under it."""
    nested = torch.ones(2).to_sparse()
    for _ in range(50):
        nested = [nested]
    torch.save({"k" * 10**6: [*range(4000), nested]}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=r"k\.\.\.\.4000\.0\.0\.\.\.\.\.0 is a sparse_coo") as error:
        read(tmp_path / "odd.pth")
    assert len(str(error.value)) < 500


# ---- what checkpoints hold ----


def test_what_checkpoints_hold_besides_weights_is_loaded(tmp_path):
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    payload = {
        "state_dict": model.state_dict(),  # an OrderedDict with _metadata
        "parameter": model.weight,
        "optimizer": optimizer.state_dict(),  # keys are numbers
        "scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, [30, 60]).state_dict(),
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 3},
        "args": argparse.Namespace(lr=0.1, betas=(0.9, 0.999), names=["a"], nothing=None),
        "loss": np.float64(0.5),
        "shape": torch.Size([1, 2]),
        "device": torch.device("cuda:0"),
        "dtype": torch.bfloat16,
        "bytes": b"\x00\xff",
        "numbers": {-1: 10**30, 2**31 - 1: complex(1, 2)},
        "small": [torch.ones(2).to(torch.float8_e4m3fn), torch.ones(2, dtype=torch.uint16)],
        "view": [model.weight.detach()[:, 1:], model.weight.detach().T],
    }
    for new in (True, False):
        if not new:
            del payload["small"]  # which torch does not read in its older format
        torch.save(payload, tmp_path / "a.pth", _use_new_zipfile_serialization=new)
        found = read(tmp_path / "a.pth")
        assert found.keys() == payload.keys()
        for name in ("scheduler", "args", "loss", "shape", "device", "dtype", "bytes", "numbers"):
            assert found[name] == payload[name], name
        assert torch.equal(found["parameter"], model.weight)
        assert torch.equal(
            found["optimizer"]["state"][1]["exp_avg"], optimizer.state[model.bias]["exp_avg"]
        )
    assert isinstance(payload["scheduler"]["milestones"], collections.Counter)


def test_a_dict_of_python_2_is_loaded(tmp_path):
    """There an OrderedDict was called with the list of its pairs, and text was bytes."""
    pair = b"](U\x01ae" + b"K\x05a"
    archive(tmp_path / "old.pth", called("collections.OrderedDict", b"]" + pair + b"a"))
    assert read(tmp_path / "old.pth") == {"a": 5}
    assert pickle.loads(PROTOCOL + called("collections.OrderedDict", b"]" + pair + b"a") + b".")
