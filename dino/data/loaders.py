# SPDX-License-Identifier: Apache-2.0
"""Batches in a reproducible order: datasets, sampler, a loader that outlives its workers."""

import contextlib
import functools
import gc
import itertools
import re
import signal
from dataclasses import dataclass
from multiprocessing import connection

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torch.utils.data._utils.pin_memory import pin_memory

from dino.data.channels import RGB, reader, with_channels
from dino.data.images import UnreadableImage, limit_pixels, to_rgb
from dino.distributed import get_rank, get_world_size
from dino.errors import UserError
from dino.signals import leave_signals_to_parent

# --on_bad_image skip tolerates this share of bad images, and so many replacements for one image.
MOST_BAD, MOST_ATTEMPTS = 0.01, 10
DYING = 5.0  # seconds that a process takes to die, at most


class TrainingImages(Dataset):
    """Augmented views, by (epoch, number of the image): a function of these and the seed alone.

    `images` is any sequence of PIL images, or of tuples that begin with one; for other numbers of
    channels than 3, arrays (H, W, in_chans) will do. An unreadable image
    gives its UnreadableImage as the item, or with `skip_bad` a Replaced: raised inside a loader
    worker it would come out as a traceback of the worker.
    """

    def __init__(self, images, augmentation, seed=0, skip_bad=False, in_chans=RGB):
        self.images, self.augmentation, self.in_chans = images, augmentation, in_chans
        self.seed, self.skip_bad = seed, skip_bad

    def __len__(self):
        return len(self.images)

    def __getitem__(self, epoch_and_index):
        epoch, index = epoch_and_index
        bad = []
        others = np.random.default_rng((self.seed, epoch, index, 1))  # not the views' generator
        for number in (index, *others.integers(len(self), size=MOST_ATTEMPTS).tolist()):
            try:
                image = image_of(self.images[number], number, self.in_chans)
            except UnreadableImage as error:
                bad.append(error)
                if not self.skip_bad:
                    return error
            else:
                views = self.augmentation(image, key=(self.seed, epoch, index))
                return Replaced(views, bad) if bad else views
        return bad[0]


def image_of(item, number, in_chans=RGB):
    """The image of an item of a sequence of images or of tuples (image, label, ...).

    As PIL RGB or, for other numbers of channels than 3, as uint8 (H, W, in_chans).
    """
    image = item[0] if isinstance(item, tuple | list) else item
    is_array = isinstance(image, np.ndarray) and in_chans != RGB
    if not (is_array or isinstance(image, Image.Image)):
        raise TypeError(
            f"images[{number}] is a {type(item).__name__}, not a PIL image or (PIL image, label)"
        )
    if in_chans == RGB:
        return to_rgb(image)
    try:
        return with_channels(image, in_chans)
    except ValueError as error:
        raise UnreadableImage(f"images[{number}]", str(error)) from None


@dataclass
class Replaced:
    """An item in the place of unreadable images, or a batch with such items."""

    item: object
    bad: list  # their UnreadableImages

    def pin_memory(self):
        """Called by a DataLoader that pins memory, which does not know this type."""
        return Replaced(pin_memory(self.item), self.bad)


class LabelledTrainingImages(TrainingImages):
    """(augmented image, label), by (epoch, number of the image); else as TrainingImages."""

    def __init__(self, images, labels, augmentation, seed=0, in_chans=RGB):
        super().__init__(images, augmentation, seed, in_chans=in_chans)
        self.labels = labels

    def __getitem__(self, epoch_and_index):
        image = super().__getitem__(epoch_and_index)
        if isinstance(image, UnreadableImage):
            return image
        return image, self.labels[epoch_and_index[1]]


class LoadedImages(Dataset):
    """(`load(path)`, number of the path); an unreadable image gives its UnreadableImage."""

    def __init__(self, paths, load):
        self.paths, self.load = paths, load

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, number):
        try:
            return self.load(self.paths[number]), number
        except UnreadableImage as error:
            return error


class LabelledImages(Dataset):
    """(transformed image, label), with the channels that the transform wants.

    An unreadable image gives its UnreadableImage.
    """

    def __init__(self, paths, labels, transform):
        self.paths, self.labels, self.transform = paths, labels, transform
        self.read = reader(getattr(transform, "in_chans", RGB))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        try:
            return self.transform(self.read(self.paths[index])), self.labels[index]
        except UnreadableImage as error:
            return error


def collate_readable(items):
    """torch's default collation; an UnreadableImage makes the batch one, a Replaced likewise."""
    bad = []
    for i, item in enumerate(items):
        if isinstance(item, UnreadableImage):
            return item
        if isinstance(item, Replaced):
            items[i] = item.item
            bad += item.bad
    batch = torch.utils.data.default_collate(items)
    return Replaced(batch, bad) if bad else batch


