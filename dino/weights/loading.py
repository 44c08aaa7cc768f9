# SPDX-License-Identifier: Apache-2.0
"""Load what a file holds into live objects: exactly, or a UserError names what differs."""

import torch

from dino.errors import UserError
from dino.json_files import is_number
from dino.networks import unwrap
from dino.optim import LARS
from dino.printable import brief
from dino.weights.files import is_named, without_prefix

# Values of an optimizer's groups that a run or its schedule sets; all others must be the run's own.
SCHEDULED = ("lr", "weight_decay")
IMPLEMENTATION = ("foreach", "fused", "capturable")  # how it computes, not what
# What changes in a scaler and a scheduler as a run goes on; all else must be the run's own.
RUNNING = {"scale", "_growth_tracker", "last_epoch", "_step_count", "_last_lr"}
# What an optimizer keeps of a parameter once it has taken a step.
MOMENTS = {
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
    torch.optim.SGD: {"momentum_buffer"},
    LARS: {"mu"},
}
NEVER_NEGATIVE = ("step", "exp_avg_sq")
EXACT = (torch.float32, torch.float64)  # of a training checkpoint
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What becomes of an image before a backbone sees it, besides its size.
IMAGES = ("mean", "std", "shrink_images", "white")
# What files of earlier versions do not state: which images a run saw, and how.
STATED_LATER = {"train_set", "val_set", *IMAGES}
SHOWN = 5  # names of a list that may be long


def load_exactly(module, state_dict, what):
    """load_state_dict that names the first keys and shapes that differ, in a UserError."""
    check_fits(module, state_dict, what)
    module.load_state_dict(state_dict)


def check_fits(module, state_dict, what):
    """Raise the UserError of load_exactly; `module` may be without numbers, on the device meta."""
    own = module.state_dict()
    problems = [f"{name} is missing" for name in own if name not in state_dict]
    problems += [f"{name} is not expected" for name in state_dict if name not in own]
    for name, value in own.items():
        if name in state_dict:
            problems += unlike(name, state_dict[name], value)
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{what} does not fit this network: {'; '.join(problems[:3])}{more}.")


def unlike(name, value, own):
    """[why `value` cannot take the place of the tensor `own`], or []."""
    if not isinstance(value, torch.Tensor):
        return [f"{name} is a {type(value).__name__}, not a tensor"]
    if value.is_complex() or (value.dtype in FLOATS) != own.is_floating_point():
        return [f"{name} holds {value.dtype}, expected {own.dtype}"]
    if value.shape != own.shape:
        return [f"{name} is {tuple(value.shape)}, expected {tuple(own.shape)}"]
    if not value.to(own.dtype).isfinite().all():
        return [f"{name} has values that are not finite in {own.dtype}"]
    return []


def restore(checkpoint, source, *, description=None, **objects):
    """Load each object from the entry of its name, in any wrapper.

    Raises UserError for entries that are absent or do not fit, and before that for a run with
    another `description`: a flag that differs explains what does not fit.
    """
    check_entries(checkpoint, source, objects)
    check_described(checkpoint, description or {}, source)
    for name, value in objects.items():
        what, state = f"{source}: {name}", checkpoint[name]
        if not is_named(state):
            raise UserError(f"{what} is a {type(state).__name__}, not values by name.")
        if isinstance(value, torch.nn.Module):
            restore_module(unwrap(value), state, what)
        elif isinstance(value, torch.optim.Optimizer):
            restore_optimizer(value, state, what)
        else:
            restore_values(value, state, what)


def restore_module(module, state, what):
    """Load weights in full precision; a run that resumed from rounded ones would end elsewhere."""
    weights = without_prefix(state, "module.")
    if len(weights) < len(state):
        raise UserError(f"{what}: some of its names differ by 'module.' alone.")
    load_exactly(module, weights, what)
    for name, value in weights.items():
        if value.is_floating_point() and value.dtype not in EXACT:
            raise UserError(f"{what}: {name} holds {value.dtype}, and {EXACT[0]} in this run.")


def check_entries(checkpoint, source, names):
    """Raise UserError for a file without an entry of each name, or without `epoch`."""
    entries = checkpoint if isinstance(checkpoint, dict) else {}
    missing = [name for name in [*names, "epoch"] if name not in entries]
    if missing:
        raise UserError(
            f"{source}: no entry {missing[0]!r}, so this is not a training checkpoint"
            f" of such a run; it has {list_names(entries)}. Give another checkpoint, or another"
            " --output_dir."
        )


def check_described(checkpoint, description, source):
    """Raise UserError unless the file states a run's `description`, plain values by name.

    The path of the pretrained weights may differ, as files move, and what is STATED_LATER may be
    absent.
    """
    may_differ = {"pretrained_weights"} | (STATED_LATER - checkpoint.keys())
    for name, value in description.items():
        if name not in may_differ and not equal(checkpoint.get(name), value):
            there, here = brief(checkpoint.get(name)), brief(value)
            raise UserError(
                f"{source}: that run has {name} {there}, and this one {here}. Give another"
                " --output_dir."
            )


