"""The Vision Transformer, in pure PyTorch.

After "An Image is Worth 16x16 Words" (Dosovitskiy et al., 2021, https://arxiv.org/abs/2010.11929, section 3.1),
with the constants of the Keras example "Image classification with Vision Transformer" and its PyTorch adaptations.

Axes:
    B  batch              N  tokens (class token, patches, registers)
    C  image channels     D  width of a token (``embed_dim``)
    S  image size         H  heads
    P  patch size         K  width of a head (D / H)
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation, StochasticDepth

from vit_lightning.config import ModelConfig

NORM_EPS = 1e-6


class Dropout(nn.Dropout):
    """:class:`torch.nn.Dropout`, whose mask costs a CPU little.

    The stock mask draws one random number for each element, one after the other. Here each 64-bit word from the same
    generator gives four mask values of 16 bits: the share dropped is ``p`` rounded to a multiple of 2⁻¹⁶, and what is
    kept is scaled by what that rounding left. Other devices take the stock one, and so does a compiled
    network, whose random numbers are no longer drawn one after the other.
    """

    def forward(self, x: Tensor) -> Tensor:
        stock = x.device.type != "cpu" or torch.compiler.is_compiling()
        if not self.training or self.p == 0 or stock:
            return super().forward(x)
        dropped = min(round(self.p * 2**16), 2**16 - 1)  # of 2¹⁶ equally likely values
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        keep = words.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
        return x * keep.to(x.dtype).mul_(2**16 / (2**16 - dropped))


class Attention(nn.Module):
    """Multi-head self-attention without mask (Vaswani et al., 2017, https://arxiv.org/abs/1706.03762, section 3.2.2).

    Equals :class:`torch.nn.MultiheadAttention`, whose initialisation it shares, mostly by the fused kernel.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor, queries: int | None = None, rotation: Tensor | None = None) -> Tensor:
        """Attention to all tokens of x (B, N, D), for the first ``queries`` of them, Q: (B, Q, D).

        ``rotation`` (2, N, K), from :func:`rotary_angles`, turns queries and keys by their positions.
        """
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
        if rotation is not None:
            q, k = rotate(q, rotation[:, : q.shape[2]]), rotate(k, rotation)
        if x.device.type == "cpu" and q.dtype == torch.bfloat16:  # whose fused gradient is several times as slow
            weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(dim=-1)  # (B, H, Q, N)
            x = weights.to(v.dtype) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)  # (B, H, Q, K)
        return self.proj(x.transpose(1, 2).flatten(2))

    def weights(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        """How much each token of x (B, N, D) attends to each, which :meth:`forward` need not make: (B, H, N, N)."""
        B, N, D = x.shape
        q, k, _ = self.qkv(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # (B, H, N, K) each
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)


def rotary_angles(side: int, head_dim: int, first: int, last: int) -> Tensor:
    """Cosines and sines that turn queries and keys by where their patch lies: axial rotary position embedding.

    After Su et al., 2021 (https://arxiv.org/abs/2104.09864, section 3.2.2), along both axes of an image as in Heo et
    al., 2024 (https://arxiv.org/abs/2403.13298, section 3.1, with its base of 100): half of a head's pairs of channels
    turn with x, half with y.

    Args:
        side: patches along an image's side.
        head_dim: K, a multiple of 4.
        first: tokens before the patches, which are not turned.
        last: tokens after them, likewise.

    Returns:
        (2, N, K).
    """
    frequencies = 100 ** -(torch.arange(head_dim // 4) / (head_dim // 4))  # (K / 4,)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = torch.cat([places.reshape(-1, 1) * frequencies for places in (x, y)], dim=1)  # (side², K / 2)
    angles = F.pad(angles, (0, 0, first, last)).repeat(1, 2)  # (N, K): the second half pairs with the first
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn the pairs (i, i + K / 2) of x (B, H, N, K) by the angles of ``rotation`` (2, N, K)."""
    cos, sin = rotation.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch (Touvron et al., 2021, https://arxiv.org/abs/2103.17239)."""

    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), value))

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) to (…, D)."""
        return x * self.gamma


class PreNormBlock(nn.Module):
    """``x + drop(attn(norm1(x)))``, then ``x + mlp(norm2(x))``; one norm follows the last block.

    Each residual branch may be scaled (:class:`LayerScale`), begin at zero (``config.zero_init``) and be left out for
    a random part of the images (``drop_path``; Huang et al., 2016, https://arxiv.org/abs/1603.09382).
    """

    def __init__(self, config: ModelConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        D = config.embed_dim
        self.norm1 = nn.LayerNorm(D, eps=NORM_EPS)
        self.attn = Attention(D, config.heads)
        self.drop = Dropout(config.dropout)
        self.norm2 = nn.LayerNorm(D, eps=NORM_EPS)
        out = nn.Linear(config.mlp_dim, D)
        self.mlp = nn.Sequential(nn.Linear(D, config.mlp_dim), nn.GELU(), Dropout(config.dropout), out)
        scale = config.layer_scale
        self.scale1, self.scale2 = (nn.Identity() if scale is None else LayerScale(D, scale) for _ in range(2))
        self.drop_path = StochasticDepth(drop_path, "row")
        if config.zero_init:
            for parameter in (self.attn.proj.weight, out.weight, out.bias):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, queries: int | None = None, rotation: Tensor | None = None) -> Tensor:
        """(B, N, D) to (B, N, D), or to the first ``queries`` tokens of that, at their cost alone."""
        a = self.drop(self.attn(self.norm1(x), queries, rotation))
        x = x[:, :queries] + self.drop_path(self.scale1(a))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class BlogBlock(nn.Module):
    """The tutorial's block: ``a = norm_in(x)``, ``h = norm_1(x + drop(attn(a)))``, ``norm_2(h + ffn(h))``.

    Its feed-forward has GELU and dropout after the second linear layer too, and no norm follows the last block.
    """

    def __init__(self, config: ModelConfig, drop_path: float = 0.0) -> None:
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

    def forward(self, x: Tensor, queries: int | None = None, rotation: Tensor | None = None) -> Tensor:
        """(B, N, D) to (B, N, D), or to the first ``queries`` tokens of that, at their cost alone."""
        h = self.norm_1(x[:, :queries] + self.drop(self.attn(self.norm_in(x), queries, rotation)))
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


class PatchEmbed(nn.Linear):
    """A linear map of each patch's pixels (Dosovitskiy et al., 2021, equation 1)."""

    def __init__(self, channels: int, patch_size: int, dim: int) -> None:
        super().__init__(channels * patch_size**2, dim)
        self.patch_size = patch_size

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, S, S) to (B, (S / P)², D)."""
        return super().forward(patchify(images, self.patch_size))


class Conv(nn.Linear):
    """A 3 × 3 convolution without bias, whose weight is a matrix (out, in · 9), as Muon wants it."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(before * 9, after, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, h, w) to (B, after, h, w)."""
        return F.conv2d(x, self.weight.unflatten(1, (-1, 3, 3)), padding=1)


