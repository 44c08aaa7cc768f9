# SPDX-License-Identifier: Apache-2.0
"""The method against Algorithm 1 and Eq. 1 to 4 of the paper, typed out naively."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from dino.loss import DINOLoss
from dino.networks import MultiCropWrapper, update_teacher
from dino.optim import cancel_gradients_last_layer
from vision_transformer import DINOHead, vit_nano


def logits(views, batch=4, outputs=32, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(views * batch, outputs, generator=generator)


def algorithm_1(student, teacher, center, views, teacher_temp, student_temp=0.1):
    """The paper's pseudo-code, pair by pair and image by image, in float64."""
    students = (student.double() / student_temp).chunk(views)
    teachers = ((teacher.double() - center.double()) / teacher_temp).chunk(2)
    total, pairs = 0.0, 0
    for i, t in enumerate(teachers):
        for j, s in enumerate(students):
            if i == j:
                continue
            total = total - (torch.softmax(t, dim=1) * torch.log_softmax(s, dim=1)).sum(1).mean()
            pairs += 1
    return total / pairs


@pytest.mark.parametrize("views", [2, 3, 10])
def test_loss_and_gradient_equal_algorithm_1(views):
    loss_module = DINOLoss(32, views, 0.04, 0.07, 0, 1)
    loss_module.center.normal_(generator=torch.Generator().manual_seed(1))
    student, teacher = logits(views).requires_grad_(), logits(2, seed=1)
    expected = algorithm_1(student, teacher, loss_module.center, views, 0.07)
    (expected_grad,) = torch.autograd.grad(expected, student)
    loss = loss_module(student, teacher, 0)
    loss.backward()
    # float32 against float64: relative rounding of 1e-7 in sums of 32 terms of size up to 100
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(student.grad, expected_grad, rtol=1e-4, atol=1e-6)


def test_loss_of_bfloat16_logits_is_computed_in_float32():
    student, teacher = logits(6).bfloat16(), logits(2, seed=1).bfloat16()
    loss_module = DINOLoss(32, 6, 0.04, 0.04, 0, 1)
    expected = algorithm_1(student, teacher, loss_module.center, 6, 0.04)
    student.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_module(student, teacher, 0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert student.grad.dtype == torch.bfloat16


def test_a_view_never_teaches_itself():
    """A student that equals the teacher, whose two views disagree, is right about itself only."""
    outputs, confident = 8, 50.0
    one_hot = confident * torch.eye(outputs)
    teacher = torch.stack([one_hot[0], one_hot[1]])  # one image, two views
    loss = DINOLoss(outputs, 2, 0.04, 0.04, 0, 1)(teacher.clone(), teacher, 0)
    assert loss.item() == pytest.approx(
        confident / 0.1, rel=1e-4
    )  # each pair is as wrong as can be


def test_student_gets_a_gradient_and_teacher_none():
    student, teacher = logits(4).requires_grad_(), logits(2).requires_grad_()
    DINOLoss(32, 4, 0.04, 0.04, 0, 1)(student, teacher, 0).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_center_moves_after_the_loss_by_the_mean_of_raw_teacher_logits():
    loss_module = DINOLoss(32, 3, 0.04, 0.04, 0, 1)
    expected = torch.zeros(1, 32, dtype=torch.float64)
    for step in range(4):
        student, teacher = logits(3, seed=step), logits(2, seed=10 + step)
        loss = loss_module(student, teacher, 0)
        by_hand = algorithm_1(student, teacher, expected, 3, 0.04)
        assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5), (
            "center of the batches before"
        )
        expected = 0.9 * expected + 0.1 * teacher.double().mean(0, keepdim=True)
        torch.testing.assert_close(loss_module.center.double(), expected, rtol=1e-5, atol=1e-6)


def test_uniform_student_gives_ln_of_out_dim():
    loss = DINOLoss(64, 4, 0.04, 0.04, 0, 1)(torch.zeros(8, 64), logits(2, 2, 64), 0)
    assert loss.item() == pytest.approx(math.log(64), rel=1e-6)


def test_teacher_temperature_warms_up_by_epoch_and_reaches_its_end_one_early():
    schedule = DINOLoss(8, 2, 0.04, 0.07, 4, 6).teacher_temp_schedule
    np.testing.assert_allclose(schedule, [0.04, 0.05, 0.06, 0.07, 0.07, 0.07])


def test_a_temperature_warm_up_longer_than_the_run_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match="30 epochs in a run of 10"):
        DINOLoss(8, 2, 0.04, 0.07, 30, 10)


class CountingBackbone(nn.Module):
    """Mean colour of an image, and the sizes of the batches it was called with."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.fc = nn.Linear(3, 1000)

    def forward(self, x):
        self.calls.append(tuple(x.shape))
        return x.mean((2, 3))


def test_crops_of_one_size_share_one_forward_pass_and_keep_their_order():
    sizes = [(32, 32)] * 2 + [(16, 16)] * 3 + [(32, 16)] * 2  # the last two differ by height alone
    crops = [torch.full((2, 3, *size), float(i)) for i, size in enumerate(sizes)]
    wrapper = MultiCropWrapper(CountingBackbone(), nn.Identity())
    output = wrapper(crops)
    assert [calls[0] for calls in wrapper.backbone.calls] == [4, 6, 4]
    assert output[:, 0].tolist() == [i for i in range(7) for _ in range(2)]
    assert isinstance(wrapper.backbone.fc, nn.Identity)
    torch.testing.assert_close(wrapper(crops[0]), output[:2])


def test_a_backbone_that_returns_a_tuple_gives_its_first_element():
    class Tuple(CountingBackbone):
        def forward(self, x):
            return super().forward(x), None

    output = MultiCropWrapper(Tuple(), nn.Identity())([torch.ones(2, 3, 8, 8)])
    assert output.shape == (2, 3)


def networks():
    torch.manual_seed(0)
    student = MultiCropWrapper(
        vit_nano(8, img_size=16), DINOHead(96, 32, use_bn=True, hidden_dim=16)
    )
    torch.manual_seed(1)
    teacher = MultiCropWrapper(
        vit_nano(8, img_size=16), DINOHead(96, 32, use_bn=True, hidden_dim=16)
    )
    return student, teacher


def test_teacher_is_the_moving_average_of_parameters_and_not_of_buffers():
    student, teacher = networks()
    student.train()([torch.randn(4, 3, 16, 16)])  # moves the student's running statistics
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    update_teacher(student, teacher, 0.9)
    parameters = dict(student.named_parameters())
    for name, value in teacher.state_dict().items():
        if name in parameters:
            expected = 0.9 * before[name] + 0.1 * parameters[name].detach()
            torch.testing.assert_close(value, expected)
        else:
            assert torch.equal(value, before[name]), name
    frozen = {name: value.clone() for name, value in teacher.state_dict().items()}
    update_teacher(student, teacher, 1.0)
    assert all(torch.equal(value, frozen[name]) for name, value in teacher.state_dict().items())


def test_last_layer_neither_moves_nor_decays_while_it_is_frozen():
    student, _ = networks()
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.1, weight_decay=0.5)
    for epoch, frozen in [(0, True), (1, False)]:
        before = student.head.last_layer.weight_v.clone()
        optimizer.zero_grad()
        student([torch.randn(4, 3, 16, 16)]).square().mean().backward()
        cancel_gradients_last_layer(epoch, student, freeze_last_layer=1)
        optimizer.step()
        assert torch.equal(student.head.last_layer.weight_v, before) is frozen
