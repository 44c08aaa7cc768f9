# SPDX-License-Identifier: Apache-2.0
"""The weighted k-NN against its definition, and eval_knn.py as a user runs it."""

import importlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SMALL_RUN, photograph, run_processes, run_ranks, run_script

from dino.backbones import build_backbone
from dino.data.augmentations import IMAGENET_MEAN, IMAGENET_STD, eval_transform
from dino.data.images import list_labelled_images
from dino.data.loaders import evaluation_loader
from dino.errors import UserError
from dino.evaluation import knn
from dino.evaluation.features import extract_features
from dino.precision import choose_amp_dtype
from dino.training.data import build_augmentation, open_images
from dino.training.flags import parse_args
from eval_knn import FEATURE_FILES, dump_features, eval_knn, get_args_parser, knn_classifier
from main_dino import build_probes


def clusters(count, classes, seed, dim=16):
    """Unit features around one direction per class, and labels; every class occurs."""
    rng = np.random.default_rng(seed)
    directions = np.random.default_rng(99).standard_normal((classes, dim))
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, count - classes)])
    features = directions[labels] + 1.5 * rng.standard_normal((count, dim))
    features = F.normalize(torch.tensor(features, dtype=torch.float32), dim=1)
    return features, torch.tensor(labels)


def by_definition(train, train_labels, test, test_labels, k, temperature):
    """Image by image: each neighbour votes for its class with exp(cosine / temperature)."""
    classes = int(train_labels.max()) + 1
    first = among_five = 0
    for feature, label in zip(test.double().numpy(), test_labels.tolist(), strict=True):
        cosines = train.double().numpy() @ feature
        votes = np.zeros(classes)
        for i in np.argsort(-cosines)[:k]:
            votes[train_labels[i]] += math.exp(cosines[i] / temperature)
        ranking = np.argsort(-votes, kind="stable").tolist()
        first += ranking[0] == label
        among_five += label in ranking[: min(5, k)]
    return 100 * first / len(test), 100 * among_five / len(test)


@pytest.mark.parametrize("k", [1, 3, 20])
def test_votes_equal_the_definition(k):
    train, test = clusters(300, 12, seed=0), clusters(70, 12, seed=1)
    found = knn_classifier(*train, *test, k, 0.07, num_classes=12)
    assert found == pytest.approx(by_definition(*train, *test, k, 0.07))
    assert 20 < found[0] < 95, "neither chance nor perfect: the comparison can fail"


def test_counts_every_image_of_a_set_smaller_than_a_hundred_and_larger_than_a_chunk(monkeypatch):
    train, test = clusters(300, 12, seed=0), clusters(99, 12, seed=1)
    whole = knn_classifier(*train, *test, 10, 0.07)
    monkeypatch.setattr(knn, "VOTES_AT_A_TIME", 1000 * 7)  # seven test images at a time
    assert knn_classifier(*train, *test, 10, 0.07) == whole
    assert whole == pytest.approx(by_definition(*train, *test, 10, 0.07))


def test_more_than_a_thousand_classes():
    train, test = clusters(3000, 1500, seed=0, dim=64), clusters(1500, 1500, seed=1, dim=64)
    found = knn_classifier(*train, *test, 5, 0.07)
    assert found == pytest.approx(by_definition(*train, *test, 5, 0.07))


def test_votes_of_many_close_neighbours_do_not_overflow():
    """A class of 2,000 images is ahead of one of 1,000, whose number comes first."""
    features = torch.ones(3000, 4) / 2
    labels = torch.arange(3000).clamp(min=999, max=1000) - 999
    accuracies = knn.knn_accuracies(
        features, labels, features[:8], torch.ones(8).long(), [3000], 0.012, 2
    )
    assert accuracies[3000][0] == 100


def test_no_top_5_where_there_are_fewer_than_five_classes():
    train, test = clusters(50, 4, seed=0), clusters(20, 4, seed=1)
    top1, top5 = knn_classifier(*train, *test, 10, 0.07, num_classes=4)
    assert top1 > 25
    assert math.isnan(top5)


