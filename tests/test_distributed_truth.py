# SPDX-License-Identifier: Apache-2.0
"""Two and four gloo processes find what one finds with the same global batch: in training (views,
gradients, center, weights), k-NN and linear evaluation. Each world is started once, for all claims.
"""

import shutil

import pytest
import torch
from conftest import SMALL_RUN, run_processes

import main_dino
from dino.backbones import build_backbone
from dino.data.augmentations import LinearProbeAugmentation, eval_transform
from dino.data.images import ImageFiles, list_labelled_images
from dino.data.loaders import evaluation_loader, training_loader
from dino.distributed import get_world_size
from dino.evaluation.features import FrozenFeatures, extract_features
from dino.evaluation.knn import knn_accuracies
from dino.evaluation.linear import evaluate_heads, train_heads_one_epoch
from dino.evaluation.linear_run import build_heads
from dino.networks import unwrap
from dino.randomness import fix_random_seeds
from dino.training.flags import parse_args

GLOBAL_BATCH = 8
CPU = torch.device("cpu")
# SGD, since AdamW divides by gradients that may be as small as the rounding; no stochastic depth,
# which each rank draws for itself.
RUN = (*SMALL_RUN, "--drop_path_rate", 0, "--optimizer", "sgd", "--batch_size_per_gpu")


