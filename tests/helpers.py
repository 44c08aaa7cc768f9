# SPDX-License-Identifier: Apache-2.0
"""Small networks, training states and checkpoints that several test files build and compare."""

import contextlib
import importlib
import shlex
import sys

import numpy as np
import pytest
import torch
from conftest import save_backbone
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dino.backbones import build_backbone
from dino.data.augmentations import IMAGENET_MEAN, IMAGENET_STD
from dino.loss import DINOLoss
from dino.networks import MultiCropWrapper
from dino.optim import get_params_groups
from dino.training.run import TrainState
from vision_transformer import DINOHead, vit_nano


class Waits(TorchDispatchMode):
    """The names of the operations, in `found`, for which a program waits if its device is a GPU.

    They read a number, or have a result whose size depends on numbers, or copy a new tensor of
    Python's numbers (`lift_fresh`). This is known on any device.
    """

    BY_NAME = ("_local_scalar_dense", "equal", "lift_fresh", "masked_select", "nonzero")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(
            index is not None and index.dtype is torch.bool for index in args[1]
        )
        if name in self.BY_NAME or by_mask:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waits_for_the_gpu():
    """RuntimeError for an operation that waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def final_state(folder):
    checkpoint = torch.load(folder / "checkpoint.pth", weights_only=True)
    for time_or_place in ("args",):
        checkpoint.pop(time_or_place)
    return checkpoint


def assert_equal_states(expected, found, path=""):
    """Every number of two nested checkpoints is the same, bit for bit."""
    assert type(expected) is type(found), path
    if isinstance(expected, dict):
        assert expected.keys() == found.keys(), path
        for key in expected:
            assert_equal_states(expected[key], found[key], f"{path}/{key}")
    elif isinstance(expected, list):
        assert len(expected) == len(found), path
        for i, pair in enumerate(zip(expected, found, strict=True)):
            assert_equal_states(*pair, f"{path}/{i}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(expected, found), path
    else:
        assert expected == found, path


def state_for_a_step(seed=0, device="cpu"):
    torch.manual_seed(seed)
    student, teacher = (
        MultiCropWrapper(
            vit_nano(8, img_size=32), DINOHead(96, 64, hidden_dim=32, bottleneck_dim=16)
        ).to(device)
        for _ in range(2)
    )
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    # not AdamW, which divides by gradients that may be as small as the rounding
    optimizer = torch.optim.SGD(get_params_groups(student), lr=0, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss = DINOLoss(64, 4, 0.04, 0.04, 0, 2).to(device)
    return TrainState(student, teacher, loss, optimizer, scaler)


def network(use_bn=False, out_dim=16):
    backbone = vit_nano(patch_size=8, img_size=32)
    head = DINOHead(96, out_dim, use_bn=use_bn, hidden_dim=8, bottleneck_dim=8)
    return MultiCropWrapper(backbone, head)


def training_objects(seed=0, use_bn=False):
    """Student, teacher, loss, optimizer and scaler, with state in each of them."""
    torch.manual_seed(seed)
    student, teacher, loss = network(use_bn), network(use_bn), DINOLoss(16, 2, 0.04, 0.04, 0, 5)
    optimizer = torch.optim.AdamW(get_params_groups(student), lr=0.01)
    loss(student([torch.randn(2, 3, 32, 32)] * 2), torch.randn(4, 16), 0).backward()
    optimizer.step()
    return dict(
        student=student,
        teacher=teacher,
        dino_loss=loss,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
    )


def save_random_backbone(path, arch):
    torch.manual_seed(0)
    backbone, _ = build_backbone(arch, 8, img_size=32)
    fields = dict(patch_size=8, image_size=32, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    save_backbone(path, MultiCropWrapper(backbone, nn.Identity()), arch=arch, **fields)
    return path


def parse(module, *flags):
    return module.get_args_parser().parse_args([*map(str, flags), "--device", "cpu"])


def refusal(monkeypatch, capsys, script, flags):
    """What `script` says about `flags`: one paragraph, exit code 2, before any network is built."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # restored afterwards
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *shlex.split(flags)])
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as stopped:
        module.main()
    said = capsys.readouterr()
    assert stopped.value.code == 2, said.err
    assert said.err.startswith(f"{script}.py: error: ")
    assert len(said.err.strip().splitlines()) == 1, said.err
    assert "Traceback" not in said.err
    return said


def numbered(shape, seed=0, scale=1.0):
    """Numbers from numpy's RandomState, whose stream is the same in every version."""
    values = np.random.RandomState(seed).standard_normal(shape) * scale
    return torch.from_numpy(values.astype(np.float32))


def fill(module):
    """Give every weight a value that does not depend on how the module initialises itself."""
    with torch.no_grad():
        for i, (name, value) in enumerate(sorted(module.state_dict().items())):
            is_scale = (name.endswith("weight") and "norm" in name) or name.endswith("weight_g")
            value.copy_(numbered(value.shape, i, 0.05) + is_scale)
    return module.eval()
