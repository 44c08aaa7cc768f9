# SPDX-License-Identifier: Apache-2.0
"""How good are features, without labels? RankMe, alignment and uniformity.

n images, D width of the features, which are L2-normalised as k-NN compares them.
"""

import copy
import math

import torch
import torch.nn.functional as F

from dino.backbones import evaluating, first_of
from dino.data.augmentations_on_device import on_workers
from dino.data.loaders import sample_loader
from dino.distributed import gather_interleaved
from dino.spread import spread

SAMPLE = 512  # images; RankMe is at most min(SAMPLE, D)
KEPT = 2**28  # bytes of views, up to which they stay in memory: of 512 images, 147 pixels a side


def rank_me(features):
    """Effective rank of (n, D): exp of the entropy of its singular values as shares of their sum.

    Garrido et al. 2023 (arXiv 2210.02885), Eq. 1. From 1, all features alike, also all 0, to
    min(n, D); nan for features that are not finite.
    """
    if not features.isfinite().all():
        return math.nan
    if not features.any():
        return 1.0
    singular_values = torch.linalg.svdvals(features.double())
    return torch.special.entr(singular_values / singular_values.sum()).sum().exp().item()


def alignment(first, second):
    """Mean squared distance between the features (n, D) of two views of each image: 0 to 4.

    Wang and Isola 2020 (arXiv 2005.10242), with their exponent 2.
    """
    return (first - second).square().sum(dim=1).mean().item()


def uniformity(features):
    """log of the mean of exp(-2 d^2) over all pairs of (n, D): 0 for features that are all alike.

    Wang and Isola 2020, with their t = 2; lower is more uniform, about -4 at the least.
    """
    return torch.pdist(features).square().mul(-2).exp().mean().log().item()


class SampleProbe:
    """The three measures of a backbone, on two global views each of a fixed sample of images.

    The sample is spread evenly over the images; its views are drawn once, from the seed. Small ones
    stay in memory after the first measurement: 300 scans of 2,000 pixels need not be read again.
    """

    def __init__(self, images, augmentation, device, **loader_options):
        self.count, self.device = min(SAMPLE, len(images)), device
        indices = spread(len(images), self.count)
        global_views = copy.copy(augmentation)
        global_views.views = augmentation.views[:2]
        in_chans = len(augmentation.mean)
        pixels = sum(view.size**2 for view in global_views.views)
        self.keeps, self.kept = 4 * self.count * in_chans * pixels <= KEPT, []
        views = on_workers(global_views)
        self.loader = sample_loader(images, indices, views, in_chans=in_chans, **loader_options)

    @torch.no_grad()
    def measure(self, backbone, wrap=iter):
        """{"rank_me", "alignment", "uniformity"}. `wrap` goes around the loader, and may raise."""
        pairs, seen = [], []
        with evaluating(backbone):
            for views in wrap(self.kept or self.loader):
                if self.keeps:
                    seen.append(views)
                features = first_of(backbone(torch.cat(views).to(self.device)))
                pairs.append(F.normalize(features.float(), dim=1).cpu().chunk(2))
        self.kept = seen
        parts = [torch.cat(part) for part in zip(*pairs, strict=True)] or [None, None]
        first, second = (gather_interleaved(part, self.count) for part in parts)
        return {
            "rank_me": rank_me(first),
            "alignment": alignment(first, second),
            "uniformity": uniformity(first) if self.count > 1 else 0.0,
        }