class ImageLoader(DataLoader):
    """A DataLoader that raises the UnreadableImage that comes instead of a batch.

    It counts Replaced images, and replaces a worker that the system has killed, starting from the
    batch that is due. The seed that a DataLoader draws for its workers, which nothing here uses,
    comes from a generator of its own: torch's global one would advance, and change stochastic
    depth.
    """

    def __init__(self, dataset, finish=None, **options):
        """`finish` is what this process still does to a batch, such as DeviceStage."""
        self.skipped, self.new_skipped = set(), set()
        self.workers = []  # the processes of the latest pass
        self.finish = finish or (lambda batch: batch)
        super().__init__(
            dataset,
            collate_fn=collate_readable,
            generator=torch.Generator(),
            worker_init_fn=functools.partial(start_worker, Image.MAX_IMAGE_PIXELS),
            **options,
        )

    def __iter__(self):
        delivered, deaths = 0, 0
        while True:
            try:
                for batch in self.batches(delivered):
                    delivered, deaths = delivered + 1, 0
                    yield self.finish(self.readable(batch))
                return
            except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
                # the last three come from a tensor whose worker died while it was handed over
                if isinstance(error, RuntimeError) and not is_death(error):
                    raise
                deaths += 1
                self.after_death(error, deaths)
            # The pass that failed and its error refer to each other. If a new worker is forked
            # before they are freed, it frees its copy, and complains that it has no such workers.
            gc.collect()

    def batches(self, delivered):
        """An iterator over the batches of a pass after the first `delivered` ones."""
        if delivered and isinstance(self.sampler, EpochSampler):
            with self.sampler.further(delivered * self.batch_size):
                iterator = whole = super().__iter__()
        else:
            whole = super().__iter__()
            iterator = itertools.islice(whole, delivered, None)
        self.workers = getattr(whole, "_workers", [])
        # torch raises from this signal wherever the main thread is, in the middle of a step too;
        # without it the loader finds out by itself, when it waits for a batch
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return iterator

    def after_death(self, error, deaths):
        """Report a killed worker and have a new iterator made; UserError the third time."""
        self._iterator = None  # of persistent workers
        # by somebody, such as scancel
        terminated = not is_caught(error) and exit_codes(self.workers) == {-signal.SIGTERM}
        if terminated and deaths <= 2:
            print("A loader process was terminated, and is replaced.", flush=True)
            return
        reason = last_line(error)
        advice = (
            "The system kills them when memory, or shared memory (in Docker --shm-size), runs out:"
            " lower --num_workers or --batch_size_per_gpu."
        )
        if deaths > 2:
            raise UserError(f"Loader processes died three times in a row ({reason}). {advice}")
        print(f"Warning: a loader process died and is replaced ({reason}). {advice}", flush=True)

    def readable(self, batch):
        if isinstance(batch, UnreadableImage):
            raise batch
        if not isinstance(batch, Replaced):
            return batch
        self.new_skipped |= {(error.path, str(error)) for error in batch.bad} - self.skipped
        self.skipped |= self.new_skipped
        if len(self.skipped) > MOST_BAD * len(self.dataset):
            _, reason = min(self.skipped)
            raise UserError(
                f"--on_bad_image skip: {len(self.skipped)} of {len(self.dataset)} images could not"
                f" be read, more than {MOST_BAD:.0%}. The first: {reason} For all of them:"
                " python check_data.py PATH."
            )
        return batch.item

    def batch_of(self, keys):
        """What the loader would yield for these items of the data set, made here and now."""
        return self.finish(self.readable(collate_readable([self.dataset[key] for key in keys])))

    def take_skipped(self):
        """[(path, reason)] of the images replaced since the last call."""
        taken, self.new_skipped = sorted(self.new_skipped), set()
        return taken


def is_death(error):
    """Whether a RuntimeError says that a loader worker is gone, or has no room for a batch.

    What else is raised in one, as by an augmentation of the user's, says "Caught" and has a
    traceback.
    """
    no_room = re.search(r"unable to (open|resize|write|mmap|allocate)", last_line(error))
    return "DataLoader worker" in str(error) and bool(no_room or not is_caught(error))


def is_caught(error):
    """Whether a worker raised it, and lives."""
    return str(error).startswith("Caught ")


def last_line(error):
    """What an error of a loader worker says behind its traceback."""
    return (str(error).strip().splitlines() or [repr(error)])[-1]


def exit_codes(workers):
    """Those of the `workers` that have failed.

    A process that has let go of a tensor may still be dying, and has no exit code until it is dead:
    the first one is waited for.
    """
    of_sentinels = {worker.sentinel: worker for worker in workers}
    for sentinel in connection.wait(list(of_sentinels), timeout=DYING):
        of_sentinels[sentinel].join()
    return {worker.exitcode for worker in workers} - {None, 0}


def start_worker(max_pixels, number):
    """For DataLoader's worker_init_fn."""
    leave_signals_to_parent()
    limit_pixels(max_pixels)


class EpochSampler(DistributedSampler):
    """The official order, torch's DistributedSampler, as (epoch, index): workers need the epoch."""

    used = 0

    def set_position(self, epoch, used=0):
        """The next pass is over `epoch`, without the first `used` images, of all ranks together."""
        self.set_epoch(epoch)
        self.used = used

    @contextlib.contextmanager
    def further(self, count):
        """A pass that begins here leaves out `count` more images of this rank."""
        self.used += count * self.num_replicas
        yield
        self.used -= count * self.num_replicas

    def __iter__(self):
        generator = torch.Generator()
        generator.manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.dataset), generator=generator).tolist()
        rest = order[self.used :]
        # as many for each rank, as in torch's sampler: the first images come again
        rest += itertools.islice(itertools.cycle(order), -len(rest) % self.num_replicas)
        return iter([(self.epoch, index) for index in rest[self.rank :: self.num_replicas]])


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
    return ImageLoader(
        dataset,
        finish,
        sampler=EpochSampler(dataset, get_world_size(), get_rank(), shuffle=True, seed=seed),
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        drop_last=labels is None if drop_last is None else drop_last,
        persistent_workers=num_workers > 0,
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
