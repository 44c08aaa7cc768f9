# SPDX-License-Identifier: Apache-2.0
"""The published backbones for torch.hub: `torch.hub.load(REPO, "dino_vits16")`.

REPO is `user/name` on GitHub, or the path of a checkout with `source="local"`. Each entry returns a
network in train mode, as in the official repository; `pretrained=False` leaves its weights random
and needs no download. XCiT is timm's: `pip install timm`.
"""

import contextlib as _contextlib
import os as _os
import sys as _sys

import torchvision as _torchvision
from torch import nn as _nn

dependencies = ["torch", "torchvision", "numpy", "PIL", "tqdm"]

_ROOT = _os.path.dirname(_os.path.abspath(__file__))
_NAMES = ("dino", "vision_transformer")  # of the modules here that the entries need


@_contextlib.contextmanager
def _own_modules():
    """Context in which `dino` and `vision_transformer` are of this checkout.

    The caller may have imported other modules of these names, and gets them back.
    """

    def loaded():
        names = [name for name in _sys.modules if name.partition(".")[0] in _NAMES]
        return {name: _sys.modules[name] for name in names}

    files = [getattr(_sys.modules.get(name), "__file__", None) for name in _NAMES]
    clash = any(
        name in _sys.modules and not str(file).startswith(_ROOT + _os.sep)
        for name, file in zip(_NAMES, files, strict=True)
    )
    theirs = loaded() if clash else {}
    for name in theirs:
        del _sys.modules[name]
    _sys.path.insert(0, _ROOT)
    try:
        yield
    finally:
        _sys.path.remove(_ROOT)
        if clash:
            for name in loaded():
                del _sys.modules[name]
            _sys.modules.update(theirs)


with _own_modules():
    import vision_transformer as _vits
    from dino import backbones as _backbones
    from dino.weights import pretrained as _pretrained


def dino_vits16(pretrained=True, **kwargs):
    """ViT-S/16: (B, 3, H, W) -> (B, 384). By the authors: k-NN 74.5, linear 77.0.

    `kwargs`, such as img_size or drop_path_rate, go to VisionTransformer.
    """
    return _vit("vit_small", 16, pretrained, kwargs)


def dino_vits8(pretrained=True, **kwargs):
    """ViT-S/8: (B, 3, H, W) -> (B, 384). By the authors: k-NN 78.3, linear 79.7."""
    return _vit("vit_small", 8, pretrained, kwargs)


def dino_vitb16(pretrained=True, **kwargs):
    """ViT-B/16: (B, 3, H, W) -> (B, 768). By the authors: k-NN 76.1, linear 78.2."""
    return _vit("vit_base", 16, pretrained, kwargs)


def dino_vitb8(pretrained=True, **kwargs):
    """ViT-B/8: (B, 3, H, W) -> (B, 768). By the authors: k-NN 77.4, linear 80.1."""
    return _vit("vit_base", 8, pretrained, kwargs)


def dino_resnet50(pretrained=True, **kwargs):
    """ResNet-50: (B, 3, H, W) -> (B, 2048). By the authors: k-NN 67.5, linear 75.3.

    It has no classifier; `kwargs` go to torchvision's resnet50.
    """
    weights = _weights("resnet50", None, pretrained)
    model = _torchvision.models.resnet50(weights=None, **kwargs)
    model.fc = _nn.Identity()
    return _filled(model, weights, "resnet50")


def dino_xcit_small_12_p16(pretrained=True, **kwargs):
    """XCiT-S12/16: (B, 3, H, W) -> (B, 384). `kwargs` go to timm.create_model."""
    return _xcit("xcit_small_12_p16", pretrained, kwargs)


def dino_xcit_small_12_p8(pretrained=True, **kwargs):
    """XCiT-S12/8: (B, 3, H, W) -> (B, 384)."""
    return _xcit("xcit_small_12_p8", pretrained, kwargs)


def dino_xcit_medium_24_p16(pretrained=True, **kwargs):
    """XCiT-M24/16: (B, 3, H, W) -> (B, 512)."""
    return _xcit("xcit_medium_24_p16", pretrained, kwargs)


def dino_xcit_medium_24_p8(pretrained=True, **kwargs):
    """XCiT-M24/8: (B, 3, H, W) -> (B, 512)."""
    return _xcit("xcit_medium_24_p8", pretrained, kwargs)


def _vit(arch, patch_size, pretrained, kwargs):
    weights = _weights(arch, patch_size, pretrained)
    model = getattr(_vits, arch)(patch_size=patch_size, num_classes=0, **kwargs)
    return _filled(model, weights, arch)


def _xcit(arch, pretrained, kwargs):
    try:
        import timm
    except ImportError:
        raise ImportError("XCiT needs timm: pip install timm") from None
    weights = _weights(arch, None, pretrained)
    model = timm.create_model(_backbones.timm_name(arch), num_classes=0, **kwargs)
    return _filled(model, weights, arch)


def _weights(arch, patch_size, pretrained):
    return _pretrained.published_weights(arch, patch_size) if pretrained else None


def _filled(model, weights, arch):
    if weights is not None:
        _pretrained.fit_weights(model, weights, arch, "the published weights")
    return model