class ResidualConv(nn.Sequential):
    """A 3 × 3 convolution, batch norm and GELU beside the identity (He et al., 2016, arXiv:1512.03385, section 3).

    ``se`` weights its channels by squeeze-and-excitation (Hu et al., 2018, arXiv:1709.01507, section 3), with a
    bottleneck of an eighth of the width.
    """

    def __init__(self, width: int, se: bool = False) -> None:
        excitation = [SqueezeExcitation(width, max(1, width // 8))] if se else []
        super().__init__(Conv(width, width), nn.BatchNorm2d(width), nn.GELU(), *excitation)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, h, w) to the same."""
        return x + super().forward(x)


class ConvStem(nn.Sequential):
    """Halves the image with a 3 × 3 convolution, max-pooling, batch norm and GELU until a pixel is a token.

    After Hassani et al., 2021 (https://arxiv.org/abs/2104.05704, section 3.3), with a norm; pooling comes before it,
    at a quarter of the cost. The width doubles from stage to stage, up to D. After each stage but the last,
    residual convolutions may follow: ``depth`` of them, or of a list a number for each stage.
    """

    def __init__(self, channels: int, patch_size: int, dim: int, depth: int | list[int], se: bool) -> None:
        stages = patch_size.bit_length() - 1
        depths = [*depth, 0] if isinstance(depth, list) else [depth] * (stages - 1) + [0]
        widths = [channels, *(dim >> stage for stage in reversed(range(stages)))]
        super().__init__(
            *(
                nn.Sequential(
                    Conv(before, after),
                    nn.MaxPool2d(2),
                    nn.BatchNorm2d(after),
                    nn.GELU(),
                    *(ResidualConv(after, se) for _ in range(depth)),
                )
                for (before, after), depth in zip(itertools.pairwise(widths), depths, strict=True)
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, S, S) to (B, (S / P)², D)."""
        images = images.contiguous(memory_format=torch.channels_last)  # the faster layout for convolutions
        return super().forward(images).flatten(2).transpose(1, 2)


class AttentionPool(nn.Module):
    """A mean over tokens by learned weights: sequence pooling (Hassani et al., 2021, section 3.2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.score = nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, D)."""
        return (self.score(x).softmax(dim=1).transpose(1, 2) @ x).squeeze(1)


class ViT(nn.Module):
    """Vision Transformer classifier: patches, position embedding, blocks, pooling, MLP head.

    By default the head reads a class token in front of the patches; ``config.pool`` may have it read their mean, or
    their weighted mean, instead. Register tokens (Darcet et al., 2024, https://arxiv.org/abs/2309.16588) follow them.

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
        self.pool = config.pool
        D = config.embed_dim
        self.side = side = config.image_size // config.patch_size  # of the square of patches
        self.patch_embed = (
            ConvStem(config.channels, config.patch_size, D, config.stem_depth, config.stem_se)
            if config.patch_embed == "conv"
            else PatchEmbed(config.channels, config.patch_size, D)
        )
        first = int(config.pool == "cls")  # tokens before the patches
        self.cls_token = _tokens(first, D)
        self.registers = _tokens(config.registers, D)
        self.pos_embed = _tokens(first + side**2 if config.position == "learned" else 0, D)
        self.rotary = (D // config.heads, first, config.registers) if config.position == "rotary" else None
        angles = None if self.rotary is None else rotary_angles(side, *self.rotary)
        self.register_buffer("rotation", angles, persistent=False)
        block = {"prenorm": PreNormBlock, "blog": BlogBlock}[config.block]
        rates = torch.linspace(0, config.drop_path, config.layers).tolist()  # rises with depth
        self.blocks = nn.ModuleList(block(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(D, eps=NORM_EPS) if config.block == "prenorm" else nn.Identity()
        self.attention_pool = AttentionPool(D) if config.pool == "attention" else None
        self.head = mlp_head(D, config.mlp_head_units, config.num_classes, config.head_dropout)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, S, S) to logits (B, num_classes).

        Images of another size, of whole patches too, do as well: positions are resized to their tokens.
        """
        x = self.patch_embed(images)  # (B, patches, D)
        side = images.shape[-1] // (self.image_size // self.side)
        read = 1 if self.cls_token is not None else side**2  # tokens of the head, which alone the last block works out
        rotation = self.rotation
        if self.rotary is not None and side != self.side:
            rotation = rotary_angles(side, *self.rotary).to(x.device)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        if self.pos_embed is not None:
            x = x + resize_positions(self.pos_embed, side, first=int(self.cls_token is not None))
        if self.registers is not None:
            x = torch.cat([x, self.registers.expand(x.shape[0], -1, -1)], dim=1)  # (B, N, D)
        for block in self.blocks[:-1]:
            x = block(x, rotation=rotation)  # (B, N, D)
        queries = read if read < x.shape[1] else None
        x = self.norm(self.blocks[-1](x, queries, rotation))  # (B, read, D)
        if self.pool == "cls":
            x = x.squeeze(1)
        elif self.attention_pool is not None:
            x = self.attention_pool(x)
        else:
            x = x.mean(dim=1)
        return self.head(x)  # from (B, D)


def resize_positions(positions: Tensor, side: int, first: int) -> Tensor:
    """Learned positions of a square of patches, for a square of another size (bicubic, antialiased).

    Args:
        positions: (1, first + n², D).
        side: patches along a side of the new square.
        first: tokens before the patches, whose positions stay as they are.

    Returns:
        (1, first + side², D).
    """
    before, grid = positions[:, :first], positions[:, first:]
    n = round(grid.shape[1] ** 0.5)
    if n == side:
        return positions
    # A product with what it makes of each patch alone: the gradient of bicubic resizing is not deterministic on GPUs.
    single = torch.eye(n**2, device=grid.device).view(n**2, 1, n, n)
    share = F.interpolate(single, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([before, share.view(n**2, side**2).T.to(grid.dtype) @ grid], dim=1)


def _tokens(number: int, dim: int) -> nn.Parameter | None:
    """Learned vectors (1, number, D)."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, number, dim), std=0.02)) if number else None
