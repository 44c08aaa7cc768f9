# SPDX-License-Identifier: Apache-2.0
"""Each kind of `--arch`: what is offered works with crops of two sizes, the rest is refused."""

import pytest
import torch
import torchvision
from torch import nn

from dino.backbone_checks import check_takes_sizes
from dino.backbones import build_backbone, has_batchnorms
from dino.errors import UserError
from dino.networks import MultiCropWrapper
from dino.weights.pretrained import without_classifier
from vision_transformer import DINOHead

SMALL_ONE_OF_EACH_FAMILY = [
    ("vit_tiny", 192),
    ("deit_tiny", 192),
    ("resnet_nano", 256),
    ("resnet_nano_2x2", 1024),
    ("xcit_nano_12_p16", 128),
    ("resnet18", 512),
    ("densenet121", 1024),
    ("mobilenet_v3_small", 1024),
    ("efficientnet_b0", 1280),
    ("convnext_tiny", 768),
    ("swin_t", 768),
    ("regnet_x_400mf", 400),
    ("shufflenet_v2_x0_5", 1024),
    ("googlenet", 1024),
    ("timm:vit_tiny_patch16_224", 192),
    ("timm:mobilenetv3_small_050", 1024),
]


@pytest.mark.parametrize(("arch", "width"), SMALL_ONE_OF_EACH_FAMILY)
def test_a_step_with_crops_of_two_sizes_trains_every_parameter(arch, width):
    torch.manual_seed(0)
    backbone, embed_dim = build_backbone(arch, 16, img_size=64)
    assert embed_dim == width
    check_takes_sizes(backbone, arch, [64, 96])
    head = DINOHead(embed_dim, 16, hidden_dim=16, bottleneck_dim=8)
    network = MultiCropWrapper(backbone, head).train()
    output = network([torch.randn(2, 3, 96, 96)] * 2 + [torch.randn(2, 3, 64, 64)])
    assert output.shape == (6, 16)
    output.square().sum().backward()
    # what gets no gradient would make DistributedDataParallel wait for it for ever
    without = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_no_dropout_blurs_the_features_of_a_network_in_train_mode():
    backbone, _ = build_backbone("efficientnet_b0", drop_path_rate=0.0)
    assert not any(module.p for module in backbone.modules() if isinstance(module, nn.Dropout))


def test_a_network_of_timm_without_our_options_is_refused_by_name():
    with pytest.raises(UserError, match=r"--arch timm:vgg11: timm cannot build .*drop_path_rate"):
        build_backbone("timm:vgg11")


@pytest.mark.parametrize("arch", ["convnext_tiny", "swin_t", "efficientnet_b0"])
def test_stochastic_depth_of_torchvision_rises_to_the_given_rate(arch):
    from torchvision.ops import StochasticDepth

    for rate in (0.0, 0.2):
        backbone, _ = build_backbone(arch, drop_path_rate=rate)
        rates = [m.p for m in backbone.modules() if isinstance(m, StochasticDepth)]
        assert max(rates) == pytest.approx(rate)
        assert min(rates) == 0


@pytest.mark.parametrize("arch", ["resnet_nano", "resnet18"])
def test_the_small_stem_keeps_the_resolution_of_a_small_image(arch):
    sizes = {}
    for stem in ("imagenet", "small"):
        backbone, _ = build_backbone(arch, stem=stem)
        first_stage = nn.Sequential(backbone.conv1, backbone.maxpool, backbone.layer1)
        sizes[stem] = first_stage(torch.zeros(2, 3, 32, 32)).shape[-1]
    assert sizes == {"imagenet": 8, "small": 32}


def test_resnet_nano_has_the_layers_of_torchvisions_resnet():
    """A ResNet of torchvision with one basic block a stage, which cannot be made narrower."""
    from torchvision.models.resnet import BasicBlock, ResNet

    theirs = ResNet(BasicBlock, [1, 1, 1, 1])
    theirs.fc = nn.Identity()
    ours, _ = build_backbone("resnet_nano")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    parameters = sum(p.numel() for p in ours.parameters())
    assert parameters == pytest.approx(1.2e6, rel=0.03)


