# SPDX-License-Identifier: Apache-2.0
"""A folder of right inputs and of wrong ones, for the tests of what scripts refuse."""

import json

import torch
from conftest import photograph

from dino.backbones import build_backbone
from dino.loss import DINOLoss
from dino.networks import MultiCropWrapper
from dino.optim import get_params_groups
from dino.randomness import random_state
from dino.run_log import KINDS
from dino.training.checkpoint import training_payload
from dino.weights.files import backbone_payload
from vision_transformer import DINOHead


def write_inputs(root):
    write_images(root)
    write_weights(root)
    write_runs(root)


def write_images(root):
    tile = photograph().resize((48, 48))
    folders = ["images", "pairs/images", "pairs/masks", "lonely/images", "lonely/masks"]
    folders += [f"labelled/{part}/{name}" for part in ("train", "val") for name in ("cat", "dog")]
    folders += ["zebra/train/cat", "zebra/val/zebra", "bare/train/cat", "bare/val", "colours"]
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
    for folder in ["images", *folders[5:-2]]:
        for i in range(6):
            tile.save(root / folder / f"{i}.png")
    tile.save(root / "pairs/images/a.png")
    tile.convert("1").save(root / "pairs/masks/a.png")
    tile.save(root / "lonely/images/a.png")
    (root / "bare/val").rmdir()
    (root / "empty").mkdir()
    (root / "empty.txt").write_text("\n\n")
    (root / "missing.txt").write_text("images/0.png\nimages/nowhere.png\n")
    (root / "folder.txt").write_text("images\n")
    (root / "binary.txt").write_bytes(b"\x80\x81\xff\x00" * 50)
    (root / "broken.jpg").write_bytes((root / "images/0.png").read_bytes()[:900])
    (root / "file").write_text("a file where a folder should be\n")


def write_weights(root):
    torch.manual_seed(0)
    networks = []
    for _ in range(2):
        backbone, embed_dim = build_backbone("vit_nano", 8, img_size=32)
        head = DINOHead(embed_dim, 64, hidden_dim=32, bottleneck_dim=16)
        networks.append(MultiCropWrapper(backbone, head))
    description = dict(
        arch="vit_nano", patch_size=8, image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    whole = backbone_payload(networks[1], **description)

    def save(name, **changed):
        torch.save({**whole, "teacher": {**whole["teacher"], **changed}}, root / name)

    save("backbone.pth")
    save("nan.pth", norm=None, cls_token=torch.full((1, 1, 96), torch.nan))
    save("shape.pth", cls_token=torch.zeros(1, 1, 95))
    short = {name: value for name, value in whole["teacher"].items() if name != "norm.bias"}
    torch.save({**whole, "teacher": short}, root / "short.pth")
    content = (root / "backbone.pth").read_bytes()
    (root / "cut.pth").write_bytes(content[: len(content) // 2])
    (root / "text.pth").write_text("version https://git-lfs.github.com/spec/v1\n")
    (root / "zero.pth").write_bytes(b"")
    (root / "folder.pth").mkdir()
    torch.save([1, 2], root / "list.pth")
    torch.save(torch.ones(3), root / "tensor.pth")
    objects = dict(
        student=networks[0],
        teacher=networks[1],
        dino_loss=DINOLoss(64, 4, 0.04, 0.04, 0, 2),
        optimizer=torch.optim.AdamW(get_params_groups(networks[0])),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
    )
    progress = dict(epoch=1, iteration=1, iterations_per_epoch=1, global_batch=4)
    args = dict(arch="vit_nano", patch_size=8, out_dim=64)
    training = training_payload(objects, progress, args, [random_state()])
    torch.save(training, root / "training.pth")
    training["student"]["module.backbone.cls_token"] = torch.full((1, 1, 96), torch.inf)
    torch.save(training, root / "infinite.pth")


def write_runs(root):
    """Folders of other runs, whole and damaged, and features for eval_knn.py."""
    for folder, file in (
        *(("finished", "training.pth"), ("damaged", "cut.pth"), ("supervised", "backbone.pth")),
        *(("infinite", "infinite.pth"), ("listed", "list.pth")),
    ):
        (root / folder).mkdir()
        (root / folder / "checkpoint.pth").write_bytes((root / file).read_bytes())
    for folder, picture in (("album", "overlay.png"), ("sheets", "attention.png")):
        (root / folder).mkdir()
        photograph().resize((8, 8)).save(root / folder / picture)
    (root / "linear").mkdir()
    (root / "linear/checkpoint.pth.tar").write_bytes(b"of eval_linear.py")
    (root / "linear/log.txt").write_text('{"train_loss": 1.0, "epoch": 0, "test_acc1": 3.0}\n')
    (root / "dino").mkdir()
    (root / "dino/log.txt").write_text('{"train_loss": 1, "train_wd": 1, "epoch": 0}\n')
    step = dict.fromkeys(KINDS["loss"][0], 0.5) | dict(iteration=0, images_per_s=1.0)
    for name, args in (
        ("argless", None),
        ("halfway", '{"out_dim": '),
        ("measured", '{"out_dim": 64}'),
    ):
        (root / name).mkdir()
        (root / name / "metrics.jsonl").write_text(json.dumps(step) + "\n")
        if args:
            (root / name / "args.json").write_text(args)
    features, labels = torch.ones(4, 8), torch.zeros(4, dtype=torch.long)
    tables = {
        "part": [features],
        "unequal": [features, labels[:3], features, labels],
        "narrow": [features, labels, features[:, :5], labels],
        "notfinite": [features * torch.nan, labels, features, labels],
        "unlabelled": [features, labels.float(), features, labels],
        "negative": [features, labels - 1, features, labels],
        "nothing": [features[:0], labels[:0], features, labels],
    }
    names = ("trainfeat.pth", "trainlabels.pth", "testfeat.pth", "testlabels.pth")
    for folder, tensors in tables.items():
        (root / folder).mkdir()
        for name, tensor in zip(names, tensors, strict=False):
            torch.save(tensor.clone(), root / folder / name)
