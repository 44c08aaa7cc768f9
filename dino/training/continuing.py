# SPDX-License-Identifier: Apache-2.0
"""Training on from weights without losing what they know: --preset continue, or auto, --init_from.

What destroys features: a head that starts afresh under the learning rate of a run from scratch.
What each rule was measured on is in benchmarks/continue.md.
"""

from dino.errors import UserError
from dino.weights.starting import describe_weights, head_widths

LR = 5e-5  # for 256 images: a tenth of the official one
OFFICIAL_MOMENTUM = 0.996
HEAD_ALONE = 0.1  # of the epochs, and at least one, in which a head that starts afresh learns alone


def keep_networks(settings, weights):
    """Fix what the weights were trained with: backbone, head, size and normalisation of images."""
    path = settings["init_from"]
    described = describe_weights(weights, path)
    if "arch" not in described and "arch" not in settings.given:
        raise UserError(f"--init_from {path} does not say which network it holds: give --arch.")
    if len(described["mean"]) != settings["in_chans"]:
        del described["mean"], described["std"]  # then the weights are fitted to other channels
    if not described.get("white"):
        described.pop("white", None)  # then the data tell it
    described["global_crop_size"] = described.pop("image_size")
    for name, value in (described | head_widths(weights)).items():
        settings.fix(name, value, "that of the weights")


def fit_continuation(settings, weights):
    """Small steps from good features: the rate, the teacher, and the time for a new head."""
    settings.decide("lr", LR, "a tenth of the official one: small steps from good features")
    settings.decide("momentum_teacher", OFFICIAL_MOMENTUM, "the teacher keeps the features longer")
    settings.decide("momentum_teacher_end", 1.0, "the official one")
    head = head_widths(weights)
    if not head or any(settings[name] != value for name, value in head.items()):
        alone = max(1, round(HEAD_ALONE * settings["epochs"]))
        settings.decide("freeze_backbone", alone, "epochs, for the head, which starts afresh")
