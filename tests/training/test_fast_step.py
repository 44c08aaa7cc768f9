# SPDX-License-Identifier: Apache-2.0
"""What makes a step faster or smaller leaves its numbers alone."""

import contextlib
import copy
import itertools

import pytest
import torch
import torch.distributed as dist
from conftest import SMALL_RUN, run_processes, run_python
from functorch.compile import make_boxed_func
from helpers import Waits, no_waits_for_the_gpu, state_for_a_step
from torch._dynamo.backends.common import aot_autograd
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import main_dino
from dino.backbones import build_backbone
from dino.loss import DINOLoss
from dino.networks import MultiCropWrapper, choose_compile, compile_networks, unwrap
from dino.optim import build_optimizer, get_params_groups
from dino.training.health import Monitor
from dino.training.run import TrainState
from vision_transformer import DINOHead, VisionTransformer, vit_nano

STEP = dict(
    lr=0.1,
    weight_decay=0.1,
    momentum=0.9,
    epoch=1,
    clip_grad=0.1,
    freeze_last_layer=1,
    amp_dtype=torch.float32,
)


def steps(state, batch=8, share=slice(None), **options):
    """Losses of two steps on the same random views, of which this process has a `share`."""
    losses = []
    for seed in range(2):
        torch.manual_seed(seed)
        images = [torch.randn(batch, 3, size, size)[share] for size in (32, 32, 16, 16)]
        images = [view.to(state.dino_loss.center.device) for view in images]
        losses.append(main_dino.train_step(state, images, **STEP | options)[0].item())
    return losses


def assert_equal_training(found, expected):
    """Weights, center and losses: sums in another order, through two steps, in float32."""
    (state, losses), (expected_state, expected_losses) = found, expected
    assert losses == pytest.approx(expected_losses, rel=1e-5, abs=1e-6)
    for name in ("student", "teacher", "dino_loss"):
        ours, reference = (getattr(s, name).state_dict() for s in (state, expected_state))
        for key, value in reference.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-5, msg=f"{name} {key}")


@pytest.fixture(scope="module")
def plain():
    state = state_for_a_step()
    return state, steps(state)


@pytest.mark.parametrize("parts", [2, 4])
def test_a_step_in_parts_equals_the_unsplit_step(plain, parts):
    state = state_for_a_step()
    state.dino_loss.accum_steps = parts
    assert_equal_training((state, steps(state)), plain)


def half_of_the_batch_in_parts(rank_of):
    state = state_for_a_step()
    state.dino_loss.accum_steps = 2
    state.student = DistributedDataParallel(state.student, gradient_as_bucket_view=True)
    rank = torch.distributed.get_rank()
    losses = steps(state, share=slice(4 * rank, 4 * rank + 4))
    return state.student.module.state_dict(), state.dino_loss.center, losses


def test_parts_on_two_processes_equal_the_unsplit_step_of_one(plain, tmp_path):
    state, losses = plain
    ranks = run_processes(half_of_the_batch_in_parts, 2, tmp_path, None)
    for weights, center, _ in ranks:
        torch.testing.assert_close(center, state.dino_loss.center)
        for key, value in state.student.state_dict().items():
            torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=1e-5, msg=key)
    means = torch.tensor([rank[2] for rank in ranks]).mean(dim=0)
    assert means.tolist() == pytest.approx(losses, rel=1e-5, abs=1e-6)


def test_checkpointed_gradients_equal_the_kept_ones(plain):
    state = state_for_a_step()
    state.student.backbone.set_grad_checkpointing()
    assert_equal_training((state, steps(state)), plain)


def test_checkpointing_drops_the_same_paths_when_it_computes_again():
    """The masks are drawn once more in the backward pass, from the state they were drawn from."""
    kept = vit_nano(8, img_size=32, drop_path_rate=0.5)
    again = copy.deepcopy(kept)
    again.set_grad_checkpointing()
    images = torch.randn(4, 3, 32, 32)
    for model in (kept, again):
        torch.manual_seed(0)
        model(images).square().sum().backward()
    for expected, found in zip(kept.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


def test_checkpointing_keeps_less_for_the_backward_pass():
    kept = {}
    for enable in (False, True):
        model = VisionTransformer([32], 8, embed_dim=48, depth=4, num_heads=3)
        model.set_grad_checkpointing(enable)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, saved=saved: saved.append(tensor.nelement()) or tensor, lambda x: x
        ):
            model(torch.randn(4, 3, 32, 32))
        kept[enable] = sum(saved)
    assert kept[True] < kept[False] / 3