def test_all_ks_in_one_pass_equal_one_pass_for_each():
    train, test = clusters(300, 12, seed=0), clusters(70, 12, seed=1)
    together = knn.knn_accuracies(*train, *test, [1, 5, 20], 0.07, 12)
    alone = {k: knn.knn_accuracies(*train, *test, [k], 0.07, 12)[k] for k in (1, 5, 20)}
    assert together == alone
    for k in together:
        top1, top5 = knn_classifier(*train, *test, k, 0.07)
        assert together[k][0] == top1
        assert together[k][1] <= top5, "a class without a vote may be among its first five"


def test_ks_in_any_order_and_classes_without_a_training_image():
    train, test = clusters(300, 12, seed=0), clusters(70, 12, seed=1)
    votes = knn.count_correct(*train, *test, [20, 1, 5], 0.07, 12)
    assert votes[[1, 2, 0]].equal(knn.count_correct(*train, *test, [1, 5, 20], 0.07, 12))
    unknown = torch.full_like(test[1], 1200)
    assert knn_classifier(*train, test[0], unknown, 20, 0.07) == (0, 0)


def test_equal_votes_count_as_in_a_stable_sort():
    votes = torch.randint(3, (200, 9), generator=torch.Generator().manual_seed(0)).float()
    labels = torch.arange(200) % 9
    ranking = votes.argsort(dim=1, descending=True, stable=True)
    assert knn.places(votes, labels).equal((ranking == labels[:, None]).int().argmax(dim=1))


def tiles(per_photograph, seed):
    """Normalised tiles of 32 pixels, in batches of 100, and which of four photographs they are
    from.
    """
    rng, images = np.random.default_rng(seed), []
    for name in ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg"):
        pixels = np.asarray(photograph(name))
        for _ in range(per_photograph):
            top, left = rng.integers(0, pixels.shape[0] - 32), rng.integers(0, pixels.shape[1] - 32)
            images.append(pixels[top : top + 32, left : left + 32])
    images = torch.tensor(np.stack(images)).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    labels = torch.arange(4).repeat_interleave(per_photograph)
    return list(zip(((images - mean) / std).split(100), labels.split(100), strict=True))


def test_features_in_bfloat16_keep_the_accuracy():
    """To 0.1 point, in the mean of three networks: a single tile of the 1,000 is as much."""
    train, test, cpu = tiles(250, seed=0), tiles(250, seed=1), torch.device("cpu")
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        backbone, _ = build_backbone("vit_nano", 8, img_size=32)
        for dtype in (torch.float32, torch.bfloat16):
            features = [
                tensor
                for loader in (train, test)
                for tensor in extract_features(backbone, loader, 1000, cpu, amp_dtype=dtype)
            ]
            found.append(knn.knn_accuracies(*features, [20], 0.07, 4)[20][0])
    drift = np.diff(np.array(found).reshape(3, 2))
    assert abs(drift.mean()) <= 0.1
    assert all(60 < accuracy < 95 for accuracy in found), "tiles that can change sides"


def features_and_accuracy(root):
    torch.manual_seed(0)
    backbone, _ = build_backbone("vit_nano", 8, img_size=32)
    both = []
    for part in ("train", "val"):
        paths, labels, _ = list_labelled_images(root, part)
        paths, labels = paths[:-1], labels[:-1]  # 23 and 11: two processes get unequal shares
        loader = evaluation_loader(
            paths, labels, eval_transform(32), batch_size=4, num_workers=0, pin_memory=False
        )
        both += extract_features(backbone, loader, len(paths), torch.device("cpu"))
    return both, knn.knn_accuracies(*both, [3], 0.07, 3)


def test_two_processes_count_every_image_once(class_folders, tmp_path):
    features, accuracy = features_and_accuracy(class_folders)
    assert [len(tensor) for tensor in features] == [23, 23, 11, 11]
    for rank_features, rank_accuracy in run_processes(
        features_and_accuracy, 2, tmp_path, class_folders
    ):
        for alone, shared in zip(features, rank_features, strict=True):
            # another composition of batches rounds otherwise
            torch.testing.assert_close(alone, shared, rtol=0, atol=1e-5)
        assert rank_accuracy[3][0] == pytest.approx(accuracy[3][0])


