# SPDX-License-Identifier: Apache-2.0
"""Files of features: .npz or .safetensors, mapped into memory to be read, as they may not fit.

n images, F the shape of the features of one: (D,), or (N, D) of N patches. A file has `features`
(n, *F), `labels` (n,) int64, -1 without one, `paths`, and `settings`, as JSON. In a .npz, `paths`
is an array of text (n,), in a .safetensors file UTF-8 with a zero byte after each path, and the
settings are metadata.
"""

import json
import os
import shutil
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dino.atomic import replacing
from dino.errors import UserError
from dino.json_files import dumps, parse
from dino.weights.files import sync_folder

SUFFIXES = (".npz", ".safetensors")
CHUNK = 2**24  # bytes copied at a time
SAFETENSORS_TYPES = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "U8": "u1"}


@dataclass
class FeatureFile:
    features: np.ndarray  # (n, *F), on disk
    labels: np.ndarray  # (n,)
    paths: list
    settings: dict


def read_features(path):
    """The FeatureFile at `path`. Runs no code in it; UserError for a damaged one."""
    path = Path(path)
    try:
        file = read_npz(path) if path.suffix == ".npz" else read_features_safetensors(path)
        counts = {len(file.features), len(file.labels), len(file.paths)}
        if len(counts) > 1 or not isinstance(file.settings, dict):
            raise ValueError("parts that do not belong together")
    except OSError:
        raise
    except Exception as error:  # whatever a parser may raise on somebody's bytes
        raise UserError(
            f"{path}: damaged, or not a file of extract_features.py ({type(error).__name__}). Move"
            " it away."
        ) from None
    return file


def write_features(path, features, labels, paths, settings):
    """Write a FeatureFile atomically. `features` and `labels` are paths of .npy files."""
    path = Path(path)
    write = write_npz if path.suffix == ".npz" else write_features_safetensors
    with replacing(path) as temporary, open(temporary, "wb") as file:
        write(file, features, labels, paths, dumps(settings))
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


# ---- .npz: a zip archive of .npy files, not compressed ----


def write_npz(file, features, labels, paths, settings):
    with zipfile.ZipFile(file, "w") as archive:
        for name, source in (("features", features), ("labels", labels)):
            with member(archive, name) as target, open(source, "rb") as content:
                shutil.copyfileobj(content, target, CHUNK)
        for name, value in (("paths", paths), ("settings", settings)):
            with member(archive, name) as target:
                np.lib.format.write_array(target, np.array(value), allow_pickle=False)


def member(archive, name):
    """A new file in the archive, with a fixed timestamp: equal content makes equal files."""
    return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)


def read_npz(path):
    with np.load(path) as content:
        labels, paths = content["labels"], content["paths"].tolist()
        settings = parse(content["settings"].item())
    return FeatureFile(map_member(path, "features.npy"), labels, paths, settings)


def map_member(path, name):
    """The array of a member of a .npz, on disk; np.load would read all of it."""
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo(name).header_offset
    with open(path, "rb") as file:
        file.seek(start + 26)  # where the local header gives the lengths of its last two fields
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype not in (np.float32, np.float16):  # above all not a pointer to an object
            raise ValueError(dtype)
        return np.memmap(path, dtype, "r", file.tell(), shape)


# ---- .safetensors: the length of a header, the header as JSON, the arrays ----


def write_features_safetensors(file, features, labels, paths, settings):
    """Written here, as the library's own writer wants all arrays in memory."""
    text = "".join(f"{path}\0" for path in paths).encode("utf-8", "surrogateescape")
    types = {np.dtype(dtype): name for name, dtype in SAFETENSORS_TYPES.items()}
    arrays = {  # those with the longest numbers first, so that each is aligned
        "labels": np.load(labels, mmap_mode="r"),
        "features": np.load(features, mmap_mode="r"),
        "paths": np.frombuffer(text, np.uint8),
    }
    header, end = {"__metadata__": {"settings": settings}}, 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        header[name] = {
            "dtype": types[array.dtype],
            "shape": array.shape,
            "data_offsets": (start, end),
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(struct.pack("<Q", len(encoded)) + encoded)
    for source, array in ((labels, arrays["labels"]), (features, arrays["features"])):
        with open(source, "rb") as content:
            content.seek(array.offset)  # after the header of the .npy file
            shutil.copyfileobj(content, file, CHUNK)
    file.write(text)


def read_features_safetensors(path):
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > os.fstat(file.fileno()).st_size:
            raise ValueError("a header longer than the file")
        header = json.loads(file.read(length))

    def array(name):
        entry = header[name]
        dtype, shape = SAFETENSORS_TYPES[entry["dtype"]], tuple(entry["shape"])
        return np.memmap(path, dtype, "r", 8 + length + entry["data_offsets"][0], shape)

    paths = array("paths").tobytes().decode("utf-8", "surrogateescape").split("\0")[:-1]
    settings = parse(header["__metadata__"]["settings"])
    return FeatureFile(array("features"), array("labels"), paths, settings)
