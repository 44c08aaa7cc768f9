# SPDX-License-Identifier: Apache-2.0
"""The Vision Transformer that DINO trains, its table of sizes, and the projection head (Sec. 3.2).

This file imports nothing but torch: copied alone into another project it works as it stands.
Module names, constructor arguments and state-dict keys are those of the official repository.

Shapes: B images, H x W pixels, P patch size, N = 1 + (H/P)(W/P) tokens of which the first is [CLS],
D embed_dim, h heads, K outputs of the head.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

# DeiT's sizes (Table 1 of the paper has small and base): 64 dimensions per head, MLP of 4x.
# vit_nano is ours, for runs on a CPU; it is not a size of the paper.
ARCHITECTURES = {
    "vit_nano": dict(embed_dim=96, depth=6, num_heads=3),  # 0.7M parameters
    "vit_tiny": dict(embed_dim=192, depth=12, num_heads=3),  # 5.5M
    "vit_small": dict(embed_dim=384, depth=12, num_heads=6),  # 21.7M
    "vit_base": dict(embed_dim=768, depth=12, num_heads=12),  # 85.8M
    "vit_large": dict(embed_dim=1024, depth=24, num_heads=16),  # 303.3M
}


def trunc_normal_(tensor, mean=0.0, std=1.0, a=-2.0, b=2.0):
    """Fill `tensor` from a normal distribution cut off at the values `a` and `b`.

    By the inverse distribution function, so that a seed gives the official initial weights; torch's
    own function draws in another way since 2.15.
    """
    low, high = (math.erf((bound - mean) / (std * math.sqrt(2))) for bound in (a, b))
    with torch.no_grad():
        return tensor.uniform_(low, high).erfinv_().mul_(std * math.sqrt(2)).add_(mean).clamp_(a, b)


def drop_path(x, drop_prob=0.0, training=False):
    """Stochastic depth: in training, a sample loses a residual branch `x` with `drop_prob`.

    What is kept is scaled by 1 / (1 - drop_prob), so that the expectation does not change.
    `drop_prob` may be a tensor, whose value is not looked at.
    """
    if not training or (isinstance(drop_prob, float) and drop_prob == 0):
        return x
    # Drawn in float32: in bfloat16 the numbers are so coarse that the rate would be off.
    uniform = torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), device=x.device)
    return x * ((uniform >= drop_prob) / (1 - drop_prob)).to(x.dtype)


class DropPath(nn.Module):
    """`drop_path` as a module."""

    def __init__(self, drop_prob=0.0):
        super().__init__()
        # A tensor, so that blocks compiled one by one share their code: a number would be part of
        # it. On the CPU, from where a kernel takes a single number as an argument.
        self.drop_prob = torch.tensor(drop_prob, dtype=torch.float32, device="cpu")

    def forward(self, x):
        return drop_path(x, self.drop_prob, self.training)

    def extra_repr(self):
        return f"drop_prob={self.drop_prob:.3f}"


class Mlp(nn.Module):
    """Linear, GELU, linear, on each token: (B, N, D) -> (B, N, D)."""

    def __init__(
        self, in_features, hidden_features=None, out_features=None, act_layer=nn.GELU, drop=0.0
    ):
        super().__init__()
        hidden_features = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, out_features or in_features)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Attention(nn.Module):
    """Multi-head self-attention: with its map (`forward`), without (`fused`), for [CLS] alone."""

    def __init__(
        self, dim, num_heads=8, qkv_bias=False, qk_scale=None, attn_drop=0.0, proj_drop=0.0
    ):
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x):
        """(B, N, D) -> output (B, N, D) and attention map (B, h, N, N), whose rows sum to 1."""
        q, k, v = self.queries_keys_values(x)
        attention = self.attention_map(q, k)
        return self.project(attention @ v), attention

    def attention_map(self, q, k):
        return self.attn_drop((q @ k.mT * self.scale).softmax(dim=-1))

    def fused(self, x):
        """The output of `forward`, as a rule without the map in memory."""
        q, k, v = self.queries_keys_values(x)
        if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= 1024:
            # PyTorch's fused kernel (2.15) takes 2.5 times the map's time with 37 tokens, 1.6 times
            # with 197, 1.5 times with 785, but 0.9 times with 2,401.
            return self.project(self.attention_map(q, k) @ v)
        dropout = self.attn_drop.p if self.training else 0.0
        return self.project(
            F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        )

    def of_cls(self, x):
        """The first token of `forward`'s output, (B, 1, D), from no token's key or value.

        A score q (W_k x_j + b_k) is (W_k^T q) x_j plus the same for all j, which softmax ignores;
        the output sum_j a_j (W_v x_j + b_v) is W_v (sum_j a_j x_j) + b_v, as the a_j sum to 1.
        """
        by_head = (3, self.num_heads, -1)
        query_weight, key_weight, value_weight = self.qkv.weight.unflatten(0, by_head).unbind()
        q = F.linear(x[:, 0], query_weight.flatten(0, 1)).unflatten(1, by_head[1:])  # (B, h, D/h)
        if self.qkv.bias is not None:
            query_bias, _, value_bias = self.qkv.bias.unflatten(0, by_head).unbind()
            q = q + query_bias
        q = (self.scale * q).transpose(0, 1) @ key_weight  # (h, B, D/h) -> (h, B, D)
        attention = (q.transpose(0, 1) @ x.mT).softmax(dim=-1)  # (B, h, N)
        mean = (attention @ x).transpose(0, 1)  # of the tokens, for each head: (h, B, D)
        output = (mean @ value_weight.mT).transpose(0, 1)  # (B, h, D/h)
        if self.qkv.bias is not None:
            output = output + value_bias
        return self.proj(output.flatten(1)[:, None])

    def queries_keys_values(self, x):
        """(B, N, D) -> queries, keys and values, each (B, h, N, D/h)."""
        # unpacked before they are transposed: one copy in the backward pass instead of two
        parts = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return [part.transpose(1, 2) for part in parts]

    def project(self, x):
        """Heads side by side, then the output layer: (B, h, N, D/h) -> (B, N, D)."""
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP, each added to the (B, N, D) tokens."""

    def __init__(
        self,
        dim,
        num_heads,
        mlp_ratio=4.0,
        qkv_bias=False,
        qk_scale=None,
        drop=0.0,
        attn_drop=0.0,
        drop_path=0.0,
        act_layer=nn.GELU,
        norm_layer=nn.LayerNorm,
    ):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_scale, attn_drop, drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=drop)

    def forward(self, x, return_attention=False, only_cls=False):
        """The tokens after this block or, if `return_attention`, only its map (B, h, N, N).

        `only_cls`: the first of them alone, (B, 1, D).
        """
        normed = self.norm1(x)
        if return_attention:
            return self.attn(normed)[1]
        if only_cls:
            x, branch = x[:, :1], self.attn.of_cls(normed)
        elif is_as_built(self.attn) and is_as_built(self.attn.attn_drop):
            # no hook needs the attention map
            branch = self.attn.fused(normed)
        else:
            branch = self.attn(normed)[0]
        x = x + self.drop_path(branch)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Linear embedding of P x P patches: (B, C, H, W) -> (B, (H/P)(W/P), D), row by row."""

    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=768):
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.img_size = img_size
        self.patch_size = patch_size
        self.grid_size = (height // patch_size, width // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        self.check_divisible(*x.shape[-2:])
        if self.is_matrix_product(x):
            return F.linear(self.pixels(x), self.proj.weight.flatten(1), self.proj.bias)
        return self.proj(x).flatten(2).transpose(1, 2)

    def is_matrix_product(self, x):
        """Whether to compute the convolution as one: slower in float32 on a CPU."""
        side_by_side = self.proj.stride == self.proj.kernel_size
        faster = x.device.type != "cpu" or torch.is_autocast_enabled("cpu")
        return side_by_side and faster and is_as_built(self.proj)

    def pixels(self, x):
        """Those of each patch, in the order of the weights: (B, C, H, W) -> (B, N - 1, C P P)."""
        patch = self.patch_size
        x = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, C, H/P, P, W/P, P)
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def check_divisible(self, height, width):
        """Raise where the convolution would drop rows or columns, silently in the official code.

        Skipped for overlapping patches (`proj.stride` below the patch size).
        """
        patch = self.patch_size
        if tuple(self.proj.stride) == (patch, patch) and (height % patch or width % patch):
            rows, columns = max(1, height // patch), max(1, width // patch)
            raise ValueError(
                f"an image of {height} x {width} pixels does not divide into patches of {patch}"
                f" x {patch}; {rows * patch} x {columns * patch} would"
            )


class VisionTransformer(nn.Module):
    """ViT whose output is the normalised [CLS] token.

    `img_size` (an int, or a list of one or two: height, width) sets the grid of position
    embeddings. Images of any other size that `patch_size` divides get interpolated ones; for
    another ValueError is raised. `drop_path_rate` is that of the last block (stochastic depth); it
    rises linearly from 0 in the first.
    """

    def __init__(
        self,
        img_size=(224,),
        patch_size=16,
        in_chans=3,
        num_classes=0,
        embed_dim=768,
        depth=12,
        num_heads=12,
        mlp_ratio=4.0,
        qkv_bias=False,
        qk_scale=None,
        drop_rate=0.0,
        attn_drop_rate=0.0,
        drop_path_rate=0.0,
        norm_layer=nn.LayerNorm,
    ):
        super().__init__()
        self.num_features = self.embed_dim = embed_dim
        if not isinstance(img_size, int) and len(img_size) == 1:
            img_size = img_size[0]
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        drop_path_rates = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias,
                qk_scale,
                drop_rate,
                attn_drop_rate,
                rate,
                norm_layer=norm_layer,
            )
            for rate in drop_path_rates
        )
        self.grad_checkpointing = False
        self.norm = norm_layer(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()

        trunc_normal_(self.pos_embed, std=0.02)
        trunc_normal_(self.cls_token, std=0.02)
        # the patch convolution keeps torch's default, as in the official code
        self.apply(init_linear_and_norm)

    def forward(self, x):
        """(B, C, H, W) -> [CLS] after the last block and the final norm, (B, D)."""
        x = self.prepare_tokens(x)
        *others, last = self.blocks
        for block in others:
            x = self.apply_block(block, x)
        x = self.apply_block(last, x, only_cls=patches_are_unseen(last, self.norm))
        return self.norm(x)[:, 0]

    def apply_block(self, block, x, only_cls=False):
        options = dict(only_cls=True) if only_cls else {}  # somebody's own block may not know it
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False, **options)
        return block(x, **options)

    def set_grad_checkpointing(self, enable=True):
        """Activation checkpointing: keep what passes between blocks, recompute the rest."""
        self.grad_checkpointing = enable

    def prepare_tokens(self, x):
        """(B, C, H, W) -> tokens (B, N, D): [CLS] and the patches, with positions added."""
        height, width = x.shape[-2:]
        patches = self.patch_embed(x)
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), patches], dim=1)
        return self.pos_drop(tokens + self.interpolate_pos_encoding(tokens, height, width))

    def interpolate_pos_encoding(self, x, w, h):
        """Position embeddings (1, N, D) for tokens `x` of an image of `w` rows and `h` columns.

        The names are the official ones, which projects replace by their own; w is the height.
        """
        grid_height, grid_width = self.patch_embed.grid_size
        num_patches = self.pos_embed.shape[1] - 1
        if x.shape[1] - 1 == num_patches and w * grid_width == h * grid_height:
            return self.pos_embed
        cls_position, patch_positions = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        if grid_height * grid_width != num_patches:  # somebody set another pos_embed: it is square
            grid_height = grid_width = math.isqrt(num_patches)
        rows, columns = w // self.patch_embed.patch_size, h // self.patch_embed.patch_size
        # The official code adds 0.1 so that rounding cannot lose a row (facebookresearch/dino#8).
        # Keep it: that shifts where the grid is sampled, and every released model was trained so.
        patch_positions = F.interpolate(
            patch_positions.unflatten(1, (grid_height, grid_width)).permute(0, 3, 1, 2),
            scale_factor=((rows + 0.1) / grid_height, (columns + 0.1) / grid_width),
            mode="bicubic",
        )
        assert patch_positions.shape[-2:] == (rows, columns)
        return torch.cat([cls_position, patch_positions.flatten(2).transpose(1, 2)], dim=1)

    def get_last_selfattention(self, x):
        """(B, C, H, W) -> attention map of the last block, (B, h, N, N)."""
        x = self.prepare_tokens(x)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.blocks[-1](x, return_attention=True)

    def get_intermediate_layers(self, x, n=1, only_cls=False):
        """(B, C, H, W) -> tokens (B, N, D) of each of the last `n` blocks, after the final norm.

        `only_cls`: the caller reads [CLS] alone, and of the last block may get nothing else.
        """
        x = self.prepare_tokens(x)
        only_cls = only_cls and patches_are_unseen(self.blocks[-1], self.norm)
        outputs = []
        for i, block in enumerate(self.blocks):
            x = self.apply_block(block, x, only_cls and block is self.blocks[-1])
            if len(self.blocks) - i <= n:
                outputs.append(self.norm(x))
        return outputs


# ---- when the fast paths are exact: no hooks, no replaced modules, no dropout ----

FORWARDS = {
    kind: kind.forward
    for kind in (Block, Attention, Mlp, DropPath)
    + (nn.Conv2d, nn.Linear, nn.LayerNorm, nn.GELU, nn.Dropout, nn.Identity)
}


def is_as_built(module):
    """Whether `module` and its forward are ours or torch's, without a hook."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    unchanged = type(module).forward is FORWARDS.get(type(module)) and "forward" not in vars(module)
    return unchanged and not any(hooks)