def test_compiled_networks_and_loss_give_the_same_numbers(monkeypatch):
    """Two blocks suffice, since all are alike; fused kernels round in other places: 1e-4."""
    # kernels without vector instructions: two thirds of the time to compile
    monkeypatch.setattr(torch._inductor.config.cpp, "vec_isa_ok", False)
    results = []
    for compiled in (False, True):
        state = state_for_a_step()
        for network in (state.student, state.teacher):
            del network.backbone.blocks[2:]
        if compiled:
            compile_networks(state.student, state.teacher, state.dino_loss)
        results.append((state, steps(state)))
    assert_equal_training(*reversed(results))
    assert results[0][0].student.state_dict().keys() == results[1][0].student.state_dict().keys()


@pytest.fixture
def nothing_compiled():
    """A process group of one, for DDP, and no compiled code from tests before."""
    torch._dynamo.reset()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def small_state(with_ddp, views=4, device="cpu"):
    """Networks of three blocks, which drop paths, for views of 32 and 16 pixels."""
    torch.manual_seed(0)
    options = dict(embed_dim=48, depth=3, num_heads=3, qkv_bias=True)
    student, teacher = (
        MultiCropWrapper(
            VisionTransformer([32], 8, drop_path_rate=rate, **options),
            DINOHead(48, 64, hidden_dim=32, bottleneck_dim=16),
        ).to(device)
        for rate in (0.2, 0.0)
    )
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    optimizer = torch.optim.SGD(get_params_groups(student), lr=0, momentum=0.9)
    if with_ddp:
        student = DistributedDataParallel(student, gradient_as_bucket_view=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss = DINOLoss(64, views, 0.04, 0.07, 2, 3).to(device)
    return TrainState(student, teacher, loss, optimizer, scaler)


def graphs_of_three_steps(with_ddp, device="cpu", **options):
    """(graphs compiled, graphs run) in each of three steps, of three epochs."""
    compiled, ran = [], []

    def backend(graph, _):
        compiled.append(graph)
        return lambda *inputs: ran.append(graph) or graph(*inputs)

    state = small_state(with_ddp, device=device)
    compile_networks(state.student, state.teacher, state.dino_loss, backend=backend)
    images = [torch.randn(2, 3, size, size, device=device) for size in (32, 32, 16, 16)]
    counts = []
    for epoch in range(3):
        compiled.clear()
        ran.clear()
        main_dino.train_step(state, images, **STEP | dict(epoch=epoch, **options))
        counts.append((len(compiled), len(ran)))
        with torch.compiler.set_stance("force_eager"), torch.no_grad():  # as the k-NN probe does
            unwrap(state.student).eval().backbone(torch.randn(1, 3, 48, 48, device=device))
            state.student.train()
    return counts


# Student for two sizes, its head, teacher, its head, loss; under DDP each of its three blocks is
# run for both sizes and is compiled for both, as they differ: one drops no paths, one has only
# [CLS]. The teacher is never in a DDP without batch norms.
GRAPHS = {False: (6, 6), True: (3 * 2 + 4, 3 * 2 + 4)}


@pytest.mark.parametrize("with_ddp", [False, True])
def test_nothing_is_compiled_after_the_first_step(with_ddp, nothing_compiled):
    compiled, ran = GRAPHS[with_ddp]
    assert graphs_of_three_steps(with_ddp) == [(compiled, ran), (0, ran), (0, ran)]


@pytest.mark.cuda
@pytest.mark.parametrize("amp_dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_compiled_after_the_first_step_on_a_gpu(amp_dtype, nothing_compiled):
    compiled, ran = GRAPHS[False]
    found = graphs_of_three_steps(with_ddp=False, device="cuda", amp_dtype=amp_dtype)
    assert found == [(compiled, ran), (0, ran), (0, ran)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_compiled_batch_norms_of_two_crop_sizes_give_their_gradients(device, nothing_compiled):
    """Each size changes the running means, which no graph of a backward pass may have kept."""
    torch.manual_seed(0)
    backbone, width = build_backbone("resnet_nano", 16, img_size=32, stem="small")
    head = DINOHead(width, 16, use_bn=True, hidden_dim=8, bottleneck_dim=8)
    plain = MultiCropWrapper(backbone, head).to(device)
    compiled = copy.deepcopy(plain)
    # which graphs inductor gets, without its code
    options = dict(backend="aot_eager_decomp_partition")
    compile_networks(compiled, copy.deepcopy(plain), DINOLoss(16, 3, 0.04, 0.04, 0, 1), **options)
    crops = [torch.randn(4, 3, size, size, device=device) for size in (32, 32, 16)]
    for network in (plain, compiled):
        network(crops).square().sum().backward()
    expected, found = (
        torch.cat([param.grad.flatten() for param in network.parameters() if param.requires_grad])
        for network in (plain, compiled)
    )
    assert (found - expected).norm() < 1e-2 * expected.norm()  # a GPU's convolutions are of TF32


def test_blocks_share_their_code_whatever_their_rate_of_stochastic_depth(nothing_compiled):
    """The first drops nothing, the last is for [CLS] alone; the six between are one graph."""
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph

    network = VisionTransformer([16], 8, embed_dim=12, depth=8, num_heads=3, drop_path_rate=0.1)
    for block in network.blocks:
        block.compile(dynamic=False, backend=backend)
    network(torch.randn(1, 3, 16, 16)).sum().backward()
    assert len(compiled) == 3


class MatrixProducts(TorchDispatchMode):
    """Counts them in `count`."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.__name__.split(".")[0] in ("mm", "addmm", "bmm")
        return function(*args, **(kwargs or {}))


def kept_and_multiplied(compiled):
    """Bytes kept for the backward pass, weights left out; its matrix products."""
    state = small_state(with_ddp=False)
    if compiled:
        backend = "aot_eager_decomp_partition"  # which graphs inductor gets, without its code
        compile_networks(state.student, state.teacher, state.dino_loss, backend=backend)
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in state.student.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # or another would get its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = state.student.backbone(torch.randn(16, 3, 32, 32)).sum()
    with MatrixProducts() as products:
        output.backward()
    return sum(size for size, _ in kept.values()), products.count


def test_compiled_code_keeps_less_and_multiplies_no_matrices_again(nothing_compiled):
    plain, compiled = map(kept_and_multiplied, (False, True))
    assert compiled[0] < 0.7 * plain[0]
    assert compiled[1] <= plain[1]


def order_of_gradients(with_ddp):
    """What happens in a backward pass: "graph" of compiled code, or the block of a gradient."""
    events = []

    def logged(graph, _):
        def run(inputs):
            events.append("graph")
            return graph(*inputs)

        run._boxed_call = True
        return run

    def nop(graph, _):
        return make_boxed_func(graph.forward)

    state = small_state(with_ddp, views=2)
    backend = aot_autograd(fw_compiler=nop, bw_compiler=logged)
    compile_networks(state.student, state.teacher, state.dino_loss, backend=backend)
    for number, block in enumerate(unwrap(state.student).backbone.blocks):
        for param in block.parameters():
            param.register_post_accumulate_grad_hook(lambda _, n=number: events.append(n))
    output = state.student([torch.randn(2, 3, 32, 32)] * 2)
    output.square().sum().backward()
    return [event for event, _ in itertools.groupby(events)]


def test_under_ddp_a_blocks_gradients_arrive_before_earlier_ones_are_computed(nothing_compiled):
    assert order_of_gradients(with_ddp=True) == ["graph", 2, "graph", 1, "graph", 0]
    at_the_end = order_of_gradients(with_ddp=False)
    assert at_the_end[0] == "graph" and at_the_end.count("graph") == 1


def test_compile_true_without_a_compiler_is_one_paragraph(class_folders, tmp_path):
    command = ("main_dino.py", "--data_path", class_folders / "train", "--output_dir", tmp_path)
    flags = (*SMALL_RUN, "--compile", "true")
    environ = dict(CXX="/no/such/compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    result = run_python(*command, *flags, timeout=100, **environ)
    assert result.returncode == 2, result.stderr
    assert "--compile true: torch.compile does not work here (" in result.stderr
    assert "/no/such/compiler" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA works here")
def test_compile_auto_continues_without_where_compiling_fails(capsys):
    assert not choose_compile("auto", torch.device("cuda"))
    assert "Warning: torch.compile does not work here (" in capsys.readouterr().out


def test_compile_auto_is_for_gpus_and_the_bare_flag_is_true():
    assert not choose_compile("auto", torch.device("cpu"))
    assert not choose_compile("false", torch.device("cuda"))
    assert not choose_compile(False, torch.device("cuda"))
    synchronised = torch.nn.Sequential(torch.nn.SyncBatchNorm(3))
    assert not choose_compile("auto", torch.device("cuda"), synchronised)
    assert main_dino.parse_args([]).compile == "auto"
    assert main_dino.parse_args(["--compile", "--epochs", "3"]).compile == "true"


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
@pytest.mark.parametrize("amp_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_asks_the_device_nothing(optimizer, amp_dtype):
    state = state_for_a_step()
    state.optimizer = build_optimizer(optimizer, get_params_groups(state.student))
    state.scaler = torch.amp.GradScaler("cpu", enabled=amp_dtype == torch.float16)
    images = [torch.randn(4, 3, size, size) for size in (32, 32, 16, 16)]
    options = STEP | dict(amp_dtype=amp_dtype)
    main_dino.train_step(state, images, **options)  # makes what is made once
    with Waits() as waits:
        main_dino.train_step(state, images, **options)
    is_asked = state.scaler.is_enabled() and optimizer != "adamw"  # as build_optimizer says
    assert waits.found == ["_local_scalar_dense"] * is_asked


@pytest.mark.cuda
@pytest.mark.parametrize("amp_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_logged_step_on_a_gpu_never_waits_for_the_device(amp_dtype):
    device = torch.device("cuda", 0)
    state = state_for_a_step(device=device)
    state.optimizer = build_optimizer("adamw", get_params_groups(state.student))
    state.scaler = torch.amp.GradScaler("cuda", enabled=amp_dtype == torch.float16)
    images = [torch.randn(4, 3, size, size, device=device) for size in (32, 32, 16, 16)]
    monitor = Monitor(state.dino_loss)
    monitor.watching = True
    for context in (contextlib.nullcontext(), no_waits_for_the_gpu()):  # some is made once
        with context:
            main_dino.train_step(state, images, **STEP | dict(amp_dtype=amp_dtype))
            monitor.take()


@pytest.mark.cuda
@pytest.mark.parametrize("compiled", [False, True])
def test_steps_on_a_gpu_are_those_on_a_cpu(compiled, nothing_compiled):
    """In float32 without TF32, with which weights, center and losses would be 6e-4 apart."""
    results = []
    for device in ("cpu", "cuda"):
        state = state_for_a_step(device=device)
        for network in (state.student, state.teacher):
            del network.backbone.blocks[2:]
        if compiled and device == "cuda":
            compile_networks(state.student, state.teacher, state.dino_loss)
        before = weights_of(state.student)
        losses = torch.tensor(steps(state))
        moved = [weights_of(state.student) - before, state.dino_loss.center.cpu()]
        results.append([losses, *moved])
    for found, expected in zip(*reversed(results), strict=True):
        assert (found - expected).norm() < 1e-4 * expected.norm()
    if compiled:
        images = [torch.randn(8, 3, size, size, device="cuda") for size in (32, 32, 16, 16)]
        with no_waits_for_the_gpu():
            main_dino.train_step(state, images, **STEP)


def weights_of(network):
    return torch.cat([param.detach().flatten() for param in network.parameters()]).cpu()