def test_resnet_nano_2x2_has_the_features_of_the_quarters_side_by_side():
    """Those of resnet_nano's last map, which is 4 x 4 for 32 pixels, averaged by hand."""
    (whole, _), (quarters, _) = map(build_backbone, ("resnet_nano", "resnet_nano_2x2"))
    quarters.load_state_dict(whole.state_dict())
    maps = []
    whole.layer4.register_forward_hook(lambda module, inputs, output: maps.append(output))
    images = torch.randn(2, 3, 32, 32)
    mean, features = whole.eval()(images), quarters.eval()(images).view(2, 256, 2, 2)
    for row in (0, 1):
        for column in (0, 1):
            part = maps[0][:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            torch.testing.assert_close(features[:, :, row, column], part.mean(dim=(2, 3)))
    torch.testing.assert_close(features.mean(dim=(2, 3)), mean)


def test_a_stem_for_a_network_without_one_is_refused():
    for arch in ("vit_nano", "convnext_tiny"):
        with pytest.raises(UserError, match="--stem small: only ResNets"):
            build_backbone(arch, stem="small")


@pytest.mark.parametrize("arch", ["vit_nano", "resnet_nano", "resnet18", "efficientnet_b0"])
def test_a_backbone_takes_images_of_any_number_of_channels(arch):
    backbone, embed_dim = build_backbone(arch, 16, img_size=64, in_chans=5)
    assert backbone(torch.randn(2, 5, 64, 64)).shape == (2, embed_dim)


def test_deit_is_the_old_name_of_the_same_vit():
    with torch.device("meta"):
        old, new = build_backbone("deit_small", 8)[0], build_backbone("vit_small", 8)[0]
    assert {n: p.shape for n, p in old.named_parameters()} == {
        n: p.shape for n, p in new.named_parameters()
    }


@pytest.mark.parametrize(
    ("arch", "hint"),
    [
        ("vit_smal", "vit_small"),
        ("resnet5", "resnet50"),
        ("xcit_small_p16", "xcit_small_12_p16"),
        ("timm:vit_tiny_patch16", "vit_tiny_patch16_224"),
        ("get_model", "timm:NAME"),
        ("nn", "timm:NAME"),
        ("vit_b_16", "vit_base"),
        ("list_models", "timm:NAME"),
        ("resnet", "resnet50"),
        ("squeezenet1_0", "no feature vector"),
        ("maxvit_t", "one image size only"),
    ],
)
def test_what_cannot_be_built_is_refused_with_what_can(arch, hint):
    with pytest.raises(UserError, match=rf"--arch {arch}: .*{hint}"):
        build_backbone(arch)


def test_a_network_of_one_size_is_refused_before_training():
    backbone, _ = build_backbone("timm:mixer_s32_224")
    with pytest.raises(UserError, match="timm:mixer_s32_224 does not take crops of 96 pixels"):
        check_takes_sizes(backbone, "timm:mixer_s32_224", [224, 96])


def test_batch_norms_are_found_in_backbone_and_head():
    assert has_batchnorms(build_backbone("resnet18")[0])
    assert not has_batchnorms(build_backbone("vit_tiny")[0])
    assert has_batchnorms(DINOHead(8, 8, use_bn=True, hidden_dim=8))


@pytest.mark.parametrize(
    "arch", ["resnet18", "convnext_tiny", "mobilenet_v3_small", "densenet121", "vgg11", "swin_t"]
)
def test_the_classifier_in_torchvisions_own_weights_is_ignored(arch):
    """And nothing else of what it calls classifier: in some, normalisation is in there."""
    with torch.device("meta"):
        backbone, _ = build_backbone(arch)
        theirs = torchvision.models.get_model(arch, weights=None).state_dict()
    own = backbone.state_dict()
    assert without_classifier(theirs, backbone).keys() == own.keys()
    assert all(theirs[name].shape == value.shape for name, value in own.items())
