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

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, D // self.heads)  # (B, N, 3, H, K)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, K) each
        x = F.scaled_dot_product_attention(q, k, v)  # (B, H, N, K)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class PreNormBlock(nn.Module):
    """``x + drop(attn(norm1(x)))``, then ``x + mlp(norm2(x))``; one norm follows the last block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D = config.embed_dim
        self.norm1 = nn.LayerNorm(D, eps=NORM_EPS)
        self.attn = Attention(D, config.heads)
        self.drop = nn.Dropout(config.dropout)
        self.norm2 = nn.LayerNorm(D, eps=NORM_EPS)
        self.mlp = nn.Sequential(
            nn.Linear(D, config.mlp_dim), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(config.mlp_dim, D)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.norm1(x)))
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
        self.drop = nn.Dropout(config.dropout)
        self.norm_1 = nn.LayerNorm(D, eps=NORM_EPS)
        self.ffn = nn.Sequential(
            *(nn.Linear(D, config.mlp_dim), nn.GELU(), nn.Dropout(config.dropout)),
            *(nn.Linear(config.mlp_dim, D), nn.GELU(), nn.Dropout(config.dropout)),
        )
        self.norm_2 = nn.LayerNorm(D, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm_1(x + self.drop(self.attn(self.norm_in(x))))
        return self.norm_2(h + self.ffn(h))


def mlp_head(dim: int, units: list[int], num_classes: int, dropout: float) -> nn.Sequential:
    """Linear, GELU, dropout for each of ``units``, then a linear layer to the logits."""
    layers: list[nn.Module] = []
    for width in units:
        layers += [nn.Linear(dim, width), nn.GELU(), nn.Dropout(dropout)]
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
        self.blocks = nn.Sequential(*(block(config) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(D, eps=NORM_EPS) if config.block == "prenorm" else nn.Identity()
        self.head = mlp_head(D, config.mlp_head_units, config.num_classes, config.head_dropout)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, S, S) to logits (B, num_classes)."""
        x = self.patch_embed(patchify(images, self.patch_size))  # (B, N - 1, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed  # (B, N, D)
        x = self.norm(self.blocks(x)[:, 0])  # (B, D)
        return self.head(x)
