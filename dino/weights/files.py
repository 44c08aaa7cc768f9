# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: written atomically, read without running code in them, and never half loaded.

A training checkpoint holds the official entries, `student`, `teacher`, `optimizer`, `dino_loss`,
`epoch` (of the next epoch), `args` and, with float16, `fp16_scaler`, under the official key names;
`args` is a plain dict. Ours beside them: `rng`, the random state of each rank, and the fields of
resume.Progress.

`backbone.pth` holds the teacher's backbone alone, under `teacher`, and beside it all that is needed
to use it.
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

from backbones import has_batchnorms
from distributed import get_rank, get_world_size
from errors import UserError

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
    """A checkpoint that is cut short, or was none to begin with."""


def write_atomically(payload, path, keep_as=None):
    """torch.save to `path`, which holds what it held or all of the new, whenever the power fails.

    What it held becomes `keep_as`, if that is given.
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
    """torch.save whose complaint about a full disk is the OSError that it was."""
    try:
        torch.save(payload, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def sync_folder(folder):
    """Make renames in `folder` last; a file system that cannot is none to insist on."""
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
                f"{flag} {path}: holds code ({code[1]}) beside tensors and plain values, and is not"
                " opened."
            ) from None
        kind = type(error).__name__
        raise DamagedFile(f"{flag} {path}: damaged, or no checkpoint ({kind}).") from None


def flags_in(checkpoint):
    """The flags of the run that wrote a checkpoint, as a dict; {} where it does not say.

    Official ones are a Namespace.
    """
    args = checkpoint.get("args") if isinstance(checkpoint, dict) else None
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    return args if isinstance(args, dict) else {}


def unwrap(model):
    """The module inside a DistributedDataParallel."""
    return model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model


def is_named(value):
    """Whether this is a dict whose keys are text, as a state dict is."""
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def with_prefix(state_dict, prefix):
    return {prefix + name: value for name, value in state_dict.items()}


def without_prefix(state_dict, prefix):
    return {name.removeprefix(prefix): value for name, value in state_dict.items()}


def training_payload(state, progress, args, rng):
    """What a training checkpoint holds. `progress` and `args`: dicts of plain values.

    `state`: student, teacher, dino_loss, optimizer and scaler by these names; `rng`: each rank's
    random_state.

    The official student is always wrapped in DistributedDataParallel, the teacher only if it has
    batch norms; the keys say so here whether or not there was a wrapper, so that either code reads
    the other's file.
    """
    teacher_prefix = "module." if has_batchnorms(state["teacher"]) else ""
    payload = {
        "student": with_prefix(unwrap(state["student"]).state_dict(), "module."),
        "teacher": with_prefix(unwrap(state["teacher"]).state_dict(), teacher_prefix),
        "optimizer": state["optimizer"].state_dict(),
        "dino_loss": state["dino_loss"].state_dict(),
        "args": args,
        "rng": rng,
        **progress,
    }
    if state["scaler"].is_enabled():
        payload["fp16_scaler"] = state["scaler"].state_dict()
    return payload


def restore_training(checkpoint, source, state):
    """Put a training checkpoint's content, ours or official, into the objects of `state`.

    `source` names the flag and the file, for errors.
    A float16 scaler may be new to the run: where the checkpoint has none, it starts afresh. So do
    the random states where there is another number of ranks.
    """
    objects = {name: value for name, value in state.items() if name != "scaler"}
    if state["scaler"].is_enabled() and "fp16_scaler" in checkpoint:
        objects["fp16_scaler"] = state["scaler"]
    restore(checkpoint, source, **objects)
    rng = checkpoint.get("rng", [])
    try:
        if len(rng) == get_world_size():
            set_random_state(rng[get_rank()])
    except Exception:  # whatever torch may raise on somebody's values
        raise UserError(f"{source}: rng does not hold the random states of the ranks.") from None


def restore(checkpoint, source, **objects):
    """Load each object from the entry of its name, in any wrapper. UserError for what is absent or
    does not fit.
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


def random_state():
    """States of this process's generators, from which stochastic depth and dropout draw."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state):
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])


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
    """What `backbone.pth` holds: clean keys under `teacher`, and how to build and feed it."""
    return {
        "teacher": unwrap(teacher).backbone.state_dict(),
        "arch": arch,
        "patch_size": patch_size,
        "image_size": image_size,
        "mean": mean,
        "std": std,
    }


def save_backbone(path, teacher, **description):
    write_atomically(backbone_payload(teacher, **description), path)


def restart_from_checkpoint(ckp_path, run_variables=None, **kwargs):
    """Official interface: if the file exists, load each named object from its entry, and the run
    variables.

    Unlike the official function it raises UserError where something is absent or does not fit.
    """
    if not os.path.isfile(ckp_path):
        return
    checkpoint = read(ckp_path, "resume from")
    restore(
        checkpoint,
        f"resume from {ckp_path}",
        **{name: value for name, value in kwargs.items() if value is not None},
    )
    for name in run_variables or {}:
        run_variables[name] = checkpoint.get(name, run_variables[name])
