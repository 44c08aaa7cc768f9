# SPDX-License-Identifier: Apache-2.0
"""Attention maps of the same images over the epochs of a run.

Seven times in a run the teacher's maps of eight images are kept, in files of R x C numbers each:
the cost does not grow with the length of the run. n images, R x C patches.
"""

import re
from pathlib import Path

import numpy as np
import torch

from dino.atomic import replacing
from dino.backbones import evaluating, is_vit
from dino.distributed import is_main_process
from dino.evaluation.attention import attention_of_pixels
from dino.spread import spread_to_end
from dino.training import plots
from dino.training.backbone_pictures import (
    ATTENTION_EPOCHS,
    color_maps,
    photographs_of,
    save_columns,
    shown_pixels,
    tiles,
)

FOLDER = "attention_history"  # of a run's folder; a file for each epoch
COLUMNS = 7  # epochs, with that before training


class AttentionHistory:
    """Keeps the maps of a run of so many `epochs`, and draws them. Rank 0 works, and of a ViT.

    `images` and `augmentation`: as for `draw_backbone`, whose eight images these are. Nothing here
    draws random numbers. A failure is a warning.
    """

    def __init__(self, folder, images, augmentation, epochs):
        self.folder, self.images, self.augmentation = Path(folder), images, augmentation
        self.due = spread_to_end(epochs, COLUMNS)
        self.pixels = None  # (n, C, S, S), read when they are first needed
        self.drawn = []  # the epochs in the picture

    def after_epoch(self, backbone, epochs):
        """Keep the maps if they are due after so many epochs; drop those of later ones.

        A run that went back to an older checkpoint has those.
        """
        if not (is_main_process() and is_vit(backbone)):
            return
        with plots.whatever_happens("the attention maps of this epoch"):
            for later in [epoch for epoch in self.kept() if epoch > epochs]:
                self.path(later).unlink()
            if epochs in self.due:
                maps = self.maps(backbone)
                self.path(epochs).parent.mkdir(exist_ok=True)
                with replacing(self.path(epochs)) as temporary, open(temporary, "wb") as file:
                    np.save(file, maps)

    @torch.no_grad()
    def maps(self, backbone):
        """The mean over the heads of each image's attention: float16 (n, R, C)."""
        if self.pixels is None:
            self.pixels = shown_pixels(self.images, self.augmentation)
        eager = torch.compiler.set_stance("force_eager")  # other shapes would be compiled anew
        with eager, evaluating(backbone):
            maps = [attention_of_pixels(backbone, view).mean(dim=0) for view in self.pixels]
        return torch.stack(maps).half().cpu().numpy()

    def path(self, epochs):
        return self.folder / FOLDER / f"epoch{epochs:04}.npy"

    def kept(self):
        """The epochs of which there are maps, in order."""
        found = (
            re.fullmatch(r"epoch(\d+)\.npy", path.name)
            for path in (self.folder / FOLDER).glob("epoch*.npy")
        )
        return sorted(int(match[1]) for match in found if match)

    def draw(self):
        """A row for each image: itself, then its map after some epochs, at most COLUMNS of them.

        Each map reaches from its own lowest value to its highest.
        """
        if not is_main_process() or (epochs := self.kept()) == self.drawn:
            return
        with plots.whatever_happens(ATTENTION_EPOCHS):
            if self.pixels is None:
                self.pixels = shown_pixels(self.images, self.augmentation)
            columns = {"image": photographs_of(self.pixels, self.augmentation)}
            last = len(epochs) - 1
            for number in spread_to_end(last, COLUMNS):
                maps = torch.tensor(np.load(self.path(epochs[number]), allow_pickle=False)).float()
                columns[f"epoch {epochs[number]}"] = tiles(color_maps(maps))
            save_columns(self.folder / ATTENTION_EPOCHS, columns)
            self.drawn = epochs
