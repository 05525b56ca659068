"""The Vision Transformer, in pure PyTorch.

After "An Image is Worth 16x16 Words" (Dosovitskiy et al., 2021, https://arxiv.org/abs/2010.11929, section 3.1),
with the constants of the Keras example "Image classification with Vision Transformer" and its PyTorch adaptations.

Axes:
    B  batch              N  tokens (patches, with the class token in front)
    C  image channels     D  width of a token (``embed_dim``)
    S  image size         H  heads
    P  patch size         K  width of a head (D / H)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_lightning.config import ModelConfig

NORM_EPS = 1e-6


class Dropout(nn.Dropout):
    """:class:`torch.nn.Dropout`, whose mask costs a CPU little.

    The stock mask draws one random number for each element, one after the other, a sixth of a training step on two
    cores. Here each 64-bit word from the same generator gives four mask values of 16 bits: the share dropped is ``p``
    rounded to a multiple of 2⁻¹⁶, and what is kept is scaled by exactly what that rounding left. Other devices
    take the stock one, and so does a compiled network, whose random numbers are no longer drawn one after the other.
    """

    def forward(self, x: Tensor) -> Tensor:
        stock = x.device.type != "cpu" or torch.compiler.is_compiling()
        if not self.training or self.p == 0 or stock:
            return super().forward(x)
        dropped = round(self.p * 2**16)  # of 2¹⁶ equally likely values
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        keep = words.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
        return x * keep.to(x.dtype).mul_(2**16 / (2**16 - dropped))


class Attention(nn.Module):
    """Multi-head self-attention without mask (Vaswani et al., 2017, https://arxiv.org/abs/1706.03762, section 3.2.2).

    Equals :class:`torch.nn.MultiheadAttention`, whose initialisation it shares, by the fused kernel.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        """Attention to all tokens of x (B, N, D), for the first ``queries`` of them, Q: (B, Q, D)."""
        B, N, D = x.shape
        heads = (self.heads, D // self.heads)
        if queries is None:
            qkv = self.qkv(x).view(B, N, 3, *heads)  # (B, N, 3, H, K)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, K) each
        else:
            weight, bias = self.qkv.weight, self.qkv.bias
            q = F.linear(x[:, :queries], weight[:D], bias[:D]).view(B, queries, *heads).transpose(1, 2)  # (B, H, Q, K)
            kv = F.linear(x, weight[D:], bias[D:]).view(B, N, 2, *heads)  # (B, N, 2, H, K)
            k, v = kv.permute(2, 0, 3, 1, 4)  # (B, H, N, K) each
        x = F.scaled_dot_product_attention(q, k, v)  # (B, H, Q, K)
        return self.proj(x.transpose(1, 2).flatten(2))


class PreNormBlock(nn.Module):
    """``x + drop(attn(norm1(x)))``, then ``x + mlp(norm2(x))``; one norm follows the last block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D = config.embed_dim
        self.norm1 = nn.LayerNorm(D, eps=NORM_EPS)
        self.attn = Attention(D, config.heads)
        self.drop = Dropout(config.dropout)
        self.norm2 = nn.LayerNorm(D, eps=NORM_EPS)
        self.mlp = nn.Sequential(
            nn.Linear(D, config.mlp_dim), nn.GELU(), Dropout(config.dropout), nn.Linear(config.mlp_dim, D)
        )

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        """(B, N, D) to (B, N, D), or to the first ``queries`` tokens of that, at their cost alone."""
        x = x[:, :queries] + self.drop(self.attn(self.norm1(x), queries))
        return x + self.mlp(self.norm2(x))


class BlogBlock(nn.Module):
    """The tutorial's block: ``a = norm_in(x)``, ``h = norm_1(x + drop(attn(a)))``, ``norm_2(h + ffn(h))``.

    Its feed-forward has GELU and dropout after the second linear layer too, and no norm follows the last block.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D = config.embed_dim
        self.norm_in = nn.LayerNorm(D, eps=NORM_EPS)
        self.attn = Attention(D, config.heads)
        self.drop = Dropout(config.dropout)
        self.norm_1 = nn.LayerNorm(D, eps=NORM_EPS)
        self.ffn = nn.Sequential(
            *(nn.Linear(D, config.mlp_dim), nn.GELU(), Dropout(config.dropout)),
            *(nn.Linear(config.mlp_dim, D), nn.GELU(), Dropout(config.dropout)),
        )
        self.norm_2 = nn.LayerNorm(D, eps=NORM_EPS)

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        """(B, N, D) to (B, N, D), or to the first ``queries`` tokens of that, at their cost alone."""
        h = self.norm_1(x[:, :queries] + self.drop(self.attn(self.norm_in(x), queries)))
        return self.norm_2(h + self.ffn(h))


def mlp_head(dim: int, units: list[int], num_classes: int, dropout: float) -> nn.Sequential:
    """Linear, GELU, dropout for each of ``units``, then a linear layer to the logits."""
    layers: list[nn.Module] = []
    for width in units:
        layers += [nn.Linear(dim, width), nn.GELU(), Dropout(dropout)]
        dim = width
    return nn.Sequential(*layers, nn.Linear(dim, num_classes))


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches, row by row.

    Args:
        images: (B, C, S, S).
        patch_size: P, a divisor of S.

    Returns:
        (B, (S / P)², C · P · P), channel-major inside a patch.
    """
    return F.unfold(images, patch_size, stride=patch_size).transpose(1, 2)


class ViT(nn.Module):
    """Vision Transformer classifier: patches, class token, position embedding, blocks, MLP head on the class token.

    Departs from the tutorial where that is defective: one class token for all images, so that a prediction does not
    depend on the batch, and tokens and positions initialised by a truncated normal of deviation 0.02.

    Raises:
        ValueError: if ``config.num_classes`` or ``config.channels`` is ``None``: there is no data to follow here.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.num_classes is None or config.channels is None:
            raise ValueError("a ViT needs its num_classes and channels")
        self.image_size = config.image_size
        self.channels = config.channels
        self.patch_size = config.patch_size
        D = config.embed_dim
        patches = (config.image_size // config.patch_size) ** 2
        self.patch_embed = nn.Linear(config.channels * config.patch_size**2, D)
        self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + patches, D))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        block = {"prenorm": PreNormBlock, "blog": BlogBlock}[config.block]
        self.blocks = nn.ModuleList(block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(D, eps=NORM_EPS) if config.block == "prenorm" else nn.Identity()
        self.head = mlp_head(D, config.mlp_head_units, config.num_classes, config.head_dropout)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, S, S) to logits (B, num_classes)."""
        x = self.patch_embed(patchify(images, self.patch_size))  # (B, N - 1, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed  # (B, N, D)
        for block in self.blocks[:-1]:
            x = block(x)  # (B, N, D)
        x = self.blocks[-1](x, queries=1)  # (B, 1, D): the head reads the class token alone
        return self.head(self.norm(x).squeeze(1))
