# SPDX-License-Identifier: Apache-2.0
"""Files of features: .npz or .safetensors, mapped into memory to be read, as they may not fit.

n images, F the shape of the features of one: (D,), or (N, D) of N patches. A file has `features`
(n, *F), `labels` (n,) int64, -1 without one, `paths`, and `settings`, as JSON. In a .npz, `paths`
is an array of text (n,), in a .safetensors file UTF-8 with a zero byte after each path, and the
settings are metadata.
"""

import json
import math
import os
import shutil
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dino.atomic import replacing
from dino.data.labels import UNLABELLED
from dino.errors import UserError
from dino.json_files import dumps, parse
from dino.weights.files import sync_folder

SUFFIXES = (".npz", ".safetensors")
CHUNK = 2**24  # bytes copied at a time
SAFETENSORS_TYPES = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "U8": "u1"}
LONGEST_HEADER = 10**8  # bytes of a .safetensors file; the limit of its library
# The types that an array may have, by its name: above all not a pointer to an object.
TYPES = {"features": ("<f4", "<f2"), "labels": ("<i8",), "paths": ("u1",), "settings": ()}


class Unfit(ValueError):
    """Why a file is not one of features."""


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
        problem = problem_of(file)
    except (OSError, UserError):
        raise
    except Exception as error:  # whatever a parser may raise on somebody's bytes
        problem = error if isinstance(error, Unfit) else type(error).__name__
    if problem:
        raise UserError(
            f"{path}: damaged, or not a file of extract_features.py ({problem}). Move it away."
        )
    return file


def problem_of(file):
    """What keeps the parts of a FeatureFile from belonging together, or None."""
    features, labels = file.features, file.labels
    if features.ndim not in (2, 3) or features.size == 0:
        return f"features of shape {features.shape}, not (n, D) or (n, N, D)"
    if labels.shape != (len(features),) or len(file.paths) != len(features):
        return f"{len(features)} features, {len(file.paths)} paths, labels of shape {labels.shape}"
    if not isinstance(file.settings, dict):
        return "settings that are not a JSON object"
    classes = file.settings.get("classes") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        return "settings whose classes are not names"
    wrong = labels[(labels < UNLABELLED) | (bool(classes) & (labels >= len(classes)))]
    return f"label {wrong[0]} of {len(classes)} classes" if len(wrong) else None


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
    with zipfile.ZipFile(path) as archive:
        features, labels, paths, settings = (
            map_member(path, archive, name) for name in ("features", "labels", "paths", "settings")
        )
    if labels.ndim != 1 or paths.shape != labels.shape:  # as texts of no width take no bytes
        raise Unfit("not one label and one path for each image")
    return FeatureFile(features, np.array(labels), paths.tolist(), parse(settings.item()))


def map_member(path, archive, name):
    """The array of a member of a .npz, on disk; np.load would read all of it."""
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED:
        raise UserError(
            f"{path}: its {name} are compressed, so that they cannot be mapped into memory. Move it"
            " away; or write it with numpy.savez instead of numpy.savez_compressed."
        )
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)  # where the local header has its last two lengths
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
        end = file.tell() + info.file_size
        if np.lib.format.read_magic(file) != (1, 0):
            raise Unfit("a header of another version")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        is_text = name in ("paths", "settings") and dtype.kind == "U"
        if not is_text and dtype not in TYPES[name]:
            raise Unfit(f"{name} of type {dtype}")
        if fortran_order:
            raise Unfit(f"{name} in Fortran order")
        if file.tell() + math.prod(shape) * dtype.itemsize != end:
            raise Unfit("an array of another size than its member")
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
    for array in arrays.values():
        file.write(array)


def read_features_safetensors(path):
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size, LONGEST_HEADER):
            raise Unfit("a header longer than the file")
        header = json.loads(file.read(length))
    settings = parse(header.pop("__metadata__")["settings"])
    check_tiling(header.values(), size - 8 - length)

    def array(name):
        entry = header[name]
        dtype, shape = SAFETENSORS_TYPES[entry["dtype"]], tuple(entry["shape"])
        if dtype not in TYPES[name]:
            raise Unfit(f"{name} of type {entry['dtype']}")
        return np.memmap(path, dtype, "r", 8 + length + entry["data_offsets"][0], shape)

    paths = array("paths").tobytes().decode("utf-8", "surrogateescape").split("\0")[:-1]
    return FeatureFile(array("features"), np.array(array("labels")), paths, settings)


def check_tiling(entries, size):
    """Raise Unfit unless the arrays of a header fill `size` bytes without gap or overlap."""
    end = 0
    for entry in sorted(entries, key=lambda entry: entry["data_offsets"]):
        start, stop = entry["data_offsets"]
        itemsize = np.dtype(SAFETENSORS_TYPES[entry["dtype"]]).itemsize
        if start != end or stop - start != math.prod(entry["shape"]) * itemsize:
            raise Unfit("arrays with gaps or overlaps")
        end = stop
    if end != size:
        raise Unfit("arrays that end before the file, or after it")