def patches_are_unseen(last, norm):
    """Whether nothing but [CLS] is read of what the last block and the norm return.

    Active dropout reads the patches too: it draws random numbers for all tokens.
    """
    drops = (part.training and part.p > 0 for part in last.modules() if type(part) is nn.Dropout)
    parts = (*last.modules(), norm)
    return all(map(is_as_built, parts)) and not any(drops) and not _has_any_global_hook()


def init_linear_and_norm(module):
    """Linear weights normal, std 0.02 (the cut at +-2 is 100 std away), biases 0; norms 1, 0."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def build_vit(name, patch_size, **kwargs):
    """A ViT of the table; `kwargs` go to VisionTransformer."""
    norm_layer = partial(nn.LayerNorm, eps=1e-6)
    return VisionTransformer(
        patch_size=patch_size, qkv_bias=True, norm_layer=norm_layer, **ARCHITECTURES[name], **kwargs
    )


def vit_nano(patch_size=16, **kwargs):
    return build_vit("vit_nano", patch_size, **kwargs)


def vit_tiny(patch_size=16, **kwargs):
    return build_vit("vit_tiny", patch_size, **kwargs)


def vit_small(patch_size=16, **kwargs):
    return build_vit("vit_small", patch_size, **kwargs)


def vit_base(patch_size=16, **kwargs):
    return build_vit("vit_base", patch_size, **kwargs)


def vit_large(patch_size=16, **kwargs):
    return build_vit("vit_large", patch_size, **kwargs)


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose rows are weight_g * weight_v / |weight_v|.

    torch's own weight_norm is either deprecated and not copyable or has other state-dict keys;
    the official checkpoints hold `weight_g` (K, 1) and `weight_v` (K, in_features), in this order.
    """

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight_g = nn.Parameter(torch.ones(out_features, 1))
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        # nn.Linear's default: U(+-1/sqrt(in))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))

    @property
    def weight(self):
        """(out_features, in_features)"""
        # 0.4 of the time of the same in single operations, most of it saved in the backward pass
        return torch._weight_norm(self.weight_v, self.weight_g, 0)

    def forward(self, x):
        return F.linear(x, self.weight)

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}"