def accuracies_of_two(root, together):
    """Of networks apart or together; and how many images this rank has read for them."""
    read = []

    def transform(image):
        read.append(image)
        return eval_transform(32)(image)

    probe = knn.KnnProbe(root, transform, torch.device("cpu"), batch_size=4, num_workers=0, k=3)
    torch.manual_seed(0)
    networks = [build_backbone("vit_nano", 8, img_size=32)[0].train() for _ in range(2)]
    groups = [networks] if together else [[network] for network in networks]
    found = [accuracy for group in groups for accuracy in probe.accuracies(group)]
    assert all(network.training for network in networks)
    return found, len(read)


@pytest.mark.parametrize("processes", [1, 2])
def test_teacher_and_student_share_the_reading_of_each_image(processes, class_folders, tmp_path):
    (apart, twice), (together, once) = (
        run_processes(accuracies_of_two, processes, tmp_path / str(flag), class_folders, flag)[0]
        for flag in (False, True)
    )
    assert together == apart
    assert len(set(apart)) == 2, "networks that differ"
    assert once == 36 / processes
    assert twice == 2 * once


def test_script_needs_a_checkpoint_and_a_folder_only(checkpoint, class_folders, tmp_path):
    flags = ("--pretrained_weights", checkpoint, "--num_workers", 0, "--device", "cpu")
    alone = run_script(
        "eval_knn.py", *flags, "--data_path", class_folders, "--dump_features", tmp_path / "dumped"
    )
    assert alone.returncode == 0, alone.stderr
    assert "Loaded 78 of 78 tensors of vit_nano" in alone.stdout
    assert "--nb_knn: there are 24 training images, so k is at most 24." in alone.stdout
    results = [line for line in alone.stdout.splitlines() if "classifier result" in line]
    assert [line.split("-")[0] for line in results] == ["10", "20", "24"]
    assert "Top5" not in alone.stdout  # three classes
    loaded = run_script("eval_knn.py", "--load_features", tmp_path / "dumped", "--device", "cpu")
    assert [line for line in loaded.stdout.splitlines() if "classifier" in line] == results
    code, shared = run_ranks(2, "eval_knn.py", *flags, "--data_path", class_folders)
    assert code == 0, shared
    assert [line for line in shared.splitlines() if "classifier" in line] == results


def test_a_dump_that_does_not_fit_leaves_no_half_beside_half_of_another(tmp_path):
    first, labels = torch.ones(2, 4), torch.tensor([0, 1])
    dump_features(tmp_path, [first, labels, first, labels])
    (tmp_path / "limited.py").write_text(
        "import resource, sys, torch, eval_knn\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5))\n"
        "small, large = torch.zeros(2, 4), torch.zeros(50000, 4)\n"
        "labels = [torch.zeros(len(rows)).long() for rows in (small, large)]\n"
        "with eval_knn.exit_on_user_error('eval_knn.py'):\n"
        "    eval_knn.dump_features(sys.argv[1], [small, labels[0], large, labels[1]])\n"
    )
    limited = run_script(tmp_path / "limited.py", tmp_path, PYTHONPATH=str(ROOT))
    assert limited.returncode == 2, limited.stderr
    assert torch.load(tmp_path / "trainfeat.pth").equal(first)
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == sorted(FEATURE_FILES)


def test_precision_of_the_features_is_what_the_flag_says(checkpoint, class_folders, tmp_path):
    features = {}
    for dtype in ("auto", "float32", "bfloat16"):
        flags = ("--pretrained_weights", checkpoint, "--num_workers", 0, "--device", "cpu")
        flags += ("--data_path", class_folders, "--dump_features", tmp_path, "--amp_dtype", dtype)
        eval_knn(get_args_parser().parse_args([*map(str, flags)]))
        features[dtype] = torch.load(tmp_path / "trainfeat.pth")
    assert features["auto"].equal(features["float32"]), "on a CPU"
    difference = (features["bfloat16"] - features["float32"]).abs().max()
    assert 0 < difference < 0.02, "some steps of 2**-9 of numbers up to 1"


