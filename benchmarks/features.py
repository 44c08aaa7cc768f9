# SPDX-License-Identifier: Apache-2.0
"""Made-up features for the k-NN benchmark; imports nothing of the project or the official code."""

import torch
import torch.nn.functional as F

# Noise in units of a direction's length. Each class is a cloud of its own, and yet 1,000 of them
# overlap so much that not every image is recognised.
SPREAD = 3.0


def two_sets(train, test, dim, classes, device):
    """[train features, train labels, test features, test labels]: unit vectors around one direction
    for each class, the same on every call.
    """
    draw = torch.Generator(device).manual_seed(0)
    directions = torch.randn(classes, dim, generator=draw, device=device)
    found = []
    for count in (train, test):
        labels = torch.randint(classes, (count,), generator=draw, device=device)
        features = torch.empty(count, dim, device=device)
        for rows in torch.arange(count, device=device).split(2**12):
            noise = torch.randn(len(rows), dim, generator=draw, device=device)
            features[rows] = F.normalize(directions[labels[rows]] + SPREAD * noise, dim=1)
        found += [features, labels]
    return found