class DINOHead(nn.Module):
    """MLP, L2 normalisation, weight-normalised linear layer (App. C): (B, in_dim) -> (B, K).

    `norm_last_layer` fixes the norm of each of the K output directions at 1.
    `use_bn` puts a batch norm before each GELU.
    """

    def __init__(
        self,
        in_dim,
        out_dim,
        use_bn=False,
        norm_last_layer=True,
        nlayers=3,
        hidden_dim=2048,
        bottleneck_dim=256,
    ):
        super().__init__()
        if nlayers > 1:
            layers = []
            for i in range(nlayers - 1):
                layers.append(nn.Linear(hidden_dim if i else in_dim, hidden_dim))
                if use_bn:
                    layers.append(nn.BatchNorm1d(hidden_dim))
                layers.append(nn.GELU())
            self.mlp = nn.Sequential(*layers, nn.Linear(hidden_dim, bottleneck_dim))
        else:
            self.mlp = nn.Linear(in_dim, bottleneck_dim)
        self.apply(init_linear_and_norm)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
        self.last_layer.weight_g.requires_grad = not norm_last_layer

    def forward(self, x):
        return self.logits(self.mlp(x))

    def logits(self, x):
        """From the bottleneck, (B, bottleneck_dim), to the K outputs."""
        # in float32: in float16 the squares overflow, and the eps of 1e-12 underflows to 0
        x = F.normalize(x.float(), dim=-1).to(x.dtype)
        return self.last_layer(x)
