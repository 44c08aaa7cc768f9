# SPDX-License-Identifier: Apache-2.0
"""Damage to a checkpoint is always noticed, and no file can take all memory, all time, or hang."""

import itertools
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import network, training_objects

from dino.errors import UserError
from dino.randomness import random_state
from dino.training.checkpoint import Progress, training_payload
from dino.training.saver import NEWEST, PREVIOUS, Saver, newest_whole
from dino.weights.files import DamagedFile, backbone_payload, read, write_atomically
from dino.weights.pickles import MOST_OPERATIONS

PLACE = dict(arch="vit_nano", patch_size=8, image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What a run writes: a training checkpoint and a backbone."""
    folder = tmp_path_factory.mktemp("whole")
    progress = vars(Progress(epoch=1, iteration=6, iterations_per_epoch=6, global_batch=4))
    payload = training_payload(training_objects(), progress, dict(PLACE), [random_state()])
    write_atomically(payload, folder / "checkpoint.pth")
    write_atomically(backbone_payload(network(), **PLACE), folder / "backbone.pth")
    return folder


def corruptions(content, rng):
    """Copies of `content` with bytes zeroed, a bit flipped, cut, swapped or grown, without end."""
    while True:
        kind, changed = rng.integers(5), bytearray(content)
        at, other = sorted(rng.integers(0, len(content), 2).tolist())
        length = int(rng.integers(1, 4096))
        if kind == 0:
            changed[at : at + length] = bytes(len(changed[at : at + length]))
        elif kind == 1:
            changed[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            del changed[at : at + length if rng.random() < 0.5 else None]
        elif kind == 3:
            one, two = changed[at : at + length], changed[other : other + length]
            changed[at : at + length], changed[other : other + length] = two, one
        else:
            changed[at:at] = rng.bytes(length)
        if changed != content:
            yield bytes(changed)


@pytest.mark.parametrize("name", ["checkpoint.pth", "backbone.pth"])
def test_every_one_of_400_random_corruptions_is_noticed(files, tmp_path, name):
    content, damaged = (files / name).read_bytes(), tmp_path / name
    accepted = []
    changes = itertools.islice(corruptions(content, np.random.default_rng(1)), 400)
    for number, changed in enumerate(changes):
        damaged.write_bytes(changed)
        try:
            read(damaged)
        except UserError as error:
            assert "damaged, or not a checkpoint" in str(error)
        else:
            accepted.append(number)
    assert accepted == []
    assert read(files / name), "the whole one is read"


def test_a_flipped_bit_in_a_tensor_of_a_file_without_a_seal_is_noticed(tmp_path):
    """torch.load takes it; the CRC of the archive's member tells."""
    weights = {"teacher": torch.zeros(1000)}
    torch.save(weights, tmp_path / "other.pth")
    content = bytearray((tmp_path / "other.pth").read_bytes())
    content[content.index(bytes(4000)) + 2000] ^= 1
    (tmp_path / "other.pth").write_bytes(content)
    torch.load(tmp_path / "other.pth", weights_only=True)
    with pytest.raises(DamagedFile, match="does not have its checksum"):
        read(tmp_path / "other.pth")


def test_a_sealed_file_is_a_zip_archive_that_torch_and_zipfile_read(files):
    plain = torch.load(files / "backbone.pth", weights_only=True)
    assert torch.equal(plain["teacher"]["cls_token"], network_weights(files)["cls_token"])
    with zipfile.ZipFile(files / "backbone.pth") as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"sha256 ")


def network_weights(files):
    return read(files / "backbone.pth")["teacher"]


# ---- a damaged file never replaces a good one ----


def test_a_damaged_checkpoint_is_not_rotated_over_the_good_one_before_it(tmp_path):
    saver = Saver(tmp_path)
    for epoch in (1, 2):
        saver.save({NEWEST: {"epoch": epoch}})
        saver.finish()
    content = bytearray((tmp_path / NEWEST).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / NEWEST).write_bytes(content)
    saver.save({NEWEST: {"epoch": 3}})
    saver.finish()
    assert read(tmp_path / NEWEST) == {"epoch": 3}
    assert read(tmp_path / PREVIOUS) == {"epoch": 1}


