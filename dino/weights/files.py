# SPDX-License-Identifier: Apache-2.0
"""Files of weights: written atomically, read without running code in them, and never half loaded.

`backbone.pth` holds the teacher's backbone alone, under `teacher`, and beside it everything needed
to use it. What a training checkpoint holds is in training.checkpoint.
"""

import argparse
import contextlib
import os
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch

from dino.errors import UserError
from dino.networks import unwrap

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

    The old file is kept as `keep_as`, if that is given.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            save_to(file, payload)
            file.flush()
            os.fsync(file.fileno())
        if keep_as is not None and path.exists():
            link = path.with_name(f".{keep_as.name}.tmp")
            link.unlink(missing_ok=True)
            try:
                os.link(path, link)  # at no moment is there no `path`
            except OSError:  # a file system without hard links
                shutil.copyfile(path, link)
            os.replace(link, keep_as)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def save_to(file, payload):
    """torch.save that raises the underlying OSError (disk full) instead of RuntimeError."""
    try:
        torch.save(payload, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def sync_folder(folder):
    """fsync `folder` so that renames survive a crash, where the file system supports it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(path, flag="--pretrained_weights"):
    """The content of a checkpoint, on the CPU. Only tensors and plain values are unpickled.

    Raises UserError for a file that is absent or holds code, DamagedFile for one that is broken.
    """
    path = Path(path)
    if not path.is_file():
        found = "this is a folder. Give a file in it" if path.is_dir() else "no such file"
        raise UserError(f"{flag} {path}: {found}.")
    try:
        with torch.serialization.safe_globals(SAFE_TYPES), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of other writers
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a parser may raise on somebody's bytes
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise UserError(
                f"{flag} {path}: contains pickled code ({code[1]}); refused. Only tensors and plain"
                " values are loaded."
            ) from None
        kind = type(error).__name__
        raise DamagedFile(f"{flag} {path}: damaged, or not a checkpoint ({kind}).") from None


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


def restore(checkpoint, source, **objects):
    """Load each object from the entry of its name, in any wrapper.

    Raises UserError for entries that are absent or do not fit.
    """
    entries = checkpoint if isinstance(checkpoint, dict) else {}
    missing = [name for name in [*objects, "epoch"] if name not in entries]
    if missing:
        raise UserError(
            f"{source}: no entry {missing[0]!r}, so this is not a training checkpoint"
            f" of such a run; it has {', '.join(map(str, entries)) or 'none'}. Move it away, or"
            " give another --output_dir."
        )
    for name, value in objects.items():
        what = f"{source}: {name}"
        if not is_named(checkpoint[name]):
            raise UserError(f"{what} is a {type(checkpoint[name]).__name__}, not values by name.")
        if isinstance(value, torch.nn.Module):
            load_exactly(unwrap(value), without_prefix(checkpoint[name], "module."), what)
            continue
        try:
            value.load_state_dict(checkpoint[name])
        except Exception as error:  # whatever torch may raise on somebody's values
            raise UserError(f"{what} is not of this run's kind ({error}).") from None
        if isinstance(value, torch.optim.Optimizer):
            check_moments(value, what)


def check_moments(optimizer, what):
    """Raise UserError unless what `optimizer` keeps of each parameter fits it, and is finite."""
    for param in (param for group in optimizer.param_groups for param in group["params"]):
        for name, value in optimizer.state.get(param, {}).items():
            if name == "momentum_buffer" and value is None:  # as SGD begins
                continue
            if not isinstance(value, torch.Tensor) or value.shape not in (param.shape, ()):
                raise UserError(f"{what}: {name} does not fit its parameter.")
            if not value.isfinite().all():
                raise UserError(f"{what}: {name} has values that are not finite.")


def load_exactly(module, state_dict, what):
    """load_state_dict that names the first keys and shapes that differ, in a UserError."""
    own = module.state_dict()
    problems = [
        f"{name} is a {type(value).__name__}, not a tensor"
        for name, value in state_dict.items()
        if not isinstance(value, torch.Tensor)
    ]
    state_dict = {name: v for name, v in state_dict.items() if isinstance(v, torch.Tensor)}
    problems += [f"{name} is missing" for name in own if name not in state_dict]
    problems += [f"{name} is not expected" for name in state_dict if name not in own]
    problems += [
        f"{name} is {tuple(state_dict[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in state_dict and state_dict[name].shape != own[name].shape
    ]
    problems += [
        f"{name} has values that are not finite"
        for name, value in state_dict.items()
        if value.is_floating_point() and not value.isfinite().all()
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{what} does not fit this network: {'; '.join(problems[:3])}{more}.")
    module.load_state_dict(state_dict)


def backbone_payload(teacher, *, arch, patch_size, image_size, mean, std):
    """The content of `backbone.pth`: clean keys under `teacher`, and how to build and feed it."""
    return {
        "teacher": unwrap(teacher).backbone.state_dict(),
        "arch": arch,
        "patch_size": patch_size,
        "image_size": image_size,
        "mean": mean,
        "std": std,
    }
