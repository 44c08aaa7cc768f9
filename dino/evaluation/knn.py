# SPDX-License-Identifier: Apache-2.0
"""Weighted k-NN on frozen features (Sec. 4.1, Wu et al. 2018): features over all ranks, then votes.

n training and m test images, D width of the features, C classes, k neighbours.
"""

import torch
import torch.nn.functional as F
from torch import nn

from augmentations import eval_transform
from data import list_labelled_images
from distributed import all_reduce_sum, gather_interleaved, get_rank, get_world_size
from loading import evaluation_loader
from neighbours import nearest

VOTES_AT_A_TIME = 2**24  # classes times test images: 64 MiB


@torch.no_grad()
def extract_features(model, loader, total, device, *, amp_dtype=torch.float32, keep_on_device=True):
    """L2-normalised features (total, D) float32 and labels (total,), of all ranks, on every rank.

    `loader` gives this rank's share of the `total` images: see data.evaluation_loader. `model` is
    in evaluation mode meanwhile. The result is on the device, or else on the CPU.
    """
    training = model.training
    model.eval()
    features, labels = [], []
    for images, targets in loader:
        with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype != torch.float32):
            output = model(images.to(device, non_blocking=True))
        output = output[0] if isinstance(output, tuple) else output
        output = F.normalize(output.float(), dim=1)
        features.append(output if keep_on_device else output.cpu())
        labels.append(targets.to(features[-1].device))
    model.train(training)
    return [
        gather_interleaved(torch.cat(rows) if rows else None, total) for rows in (features, labels)
    ]


def knn_classifier(
    train_features, train_labels, test_features, test_labels, k, T, num_classes=1000
):
    """Official interface: (top-1, top-5) in percent, for one k. See knn_accuracies; here every
    rank counts all images.
    """
    votes = count_correct(
        train_features, train_labels, test_features, test_labels, [k], T, num_classes
    )
    return tuple((100 * votes[0] / len(test_labels)).tolist())


def knn_accuracies(
    train_features, train_labels, test_features, test_labels, ks, temperature, num_classes
):
    """{k: (top-1, top-5)} in percent, the test images split over the ranks.

    A class gets exp(cosine / temperature) from each of its images among the k nearest. Top-5 is
    nan for fewer than 5 classes. `ks` above the number of training images must have been clipped.
    """
    share = slice(get_rank(), None, get_world_size())
    args = (
        train_features,
        train_labels,
        test_features[share],
        test_labels[share],
        ks,
        temperature,
        num_classes,
    )
    correct = all_reduce_sum(count_correct(*args))
    return {
        k: tuple(row)
        for k, row in zip(ks, (100 * correct / len(test_labels)).tolist(), strict=True)
    }


@torch.no_grad()
def count_correct(
    train_features, train_labels, test_features, test_labels, ks, temperature, num_classes
):
    """Test images whose class is first, and among the first five, by each k's vote: (len(ks), 2)
    float64.

    One search serves all k: the neighbours for a smaller one come first among those for a larger
    one, so that votes are only ever added.
    """
    num_classes = max(num_classes, int(torch.cat([train_labels, test_labels]).max()) + 1)
    correct = torch.zeros(len(ks), 2, dtype=torch.float64, device=train_features.device)
    similarities, neighbours = nearest(test_features, train_features, max(ks))
    weights, classes = (similarities / temperature).exp(), train_labels[neighbours]  # (m, k)
    rows = max(1, VOTES_AT_A_TIME // num_classes)
    chunks = (tensor.split(rows) for tensor in (weights, classes, test_labels))
    for weight, voted, labels in zip(*chunks, strict=True):
        votes, counted = weight.new_zeros(len(weight), num_classes), 0
        for k in sorted(ks):
            votes.scatter_add_(1, voted[:, counted:k], weight[:, counted:k])
            counted, place = k, places(votes, labels)
            # five or, as officially, k if that is fewer
            correct[ks.index(k)] += torch.stack([place < 1, place < min(5, k)], dim=1).sum(dim=0)
    if num_classes < 5:
        correct[:, 1] = torch.nan
    return correct


def places(votes, labels):
    """How many classes are ahead of the right one, (m, C) and (m,) -> (m,): those with more votes
    and, of those with as many, the ones before it.
    """
    labels = labels[:, None]
    own = votes.gather(1, labels)
    before = torch.arange(votes.shape[1], device=votes.device) < labels
    return ((votes > own) | ((votes == own) & before)).sum(dim=1)


class KnnProbe:
    """k-NN accuracy of backbones on one labelled folder: official protocol, k = 20."""

    def __init__(
        self,
        data_path,
        image_size,
        device,
        *,
        batch_size,
        num_workers,
        amp_dtype=torch.float32,
        k=20,
        temperature=0.07,
        flag="--data_path",
    ):
        options = dict(
            batch_size=batch_size, num_workers=num_workers, pin_memory=device.type == "cuda"
        )
        transform = eval_transform(image_size)
        paths, labels, self.classes = list_labelled_images(data_path, "train", flag=flag)
        self.data_path, self.k, self.temperature = data_path, min(k, len(paths)), temperature
        self.train = evaluation_loader(paths, labels, transform, **options), len(paths)
        paths, labels, _ = list_labelled_images(data_path, "val", self.classes, flag)
        self.val = evaluation_loader(paths, labels, transform, **options), len(paths)
        self.device, self.amp_dtype = device, amp_dtype

    def accuracy(self, backbone, wrap=iter):
        """Top-1 in percent. `wrap` goes around the loaders, and may raise to break off."""
        train, val = (
            extract_features(backbone, wrap(loader), total, self.device, amp_dtype=self.amp_dtype)
            for loader, total in (self.train, self.val)
        )
        return knn_accuracies(*train, *val, [self.k], self.temperature, len(self.classes))[self.k][
            0
        ]


def raw_pixels():
    """The features of someone who has no network: the image at 32 x 32 pixels."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(32), nn.Flatten())