def test_at_every_moment_of_a_write_a_whole_checkpoint_is_found(tmp_path, monkeypatch):
    """Killed at any call to the file system: what lies there then is copied and looked at."""
    write_atomically({"epoch": 1}, tmp_path / NEWEST)
    found = []

    def look_before(name):
        original = getattr(os, name)

        def wrapped(*args, **options):
            found.append(newest_whole([tmp_path / n for n in (NEWEST, PREVIOUS) if exists(n)])[1])
            return original(*args, **options)

        monkeypatch.setattr(os, name, wrapped)

    def exists(name):
        return (tmp_path / name).exists()

    for name in ("replace", "link", "fsync"):
        look_before(name)
    write_atomically({"epoch": 2}, tmp_path / NEWEST, keep_as=tmp_path / PREVIOUS)
    assert len(found) >= 4
    assert all(content["epoch"] in (1, 2) for content in found)
    assert read(tmp_path / PREVIOUS) == {"epoch": 1}


# ---- bounded time and memory ----


def test_a_pickle_of_many_operations_is_refused_before_it_runs(tmp_path):
    operations = 2 * MOST_OPERATIONS
    (tmp_path / "marks.pth").write_bytes(b"\x80\x02" + b"(" * operations + b".")
    with pytest.raises(DamagedFile, match="a pickle of more than 2000000 operations"):
        read(tmp_path / "marks.pth")


def test_an_archive_that_would_grow_when_it_is_read_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(0))
        archive.writestr("archive/data/0", bytes(10**7))
    assert (tmp_path / "bomb.pth").stat().st_size < 20_000
    with pytest.raises(DamagedFile, match="a compressed archive"):
        read(tmp_path / "bomb.pth")


ODD = {
    "without so many numbers": lambda: torch.ones(1).expand(10**6, 10**6),
    "a tensor on meta": lambda: torch.empty(3, device="meta"),
    "sparse_coo": lambda: torch.eye(3).to_sparse(),
    "sparse_csr": lambda: torch.eye(3).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
}


@pytest.mark.parametrize("said", ODD)
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_that_is_not_plain_numbers_is_named_wherever_it_lies(tmp_path, said):
    torch.save({"teacher": {"a": torch.ones(2)}, "b": [{"c": ODD[said]()}]}, tmp_path / "odd.pth")
    with pytest.raises(UserError) as error:
        read(tmp_path / "odd.pth")
    assert said in str(error.value)
    assert "b.0.c is " in str(error.value)


# ---- what is not a file ----


def test_a_pipe_and_a_device_are_called_what_they_are(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    for path in (tmp_path / "pipe.pth", "/dev/zero"):
        with pytest.raises(UserError, match="this is a pipe or a device, not a file"):
            read(path)


def test_for_the_folder_of_a_run_the_file_in_it_is_named(tmp_path):
    with pytest.raises(UserError, match=r"this is a folder\. Give a file in it"):
        read(tmp_path)
    write_atomically({"epoch": 1}, tmp_path / "backbone.pth")
    with pytest.raises(UserError, match=r"this is a folder\. Give .*/backbone\.pth"):
        read(tmp_path)


def test_a_file_without_permission_is_not_called_damaged(tmp_path, monkeypatch):
    """Then the run would go back to an older checkpoint."""
    monkeypatch.chdir(tmp_path)
    write_atomically({"epoch": 1}, NEWEST)
    write_atomically({"epoch": 0}, PREVIOUS)
    Path().chmod(0o755)
    Path(NEWEST).chmod(0)
    user = os.geteuid()
    if user == 0:  # who may read every file
        os.seteuid(65534)
    try:
        with pytest.raises(UserError, match="this process may not read it") as error:
            newest_whole([Path(NEWEST), Path(PREVIOUS)])
    finally:
        os.seteuid(user)
    assert not isinstance(error.value, DamagedFile)
