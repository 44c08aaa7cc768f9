# SPDX-License-Identifier: Apache-2.0
"""ResNets for small images: a stem that keeps the resolution, and networks a CPU can train.

Shapes: B images, C channels.
"""

import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock

STEMS = ("auto", "imagenet", "small")
# Of resnet_nano's four stages, one block each. ResNet-18 has two blocks of 64, 128, 256 and 512.
WIDTHS = (32, 64, 128, 256)
# --arch: cells a side over which it averages. Pooled over four quarters, as by Coates et al. (2011,
# Sec. 3.2), features still tell where something is; over the whole image they do not.
CELLS = {"resnet_nano": 1, "resnet_nano_2x2": 2}


class ResNetNano(nn.Module):
    """(B, C, H, W) -> (B, 256 cells^2): four basic blocks, 1.2M parameters, torchvision's names.

    The features of `cells` x `cells` parts of the image lie side by side. Made for runs on a CPU
    and for small images: its own stem is the small one. It is not a size of the ResNet paper.
    """

    def __init__(self, in_chans=3, stem="auto", cells=1):
        super().__init__()
        self.cells, self.embed_dim = cells, cells**2 * WIDTHS[-1]
        self.conv1 = nn.Conv2d(in_chans, WIDTHS[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        before = (WIDTHS[0], *WIDTHS)
        for stage, (narrow, wide) in enumerate(zip(before, WIDTHS, strict=False), start=1):
            setattr(self, f"layer{stage}", basic_stage(narrow, wide))
        if stem != "imagenet":
            use_small_stem(self)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # as torchvision's ResNet
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return F.adaptive_avg_pool2d(x, self.cells).flatten(1)


def basic_stage(narrow, wide):
    """One basic block; where it widens it halves the resolution."""
    if narrow == wide:
        return nn.Sequential(BasicBlock(narrow, wide))
    shortcut = nn.Sequential(nn.Conv2d(narrow, wide, 1, stride=2, bias=False), nn.BatchNorm2d(wide))
    return nn.Sequential(BasicBlock(narrow, wide, 2, shortcut))


def use_small_stem(resnet):
    """Put a 3 x 3 convolution of stride 1 in the place of the 7 x 7 one of stride 2 and max-pool.

    The stem of ImageNet shrinks 32 pixels to 8 before the first block; this one leaves them. (He et
    al. 2016, Sec. 4.2, for CIFAR-10; SimCLR, Appendix B.9.)
    """
    first = resnet.conv1
    resnet.conv1 = nn.Conv2d(
        first.in_channels, first.out_channels, 3, stride=1, padding=1, bias=False
    )
    nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")
    resnet.maxpool = nn.Identity()