@pytest.mark.parametrize(
    "script",
    ["eval_knn", "eval_linear", "eval_image_retrieval", "eval_copy_detection", "extract_features"],
)
def test_numbers_to_compare_with_others_are_computed_in_float32_as_theirs(script):
    """On a GPU, bfloat16 moves k-NN accuracies by 0.1 to 0.3 points."""
    required = ["--output", "features.npz"] if script == "extract_features" else []
    args = importlib.import_module(script).get_args_parser().parse_args(required)
    assert choose_amp_dtype(args.amp_dtype, torch.device("cuda")) == torch.float32


def test_a_run_measures_in_float32_whatever_it_trains_in(class_folders, tmp_path):
    flags = ("--amp_dtype", "bfloat16", "--data_path", class_folders / "train")
    flags += ("--knn_data_path", class_folders, "--output_dir", tmp_path)
    args = parse_args([str(flag) for flag in (*SMALL_RUN, *flags)])
    augmentation, cpu = build_augmentation(args), torch.device("cpu")
    probes = build_probes(args, *open_images(args), augmentation, 0, cpu)
    backbone, _ = build_backbone("vit_nano", 8, img_size=32)
    types = []
    backbone.patch_embed.register_forward_hook(lambda *call: types.append(call[-1].dtype))
    probes.knn.accuracies([backbone])
    probes.sample.measure(backbone)
    assert set(types) == {torch.float32}
    assert len(types) >= 3, "training images, held-out images, pairs of views"


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (torch.tensor([0, 1, 255, 1], dtype=torch.uint8), 3),
        (torch.tensor([7, 2**40, 2**62, 7]), 3),  # not as many classes as the largest number
        (torch.tensor([0, 1, 1, 0], dtype=torch.int16), 2),
        (torch.tensor([True, False, True, True]), None),
        (torch.tensor([0.0, 1.0, 1.0, 0.0]), None),
    ],
)
def test_labels_of_any_whole_numbers_are_classes_and_others_are_refused(labels, classes, tmp_path):
    features = F.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    for part in ("train", "test"):
        torch.save(features, tmp_path / f"{part}feat.pth")
        torch.save(labels, tmp_path / f"{part}labels.pth")
    flags = ["--load_features", str(tmp_path), "--device", "cpu", "--nb_knn", "1"]
    if classes is None:
        with pytest.raises(UserError, match="not a 1-D tensor of class numbers"):
            eval_knn(get_args_parser().parse_args(flags))
    else:
        assert eval_knn(get_args_parser().parse_args(flags))[1][0] == 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.double() * 1e200, r"testfeat\.pth has values that are not finite"),
        (lambda table: table * 5, r"testfeat\.pth has a row of length 5, .* Normalise"),
        (lambda table: table * (torch.arange(4) > 0)[:, None], r"testfeat.* a row of length 0"),
        (lambda table: table[:, :0], r"testfeat\.pth has rows without a number"),
        (lambda table: table.double(), None),
        (lambda table: table.half(), None),
        (lambda table: table.bfloat16(), None),
    ],
)
def test_loaded_features_must_be_normalised_but_for_their_rounding(change, message, tmp_path):
    features = F.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    tables = (features, torch.arange(4), change(features).clone(), torch.arange(4))
    for name, table in zip(FEATURE_FILES, tables, strict=True):
        torch.save(table, tmp_path / name)
    flags = ["--load_features", str(tmp_path), "--device", "cpu", "--nb_knn", "1"]
    if message:
        with pytest.raises(UserError, match=message):
            eval_knn(get_args_parser().parse_args(flags))
    else:
        assert eval_knn(get_args_parser().parse_args(flags))[1][0] == 100


def test_script_refuses_flags_that_contradict_the_checkpoint(checkpoint, class_folders):
    result = run_script(
        *("eval_knn.py", "--pretrained_weights", checkpoint, "--data_path", class_folders),
        *("--arch", "vit_base", "--device", "cpu"),
    )
    assert result.returncode == 2
    assert f"--arch vit_base: {checkpoint} holds a backbone with arch vit_nano" in result.stderr
    assert "Traceback" not in result.stderr