def train(data, use_bn, seed=0):
    """Three steps on `data`: what the ranks saw, the first gradients, and what came of it."""
    flags = (*RUN, GLOBAL_BATCH // get_world_size(), "--use_bn_in_head", use_bn, "--seed", seed)
    args = parse_args([*map(str, flags), "--data_path", str(data)])
    fix_random_seeds(args.seed)
    augmentation = main_dino.build_augmentation(args)
    images, _ = main_dino.open_images(args)
    loader = main_dino.build_loader(args, images, augmentation, 0, CPU)
    state = main_dino.build_state(args, augmentation.views, CPU, torch.float32)
    start = {name: value.clone() for name, value in unwrap(state.student).named_parameters()}
    found = {"views": [], "losses": []}
    loader.sampler.set_position(epoch=1)
    for images in loader:
        loss, _ = main_dino.train_step(
            state,
            images,
            lr=0.1,
            weight_decay=0.1,
            momentum=0.9,
            epoch=1,
            clip_grad=0,
            freeze_last_layer=0,
            amp_dtype=torch.float32,
        )
        student = unwrap(state.student)
        if not found["losses"]:
            parameters = student.named_parameters()
            found["gradients"] = {n: p.grad.clone() for n, p in parameters if p.grad is not None}
        found["views"].append(images)
        found["losses"].append(loss)
    teacher = unwrap(state.teacher).state_dict()
    moved = [(p - start[n]).abs().max() for n, p in student.named_parameters()]
    return found | {
        "student": {name: value.clone() for name, value in student.state_dict().items()},
        "teacher": {name: value.clone() for name, value in teacher.items()},
        "center": state.dino_loss.center.clone(),
        "moved": max(moved),
    }


def evaluate_knn(data):
    """Features of 23 and 11 images, which no number of ranks divides, and the accuracies."""
    torch.manual_seed(0)
    backbone, _ = build_backbone("vit_nano", 8, img_size=32)
    sets = []
    for split in ("train", "val"):
        paths, labels, _ = list_labelled_images(data, split)
        options = dict(batch_size=3, num_workers=0, pin_memory=False)
        loader = evaluation_loader(paths, labels, eval_transform(32), **options)
        sets += extract_features(backbone, loader, len(paths), CPU)
    return {"features": sets, "knn": knn_accuracies(*sets, [1, 5, 20], 0.07, 3)}


def evaluate_linear(data, whole_data):
    """Three epochs of two heads on 24 images, and their validation on 11."""
    torch.manual_seed(0)
    backbone, embed_dim = build_backbone("vit_nano", 8, img_size=32)
    features = FrozenFeatures(backbone.eval(), embed_dim, CPU)
    options = dict(batch_size=GLOBAL_BATCH // get_world_size(), num_workers=0, pin_memory=False)
    paths, labels, _ = list_labelled_images(whole_data, "train")
    augmentation = LinearProbeAugmentation(32)
    loader = training_loader(ImageFiles(paths), augmentation, labels=labels, seed=0, **options)
    state = build_heads(features.dim, 3, [0.01, 0.1], 3, CPU)
    losses = []
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        losses += train_heads_one_epoch(features, state.heads, state.optimizer, loader, epoch, 0)
    paths, labels, _ = list_labelled_images(data, "val")
    options["batch_size"] = 3
    loader = evaluation_loader(paths, labels, eval_transform(32), **options)
    results = evaluate_heads(features, state.heads, loader, len(paths))
    return {"heads": state.heads.state_dict(), "linear_losses": losses, "linear": results}


def measure(whole_data, uneven_data, copies):
    return {
        "plain": train(whole_data / "train", False),
        "batch norms": train(whole_data / "train", True),
        "again": train(whole_data / "train", True),
        "another seed": train(whole_data / "train", True, seed=1),
        "copies": train(copies, False),
        **evaluate_knn(uneven_data),
        **evaluate_linear(uneven_data, whole_data),
    }


@pytest.fixture(scope="module")
def folders(class_folders, tmp_path_factory):
    """24 and 12 images; the same less one each; and 16 copies of one image."""
    root = tmp_path_factory.mktemp("data")
    shutil.copytree(class_folders, root / "uneven")
    for path in ("train/coffee/3.png", "val/astronaut/0.png"):
        (root / "uneven" / path).unlink()
    (root / "copies").mkdir()
    for i in range(16):
        shutil.copy(class_folders / "train" / "coffee" / "0.png", root / "copies" / f"{i:02}.png")
    return class_folders, root / "uneven", root / "copies"


@pytest.fixture(scope="module")
def alone(folders):
    return measure(*folders)


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, folders, tmp_path_factory):
    """What each of two or four processes found."""
    return run_processes(measure, request.param, tmp_path_factory.mktemp("world"), *folders)


def assert_close(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **tolerance, msg=name)


def in_order_of_images(views_of_ranks):
    """A step's views of all ranks, as one process has them: images are dealt out in turn."""
    return [torch.stack(parts, dim=1).flatten(0, 1) for parts in zip(*views_of_ranks, strict=True)]


def test_the_ranks_see_the_views_of_one_process_and_no_two_ranks_see_the_same(alone, ranks):
    for step, expected in enumerate(alone["plain"]["views"]):
        found = in_order_of_images([rank["plain"]["views"][step] for rank in ranks])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert step == 2
    for step in range(2):  # of copies of one image: whatever differs is the augmentation
        first_views = torch.cat([rank["copies"]["views"][step][0] for rank in ranks])
        assert len(first_views) == GLOBAL_BATCH
        assert len(first_views.flatten(1).unique(dim=0)) == GLOBAL_BATCH


# Sums in another order; batch norms of 8 images amplify their rounding.
TOLERANCES = {"plain": dict(rtol=1e-4, atol=1e-6), "batch norms": dict(rtol=2e-3, atol=1e-4)}


@pytest.mark.parametrize("kind", TOLERANCES)
def test_gradients_center_and_weights_are_those_of_one_process(alone, ranks, kind):
    tolerance, expected = TOLERANCES[kind], alone[kind]
    for rank in ranks:
        found = rank[kind]
        assert_close(found["gradients"], expected["gradients"], **tolerance)
        torch.testing.assert_close(found["center"], expected["center"], **tolerance)
        for network in ("student", "teacher"):
            assert_close(found[network], expected[network], **tolerance)
            assert_close(found[network], ranks[0][kind][network], rtol=0, atol=0)
        assert torch.equal(found["center"], ranks[0][kind]["center"])
    losses = torch.stack([torch.stack(rank[kind]["losses"]) for rank in ranks]).mean(dim=0)
    torch.testing.assert_close(losses, torch.stack(expected["losses"]), **tolerance)
    assert expected["moved"] > 100 * tolerance["atol"], "the steps moved far more than that"


def test_the_same_seed_gives_the_same_run_and_another_one_does_not(alone, ranks):
    for found in (alone, *ranks):
        for name in ("student", "teacher", "gradients"):
            assert_close(found["again"][name], found["batch norms"][name], rtol=0, atol=0)
        assert found["again"]["losses"] == found["batch norms"]["losses"]
        assert found["another seed"]["losses"] != found["again"]["losses"]


def test_knn_counts_each_image_once_however_many_ranks_share_them(alone, ranks):
    assert [len(rows) for rows in alone["features"]] == [23, 23, 11, 11]
    for rank in ranks:
        for found, expected in zip(rank["features"], alone["features"], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        for k, accuracies in alone["knn"].items():
            assert rank["knn"][k] == pytest.approx(accuracies, nan_ok=True)
    assert 0 < alone["knn"][5][0] < 100, "there is something to tell apart"


def test_linear_heads_and_their_accuracies_are_those_of_one_process(alone, ranks):
    for rank in ranks:
        assert_close(rank["heads"], alone["heads"], rtol=1e-4, atol=1e-6)
        assert rank["linear_losses"] == pytest.approx(alone["linear_losses"], rel=1e-5)
        for found, expected in zip(rank["linear"], alone["linear"], strict=True):
            assert found == pytest.approx(expected, rel=1e-5)
    accuracy = alone["linear"][0]["acc1"] * 11 / 100
    assert accuracy == pytest.approx(round(accuracy)), "a whole number of 11 images"
