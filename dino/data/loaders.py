# SPDX-License-Identifier: Apache-2.0
"""The loaders of training and of the evaluations, each for this rank's share of the images."""

from dino.data.channels import RGB
from dino.data.image_loader import EndlessLoader, EndlessSampler, EpochSampler, ImageLoader
from dino.data.items import LabelledImages, LabelledTrainingImages, LoadedImages, TrainingImages
from dino.distributed import get_rank, get_world_size


def training_loader(
    images,
    augmentation,
    *,
    batch_size,
    num_workers,
    seed,
    pin_memory,
    labels=None,
    skip_bad=False,
    finish=None,
    in_chans=RGB,
    drop_last=None,
):
    """Loader of lists of V view tensors (B, 3, S, S), without the last, smaller batch of an epoch.

    `images` is any sequence of PIL images. With `labels`: of pairs (images, labels), and no batch
    is dropped unless `drop_last`. `skip_bad`: other images take the places of those that cannot be
    read. `finish` is the ImageLoader's.
    """
    if labels is None:
        dataset = TrainingImages(images, augmentation, seed, skip_bad, in_chans)
    else:
        dataset = LabelledTrainingImages(images, labels, augmentation, seed, in_chans)
    if drop_last is None:
        drop_last = labels is None
    options = dict(batch_size=batch_size, num_workers=num_workers, pin_memory=pin_memory)
    share = dict(num_replicas=get_world_size(), rank=get_rank(), shuffle=True, seed=seed)
    if drop_last:
        loader, sampler = EndlessLoader, EndlessSampler(dataset, batch_size=batch_size, **share)
    else:
        loader, sampler = ImageLoader, EpochSampler(dataset, **share)
    return loader(
        dataset,
        finish,
        sampler=sampler,
        drop_last=drop_last,
        persistent_workers=num_workers > 0,
        **options,
    )


def sample_loader(images, indices, augmentation, *, seed, skip_bad, in_chans=RGB, **options):
    """Loader of lists of views of some of `images`, this rank's share, the same in every pass."""
    return ImageLoader(
        TrainingImages(images, augmentation, seed, skip_bad, in_chans),
        sampler=[(0, index) for index in indices[get_rank() :: get_world_size()]],
        **options,
    )


def evaluation_loader(paths, labels, transform, *, batch_size, num_workers, pin_memory):
    """Loader of (images, labels), in order, of every world_size-th image from this rank's on."""
    share = slice(get_rank(), None, get_world_size())
    return ImageLoader(
        LabelledImages(paths[share], labels[share], transform),
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
    )


def equal_size_loader(paths, load, sizes, *, batch_size, num_workers, pin_memory):
    """Loader of (images, their numbers), of every world_size-th image from this rank's on.

    `load(path)` gives a tensor; two with equal entries in `sizes` have equal shapes, and only such
    share a batch.
    """
    groups = {}
    for number in range(get_rank(), len(paths), get_world_size()):
        groups.setdefault(sizes[number], []).append(number)
    batches = [
        group[start : start + batch_size]
        for group in groups.values()
        for start in range(0, len(group), batch_size)
    ]
    return ImageLoader(
        LoadedImages(paths, load),
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=pin_memory,
    )