def restore_optimizer(optimizer, state, what):
    """Load moments, and the scheduled values of the groups; the others must be the run's own."""
    own = optimizer.state_dict()["param_groups"]
    groups = state.get("param_groups")
    if not isinstance(groups, list) or len(groups) != len(own) or not all(map(is_named, groups)):
        raise UserError(f"{what} does not have the {len(own)} parameter groups of this run.")
    merged = [merge_group(*pair, what) for pair in zip(own, groups, strict=True)]
    try:
        kinds = {
            value.dtype
            for moments in state["state"].values()
            for value in moments.values()
            if isinstance(value, torch.Tensor)
        }
        optimizer.load_state_dict({"state": state["state"], "param_groups": merged})
    except Exception as error:  # whatever torch may raise on somebody's values
        raise UserError(f"{what} is not of this run's kind ({one_line(error)}).") from None
    check_moments(optimizer, what)
    if odd := kinds - set(EXACT):  # which torch has cast
        raise UserError(f"{what}: has moments of {odd.pop()}, and {EXACT[0]} in this run.")


def merge_group(own, group, what):
    """`own` with the scheduled values and parameter numbers of the checkpoint's `group`."""
    for name, value in own.items():
        if name in ("params", *SCHEDULED, *IMPLEMENTATION) or name not in group:
            continue
        if not equal(group[name], value):
            raise UserError(f"{what}: {name} is {brief(group[name])}, and {value!r} in this run.")
    scheduled = {name: group[name] for name in SCHEDULED if name in group}
    for name, value in scheduled.items():
        if not is_number(value) or value < 0:
            raise UserError(f"{what}: {name} is {brief(value)}, not a number of at least 0.")
    scheduled = {name: float(value) for name, value in scheduled.items()}
    return {**own, **scheduled, "params": group.get("params")}


def check_moments(optimizer, what):
    """Raise UserError unless what `optimizer` keeps of each parameter fits it, and is finite."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if strange := len(optimizer.state.keys() - set(params)):
        raise UserError(f"{what}: has moments of {strange} parameters that its groups do not list.")
    for param in params:
        state = optimizer.state.get(param, {})
        if not isinstance(state, dict) or (state and set(state) != MOMENTS[type(optimizer)]):
            raise UserError(f"{what}: the moments are not those of {type(optimizer).__name__}.")
        for name, value in state.items():
            if name == "momentum_buffer" and value is None:  # as SGD begins
                continue
            shape = () if name == "step" else param.shape
            if not isinstance(value, torch.Tensor) or value.shape != shape:
                raise UserError(f"{what}: {name} does not fit its parameter.")
            if value.dtype not in FLOATS or not value.isfinite().all():
                raise UserError(f"{what}: {name} has values that are not finite numbers.")
            if name in NEVER_NEGATIVE and (value < 0).any():
                raise UserError(f"{what}: {name} has negative values.")


def restore_values(value, state, what):
    """Load an object of plain numbers: a gradient scaler, a learning-rate scheduler."""
    own = value.state_dict()
    for name in (name for name in own if name in state or name in RUNNING):
        found, expected = state.get(name), own[name]
        if not same_kind(found, expected):
            raise UserError(f"{what}: {name} is {brief(found)}, not like {brief(expected)}.")
        if name not in RUNNING and not equal(found, expected):
            raise UserError(f"{what}: {name} is {brief(found)}, and {brief(expected)} in this run.")
    value.load_state_dict({name: state.get(name, own[name]) for name in own})


def equal(a, b):
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) in (int, float, bool, type(None), str) and a == b


def restore_numbers(progress, checkpoint, source, highest):
    """Fill fields of a `progress` that has just begun from a checkpoint, up to {name: `highest`}.

    The lowest value is the present one. UserError for a value outside, or of another kind.
    """
    for name, most in highest.items():
        value, own = checkpoint.get(name), getattr(progress, name)
        whole = type(own) is not int or type(value) is int
        if not is_number(value) or not whole or not own <= value <= most:
            raise UserError(f"{source}: invalid value {brief(value)} for entry {name!r}.")
        setattr(progress, name, value)


def same_kind(a, b):
    """Both numbers, finite; lists of as many numbers; or of the same simple type."""
    if is_number(b):
        return is_number(a)
    if isinstance(b, tuple | list):
        return isinstance(a, tuple | list) and len(a) == len(b) and all(map(same_kind, a, b))
    return type(a) is type(b)


def list_names(entries):
    """The first names of a dict, for a sentence: a file may hold any number, of any length."""
    names = [brief(name) for name in list(entries)[:SHOWN]]
    more = [f"{len(entries) - SHOWN} more"] if len(entries) > SHOWN else []
    return ", ".join(names + more) or "none"


def one_line(error):
    return " ".join(str(error).split())
