# SPDX-License-Identifier: Apache-2.0
"""What --tokens asks for: which tokens of a frozen backbone are the features of an image.

B images, N patches of an image, D width of a token.
"""

from dino.backbones import is_vit
from dino.errors import UserError
from dino.evaluation.features import FrozenFeatures

TOKENS = ("cls", "patch", "mean", "last4")


class PatchFeatures(FrozenFeatures):
    """Images (B, 3, H, W) -> the patch tokens of the last block after the final norm (B, N, D)."""

    def extract(self, images):
        return self.backbone.get_intermediate_layers(images, 1)[-1][:, 1:]


class MeanPatchFeatures(PatchFeatures):
    """Images (B, 3, H, W) -> the mean of the patch tokens (B, D)."""

    def extract(self, images):
        return super().extract(images).mean(dim=1)


def token_features(tokens, pretrained, device, amp_dtype):
    """A function from images (B, 3, H, W) on any device to their features, float32.

    `cls`: [CLS] after the final norm, which is the backbone's output (B, D). `last4`: [CLS] of the
    last four blocks side by side (B, 4 D), as for the linear classifier. `patch`: (B, N, D). `mean`
    of the patches: (B, D). UserError where the backbone is not our ViT and has no tokens.
    """
    backbone, embed_dim = pretrained.backbone, pretrained.embed_dim
    if tokens != "cls" and not is_vit(backbone):
        raise UserError(
            f"--tokens {tokens}: {pretrained.arch} is not one of our ViTs. --tokens cls gives its"
            " output."
        )
    kind = {"patch": PatchFeatures, "mean": MeanPatchFeatures}.get(tokens, FrozenFeatures)
    blocks = 4 if tokens == "last4" else 1
    return kind(backbone, embed_dim, device, n_last_blocks=blocks, amp_dtype=amp_dtype)
