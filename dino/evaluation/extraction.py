# SPDX-License-Identifier: Apache-2.0
"""Fill an unfinished extraction: each rank computes the features of a share of its batches."""

import numpy as np
import torch
from torch.utils.data import Dataset

from dino.data.image_loader import ImageLoader
from dino.data.images import UnreadableImage
from dino.data.items import image_of
from dino.data.labels import UNLABELLED
from dino.distributed import get_rank, get_world_size
from dino.errors import UserError
from dino.meters import progress_bar
from dino.printable import printable


class TransformedImages(Dataset):
    """(transformed image, label), by number, of any sequence of PIL images or (PIL image, label).

    `labels` (n,) take the place of the sequence's own. An unreadable image gives its
    UnreadableImage, or with `skip_bad` pixels that are nan.
    """

    def __init__(self, images, labels, transform, image_size, *, skip_bad):
        self.images, self.labels, self.transform = images, labels, transform
        self.image_size, self.skip_bad = image_size, skip_bad

    def __getitem__(self, number):
        try:
            item = self.images[number]
            image = image_of(item, number, self.transform.in_chans)
        except UnreadableImage as error:
            if not self.skip_bad:
                return error
            shape = (self.transform.in_chans, self.image_size, self.image_size)
            pixels = torch.full(shape, torch.nan)
            return pixels, self.label(number, None)
        return self.transform(image), self.label(number, item)

    def label(self, number, item):
        if self.labels is not None:
            return int(self.labels[number])
        return int(item[1]) if isinstance(item, tuple | list) and len(item) > 1 else UNLABELLED


def fill(unfinished, names, dataset, describe, *, num_workers, pin_memory):
    """Compute and write what is missing in an Unfinished, in shares of all ranks.

    Closes it at the end. `names` are those of the images in messages. Images that were skipped have
    rows of nan, and their names are printed. UserError for features that are not finite otherwise.
    """
    share = unfinished.missing()[get_rank() :: get_world_size()]
    loader = ImageLoader(
        dataset,
        batch_sampler=[unfinished.rows(batch) for batch in share],
        num_workers=num_workers,
        pin_memory=pin_memory,
    )
    try:
        for batch, (pixels, labels) in zip(share, progress_bar(loader, "features"), strict=True):
            features = describe(pixels).cpu().numpy().astype(unfinished.features.dtype)
            skipped = pixels[:, 0, 0, 0].isnan().numpy()
            check_finite(features, skipped, unfinished.rows(batch), names)
            unfinished.write(batch, features, labels.numpy())
    finally:
        unfinished.close()


def check_finite(features, skipped, rows, names):
    """Print which images of a batch were skipped; UserError for others that are not finite."""
    finite = np.isfinite(features.reshape(len(features), -1)).all(axis=1)
    for place in np.flatnonzero(~finite):
        name = printable(names[rows[place]])
        if not skipped[place]:
            raise UserError(
                f"the features of {name} are not finite numbers in {features.dtype}. Try"
                " --amp_dtype float32 and --dtype float32."
            )
        print(f"Skipped: {name} cannot be read; its features are nan.", flush=True)
