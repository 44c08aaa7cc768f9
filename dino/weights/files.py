# SPDX-License-Identifier: Apache-2.0
"""Files of weights: written atomically, read without running code in them, and never half loaded.

`backbone.pth` holds a backbone alone, under `teacher`, and beside it everything needed to use it;
`network` says whose it is. What a training checkpoint holds is in training.checkpoint.
"""

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

from dino.atomic import replacing
from dino.errors import UserError
from dino.networks import unwrap
from dino.weights.integrity import HashingFile, check_whole, find_odd_tensor
from dino.weights.pickles import NotWhole, Refused

# What official checkpoints hold besides tensors: their parsed flags, and numbers of numpy. None
# can run code.
SAFE_TYPES = [
    argparse.Namespace,
    np.dtype,
    np.dtypes.Float64DType,
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    (np._core.multiarray.scalar, "numpy._core.multiarray.scalar"),
]


class DamagedFile(UserError):
    """A checkpoint that is cut short, or not a checkpoint at all."""


def write_atomically(payload, path, keep_as=None):
    """Atomic torch.save: after a crash `path` holds the old content or the new, never part of it.

    The old file is kept as `keep_as`, if that is given and the old file is whole.
    """
    path = Path(path)
    with replacing(path) as temporary:
        with open(temporary, "wb") as file:
            save_sealed(file, payload)
            file.flush()
            os.fsync(file.fileno())
        if keep_as is not None and path.exists() and is_whole(path):
            link = path.with_name(f".{keep_as.name}.tmp")
            link.unlink(missing_ok=True)
            try:
                os.link(path, link)  # at no moment is there no `path`
            except OSError:  # a file system without hard links
                shutil.copyfile(path, link)
            os.replace(link, keep_as)
    sync_folder(path.parent)


def save_sealed(file, payload):
    """torch.save with a seal that `read` checks; raises the OSError of a full disk, not torch's."""
    hashing = HashingFile(file)
    try:
        torch.save(payload, hashing)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    hashing.seal()


def is_whole(path):
    """Whether `read` would find the bytes of this file as they were written."""
    try:
        with open(path, "rb") as file:
            check_whole(file)
    except Exception:  # of as many kinds as in `read`
        return False
    return True


def sync_folder(folder):
    """fsync `folder` so that renames survive a crash, where the file system supports it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(path, flag="--pretrained_weights"):
    """The content of a checkpoint, on the CPU: plain values and dense tensors only.

    Raises UserError for a file that is absent, may not be read or contains code, DamagedFile for
    one that is not whole or not a checkpoint.
    """
    path, name = Path(path), f"{flag} {path}"
    check_is_file(path, name)
    try:
        with open(path, "rb") as file:
            check_whole(file)
            file.seek(0)
            with torch.serialization.safe_globals(SAFE_TYPES), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about pickles of other writers
                content = torch.load(file, map_location="cpu", weights_only=True)
            odd = find_odd_tensor(content, os.fstat(file.fileno()).st_size)
    except PermissionError:
        raise UserError(f"{name}: this process may not read it. Change its permissions.") from None
    except Refused as error:
        raise UserError(
            f"{name}: {error}; refused. Only tensors and plain values are loaded."
        ) from None
    except (NotWhole, zipfile.BadZipFile) as error:
        raise DamagedFile(f"{name}: damaged, or not a checkpoint ({error}).") from None
    except MemoryError:
        raise UserError(f"{name}: there is not enough memory to read it.") from None
    except Exception as error:  # whatever a parser may raise on somebody's bytes
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise UserError(
                f"{name}: contains pickled code ({code[1]}); refused. Only tensors and plain"
                " values are loaded."
            ) from None
        kind = type(error).__name__
        raise DamagedFile(f"{name}: damaged, or not a checkpoint ({kind}).") from None
    if odd:
        raise UserError(f"{name}: {odd}. Only dense tensors are loaded.")
    return content


def check_is_file(path, name, usual="backbone.pth"):
    """Raise UserError for what is not a regular file; `name` begins the message.

    For a folder the message names the file `usual` in it, if it is there.
    """
    if os.path.isdir(path):
        file = os.path.join(path, usual)
        raise UserError(
            f"{name}: this is a folder. Give {file if os.path.isfile(file) else 'a file in it'}."
        )
    if os.path.isfile(path):
        return
    if os.path.exists(path):
        raise UserError(f"{name}: this is a pipe or a device, not a file.")
    advice = " Download it, and give the file." if "://" in name else ""
    raise UserError(f"{name}: no such file.{advice}")


def check_name_is_text(path, name):
    """Raise UserError for a path of bytes that are not UTF-8: safetensors, ONNX and torch.export
    cannot open it. `name` begins the message.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{name}: a name in this path is not UTF-8, and the format's library opens no such"
            " file. Rename it, or give another place."
        ) from None


def flags_in(checkpoint):
    """The flags of the run that wrote a checkpoint, as a dict; {} where it does not say.

    Official ones are a Namespace.
    """
    args = checkpoint.get("args") if isinstance(checkpoint, dict) else None
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    return args if isinstance(args, dict) else {}


def is_named(value):
    """Whether this is a dict whose keys are text, as a state dict is."""
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def with_prefix(state_dict, prefix):
    return {prefix + name: value for name, value in state_dict.items()}


def without_prefix(state_dict, prefix):
    return {name.removeprefix(prefix): value for name, value in state_dict.items()}


def hash_weights(module):
    """SHA-256 of the weights of `module`, which tells networks apart in files of any name."""
    digest = hashlib.sha256()
    for value in module.state_dict().values():
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def backbone_payload(
    model,
    *,
    arch,
    patch_size,
    image_size,
    mean,
    std,
    stem="auto",
    network="teacher",
    shrink_images=0,
    white=0.0,
):
    """The content of `backbone.pth`: clean keys, and how to build and feed the backbone of `model`.

    The weights are under `teacher`, where scripts look for them, even if they are the student's:
    `network` says whose they are.
    """
    return {
        "teacher": unwrap(model).backbone.state_dict(),
        "network": network,
        "arch": arch,
        "stem": stem,
        "patch_size": patch_size,
        "image_size": image_size,
        "shrink_images": shrink_images,
        "white": white,
        "mean": mean,
        "std": std,
    }
