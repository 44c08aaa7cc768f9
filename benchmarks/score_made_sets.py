# SPDX-License-Identifier: Apache-2.0
"""A backbone on the sets of made_sets.py, beside untrained ones and raw pixels.

    python main_dino.py --preset demo
    python benchmarks/made_sets.py made/
    python benchmarks/score_made_sets.py made/ --pretrained_weights runs/demo/backbone.pth

The first row has the scores that the commands in made_sets.py give. An untrained backbone has the
same architecture and random weights. Raw pixels are those of a 32 x 32 image.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))  # where the project's modules are

from dino.backbones import build_backbone
from dino.command_line import Parser, add_weights_arguments
from dino.data.copydays import list_folder, load_image, open_copydays
from dino.data.retrieval_set import open_retrieval_set
from dino.errors import exit_on_user_error
from dino.evaluation.copy_detection import descriptor, score_blocks
from dino.evaluation.features import CPU, describe_images
from dino.evaluation.retrieval import rank, score, set_features
from dino.weights.pretrained import Pretrained, open_backbone

IMSIZE = 64  # pixels
PIXELS = 32  # of a side of the raw images
UNTRAINED = 3  # random initialisations
TITLES = """\
            |        retrieval: mAP            |    strong copies      |      all copies
            |   easy    |  medium   |   hard    |    mAP    | micro-AP  |    mAP    | micro-AP"""


def main():
    parser = Parser(prog="score_made_sets.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what made_sets.py wrote")
    add_weights_arguments(parser)
    with exit_on_user_error("score_made_sets.py"):
        score_made_sets(parser.parse_args())


def score_made_sets(args):
    images = open_retrieval_set(args.folder, "photographs")
    copydays = open_copydays(args.folder / "copydays")
    distractors = list_folder(args.folder / "distractors", "folder")
    trained = open_backbone(args)
    print(f"In percent, images of {IMSIZE} pixels, no whitening:")
    print(TITLES)
    for name, network, describe in networks(trained):
        rows = set_features(network, images, IMSIZE, multiscale=False, device=CPU, batch_size=32)
        retrieved = score(rank(*rows), images.ground_truth, ks=[])
        load = partial(load_image, imsize=IMSIZE, mean=network.mean, std=network.std)
        describe_paths = partial(describe_images, describe, load=load, batch_size=32)
        copies = score_blocks(copydays, distractors, [], describe_paths)
        strong, every = copies["strong"], copies["copies"]
        scores = [mean for mean, *_ in retrieved.values()]
        scores += [strong["mAP"], strong["micro-AP"], every["mAP"], every["micro-AP"]]
        print(
            "|".join([f"{name:11} ", *[f"{100 * value:8.1f}   " for value in scores]]), flush=True
        )


def networks(trained):
    """(name, Pretrained, function that describes a batch for copy detection) of each row."""
    yield "trained", trained, partial(descriptor, trained.backbone)
    for seed in range(UNTRAINED):
        torch.manual_seed(seed)
        backbone, width = build_backbone(
            trained.arch, trained.patch_size, img_size=trained.image_size
        )
        untrained = Pretrained(backbone.eval(), width, trained.arch, trained.patch_size)
        yield f"untrained {seed}", untrained, partial(descriptor, backbone)
    pixels = nn.Sequential(nn.AdaptiveAvgPool2d(PIXELS), nn.Flatten())
    yield "raw pixels", Pretrained(pixels, 3 * PIXELS**2, "pixels", 1), pixels


if __name__ == "__main__":
    main()
