# SPDX-License-Identifier: Apache-2.0
"""Weighted k-NN on frozen features (Sec. 4.1, Wu et al. 2018).

n training and m test images, D width of the features, C classes, k neighbours.
"""

import torch
from torch import nn

from dino.data.images import list_labelled_images
from dino.data.labels import describe_set
from dino.data.loaders import evaluation_loader
from dino.distributed import all_reduce_sum, gather_interleaved, get_rank, get_world_size
from dino.evaluation.features import CPU, extract_share
from dino.evaluation.neighbours import nearest

VOTES_AT_A_TIME = 2**23  # classes times test images: 64 MiB


def knn_classifier(
    train_features, train_labels, test_features, test_labels, k, T, num_classes=1000
):
    """Official interface: (top-1, top-5) in percent, for one k. Every rank counts all images.

    Features (n, D) and (m, D), each of length 1; labels (n,) and (m,), from 0 to `num_classes` - 1.
    As in the official function, classes without a vote fill the first five in their order.
    """
    correct = count_correct(
        train_features, train_labels, test_features, test_labels, [k], T, num_classes, voted=False
    )
    return tuple((100 * correct[0] / len(test_labels)).tolist())


def knn_accuracies(
    train_features, train_labels, test_features, test_labels, ks, temperature, num_classes
):
    """{k: (top-1, top-5)} in percent, the test images split over the ranks.

    Features (n, D) and (m, D), each of length 1; labels (n,) and (m,). A class gets
    exp(cosine / temperature) from each of its images among the k nearest. A class without a vote
    never counts as a hit: with the 1,000 classes of the official script it practically never did.
    Top-5 is nan for fewer than 5 classes. `ks` above the number of training images must have been
    clipped.
    """
    share = slice(get_rank(), None, get_world_size())
    test = test_features[share], test_labels[share]
    correct = count_correct(train_features, train_labels, *test, ks, temperature, num_classes)
    accuracies = 100 * all_reduce_sum(correct) / len(test_labels)
    return {k: tuple(row) for k, row in zip(ks, accuracies.tolist(), strict=True)}


@torch.no_grad()
def count_correct(
    train_features,
    train_labels,
    test_features,
    test_labels,
    ks,
    temperature,
    num_classes,
    voted=True,
):
    """Numbers of test images whose class is first, and among the first five, by each k's vote.

    Returns (len(ks), 2) float64. With `voted` a class must have a vote. One search serves all k:
    the neighbours for a smaller one come first among those for a larger one, so that votes are only
    ever added.
    """
    num_classes = max(num_classes, int(torch.cat([train_labels, test_labels]).max()) + 1)
    correct = torch.zeros(len(ks), 2, dtype=torch.float64, device=train_features.device)
    similarities, neighbours = nearest(test_features, train_features, max(ks))
    # in float64, as from 226 neighbours of the temperature 0.012 float32 may overflow
    weights = (similarities.double() / temperature).exp()  # (m, k)
    classes = train_labels[neighbours]
    rows = max(1, VOTES_AT_A_TIME // num_classes)
    chunks = (tensor.split(rows) for tensor in (weights, classes, test_labels))
    for weight, chosen, labels in zip(*chunks, strict=True):
        votes, counted = weight.new_zeros(len(weight), num_classes), 0
        for k in sorted(ks):
            votes.scatter_add_(1, chosen[:, counted:k], weight[:, counted:k])
            counted, place = k, places(votes, labels)
            # five or, as in the official code, k if that is fewer
            hits = torch.stack([place < 1, place < min(5, k)], dim=1)
            if voted:
                hits &= votes.gather(1, labels[:, None]) > 0
            correct[ks.index(k)] += hits.sum(dim=0)
    if num_classes < 5:
        correct[:, 1] = torch.nan
    return correct


def places(votes, labels):
    """Rank of the true class by votes (0 = first), ties in class order: (m, C), (m,) -> (m,)."""
    labels = labels[:, None]
    own = votes.gather(1, labels)
    before = torch.arange(votes.shape[1], device=votes.device) < labels
    return ((votes > own) | ((votes == own) & before)).sum(dim=1)


class KnnProbe:
    """k-NN accuracy of backbones on one labelled folder: official protocol, k = 20."""

    def __init__(
        self,
        data_path,
        transform,
        device,
        *,
        batch_size,
        num_workers,
        k=20,
        temperature=0.07,
        flag="--data_path",
    ):
        options = dict(
            batch_size=batch_size, num_workers=num_workers, pin_memory=device.type == "cuda"
        )
        train_paths, labels, self.classes = list_labelled_images(data_path, "train", flag=flag)
        self.data_path, self.k, self.temperature = data_path, min(k, len(train_paths)), temperature
        self.train = evaluation_loader(train_paths, labels, transform, **options), len(train_paths)
        paths, labels, _ = list_labelled_images(data_path, "val", self.classes, flag)
        self.val = evaluation_loader(paths, labels, transform, **options), len(paths)
        self.device, self.test_images = device, len(paths)
        self.images = describe_set([*train_paths, *paths], data_path)

    def accuracies(self, backbones, wrap=iter):
        """[top-1 of each backbone in percent]. `wrap` goes around the loaders, and may raise.

        Each image is read once. The features wait in this process's memory, of all ImageNet 2 GB
        for ViT-S over all ranks, so that the device holds those of one backbone at a time.
        """
        parts = []
        for loader, total in (self.train, self.val):
            share = extract_share(backbones, wrap(loader), self.device, keep_on=CPU)
            parts.append((share, total))
        return [self.vote(parts, number) for number in range(len(backbones))]

    def vote(self, parts, number):
        """Top-1 of the backbone `number`; `parts`: ([features of each, labels], total) of two sets.

        The rows of a set are those of this rank's share.
        """
        gathered = [
            gather_interleaved(None if rows is None else rows.to(self.device), total)
            for (*features, labels), total in parts
            for rows in (features[number], labels)
        ]
        accuracies = knn_accuracies(*gathered, [self.k], self.temperature, len(self.classes))
        return accuracies[self.k][0]

    def raw_pixel_accuracy(self):
        """The baseline without a network: images at 32 x 32 pixels."""
        return self.accuracies([nn.Sequential(nn.AdaptiveAvgPool2d(32), nn.Flatten())])[0]
