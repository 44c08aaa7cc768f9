# SPDX-License-Identifier: Apache-2.0
"""Files of features: what is written is read again, and what others changed is refused."""

import json
import struct
import zipfile

import numpy as np
import pytest

from dino.errors import UserError
from dino.evaluation.feature_files import read_features, write_features

SETTINGS = json.dumps({"classes": ["a", "b"]})
GOOD = dict(
    features=np.arange(12, dtype=np.float32).reshape(3, 4),
    labels=np.array([0, 1, -1]),
    paths=np.array(["x", "y", "z"]),
    settings=np.array(SETTINGS),
)


def save(path, **changed):
    np.savez(path, **{**GOOD, **changed})
    return path


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_what_is_written_is_read_again(suffix, tmp_path):
    for name in ("features", "labels"):
        np.save(tmp_path / f"{name}.npy", GOOD[name])
    paths = tmp_path / "features.npy", tmp_path / "labels.npy"
    write_features(tmp_path / f"f{suffix}", *paths, ["x", "y", "z"], json.loads(SETTINGS))
    file = read_features(tmp_path / f"f{suffix}")
    np.testing.assert_array_equal(file.features, GOOD["features"])
    assert file.labels.tolist() == [0, 1, -1]
    assert file.paths == ["x", "y", "z"]
    assert file.settings == json.loads(SETTINGS)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("features", np.asfortranarray(GOOD["features"]), "features in Fortran order"),
        ("features", GOOD["features"].astype(">f4"), "features of type >f4"),
        ("features", GOOD["features"][:, 0], r"features of shape \(3,\)"),
        ("features", GOOD["features"][:, :0], r"features of shape \(3, 0\)"),
        ("features", GOOD["features"][:2], "2 features, 3 paths"),
        ("labels", np.array([0, 1, 10**9]), "label 1000000000 of 2 classes"),
        ("labels", np.array([0, 1, -7]), "label -7 of 2 classes"),
        ("labels", np.array([0.0, 1.0, 0.5]), "labels of type float64"),
        ("labels", np.zeros((3, 2), int), "not one label and one path for each image"),
        ("labels", np.array(["a", "b", "a"]), "labels of type <U1"),
        ("paths", np.array([1, 2, 3]), "paths of type int64"),
        ("settings", np.array("[1]"), "settings that are not a JSON object"),
        ("settings", np.array('{"classes": {"a": 1}}'), "settings whose classes are not names"),
    ],
)
def test_parts_of_other_types_shapes_or_ranges_are_refused(name, value, message, tmp_path):
    with pytest.raises(UserError, match=rf"not a file of extract_features\.py \({message}"):
        read_features(save(tmp_path / "f.npz", **{name: value}))


def test_labels_without_class_names_are_any_numbers(tmp_path):
    changed = dict(labels=np.array([7, 10**9, -1]), settings=np.array("{}"))
    assert read_features(save(tmp_path / "f.npz", **changed)).labels.tolist() == [7, 10**9, -1]


def test_a_file_that_is_compressed_is_refused_and_not_unpacked(tmp_path):
    """5.6 MB may hold 5.8 GB of labels."""
    path = tmp_path / "f.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in GOOD.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, value)
    assert len(read_features(path).labels) == 3
    np.savez_compressed(path, **GOOD)
    with pytest.raises(UserError, match=r"features are compressed.* numpy\.savez instead"):
        read_features(path)


def test_texts_of_no_width_do_not_make_a_list_without_end(tmp_path):
    path = save(tmp_path / "f.npz")
    header = dict(descr="<U0", fortran_order=False, shape=(10**12,))
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            with archive.open(name, "w") as file:
                if name == "paths.npy":
                    np.lib.format.write_array_header_1_0(file, header)
                else:
                    file.write(content)
    with pytest.raises(UserError, match="not one label and one path for each image"):
        read_features(path)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("paths", {}, None),
        ("features", {"data_offsets": [-48, 0]}, "gaps or overlaps"),
        ("features", {"data_offsets": [8, 56]}, "gaps or overlaps"),
        ("features", {"shape": [3, 3]}, "gaps or overlaps"),
        ("features", {"shape": [3, -4]}, "gaps or overlaps"),
        ("features", {"shape": [-3, -4]}, "ValueError"),
        ("features", {"shape": [3, 10**12]}, "gaps or overlaps"),
        ("features", {"dtype": "I64", "shape": [3, 2]}, "features of type I64"),
        ("features", {"dtype": "U8", "shape": [3, 16]}, "features of type U8"),
        ("labels", {"dtype": "F32", "shape": [6]}, "labels of type F32"),
        ("paths", {"data_offsets": [72, 74], "shape": [2]}, "end before the file"),
    ],
)
def test_arrays_of_a_safetensors_file_fill_it_and_have_their_types(
    name, changed, message, tmp_path
):
    header = {
        "__metadata__": {"settings": SETTINGS},
        "labels": {"dtype": "I64", "shape": [3], "data_offsets": [0, 24]},
        "features": {"dtype": "F32", "shape": [3, 4], "data_offsets": [24, 72]},
        "paths": {"dtype": "U8", "shape": [6], "data_offsets": [72, 78]},
    }
    header[name] |= changed
    text = json.dumps(header).encode()
    arrays = GOOD["labels"].tobytes() + GOOD["features"].tobytes() + b"x\0y\0z\0"
    path = tmp_path / "f.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + arrays)
    if message is None:
        assert read_features(path).paths == ["x", "y", "z"]
        return
    with pytest.raises(UserError, match=rf"not a file of extract_features\.py \(.*{message}"):
        read_features(path)
