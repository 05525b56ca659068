"""Layers that are independent of the block: dropout, scales, positions, pooling and the head.

Axes as in :mod:`vit_lightning.model.vit`. A pool is constructed with D; its attribute ``class_token`` (default: False)
says whether it receives the class token instead of the patches, and ``final_norm`` (default: True) whether the
network's final norm precedes it.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_lightning import register


class Dropout(nn.Dropout):
    """:class:`torch.nn.Dropout` with a mask that is cheap to draw on a CPU.

    PyTorch draws one random number per element, sequentially. Here every 64-bit word from the same generator yields
    four 16-bit mask values, so ``p`` is rounded to a multiple of 2⁻¹⁶; kept elements are scaled according to the
    rounded probability. Other devices and compiled networks use PyTorch's own implementation.
    """

    def forward(self, x: Tensor) -> Tensor:
        native = x.device.type != "cpu" or torch.compiler.is_compiling()
        if not self.training or self.p == 0 or native:
            return super().forward(x)
        dropped = min(round(self.p * 2**16), 2**16 - 1)  # number of dropped values among 2¹⁶ equally likely ones
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        keep = words.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
        return x * keep.to(x.dtype).mul_(2**16 / (2**16 - dropped))


class LayerScale(nn.Module):
    """A learned factor per channel of a residual branch (Touvron et al., 2021, https://arxiv.org/abs/2103.17239)."""

    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), value))

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) to (…, D)."""
        return x * self.gamma


def rotary_angles(side: int, head_dim: int, first: int, last: int) -> Tensor:
    """Return the cosines and sines of axial rotary position embedding.

    After Su et al., 2021 (https://arxiv.org/abs/2104.09864, section 3.2.2), applied to both axes of an image as in Heo
    et al., 2024 (https://arxiv.org/abs/2403.13298, section 3.1, with its base of 100): half of the channel pairs of a
    head rotate with the patch's column, half with its row.

    Args:
        side: patches along a side of the image.
        head_dim: K, a multiple of 4.
        first: number of tokens before the patches, which are not rotated.
        last: number of tokens after the patches, likewise.

    Returns:
        The cosines and sines, (2, N, K).
    """
    frequencies = 100 ** -(torch.arange(head_dim // 4) / (head_dim // 4))  # (K / 4,)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = torch.cat([axis.reshape(-1, 1) * frequencies for axis in (columns, rows)], dim=1)  # (side², K / 2)
    angles = F.pad(angles, (0, 0, first, last)).repeat(1, 2)  # (N, K): channel i is paired with channel i + K / 2
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate the channel pairs (i, i + K / 2) of x (B, H, N, K) by the angles of ``rotation`` (2, N, K)."""
    cos, sin = rotation.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def resize_positions(positions: Tensor, side: int, first: int) -> Tensor:
    """Resize learned positions to another number of patches (bicubic, antialiased).

    Args:
        positions: (1, first + n², D).
        side: patches along a side of the new image.
        first: number of tokens before the patches, whose positions are kept.

    Returns:
        (1, first + side², D).
    """
    kept, grid = positions[:, :first], positions[:, first:]
    n = round(grid.shape[1] ** 0.5)
    if n == side:
        return positions
    # The gradient of bicubic resizing is not deterministic on GPUs, but that of a product with its matrix is.
    basis = torch.eye(n**2, device=grid.device).view(n**2, 1, n, n)
    matrix = F.interpolate(basis, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([kept, matrix.view(n**2, side**2).T.to(grid.dtype) @ grid], dim=1)


@register.pool("cls")
class ClassTokenPool(nn.Module):
    """Select the class token, which the network prepends to the patches."""

    class_token = True

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, D) to (B, D)."""
        return x.squeeze(1)


@register.pool("mean")
class MeanPool(nn.Module):
    """Average the patches."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, D)."""
        return x.mean(dim=1)


@register.pool("mean_norm")
class MeanNormPool(MeanPool):
    """Average the patches before the final norm instead of after it."""

    final_norm = False

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, D)."""
        return self.norm(super().forward(x))


@register.pool("attention")
class AttentionPool(nn.Module):
    """Average the patches with learned weights: sequence pooling (Hassani et al., 2021, arXiv:2104.05704, 3.2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.score = nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, D)."""
        return (self.score(x).softmax(dim=1).transpose(1, 2) @ x).squeeze(1)


def mlp_head(dim: int, units: Sequence[int], num_classes: int, dropout: float) -> nn.Sequential:
    """Return a linear layer, GELU and dropout for each element of ``units``, and a final linear layer to the logits."""
    layers: list[nn.Module] = []
    for width in units:
        layers += [nn.Linear(dim, width), nn.GELU(), Dropout(dropout)]
        dim = width
    return nn.Sequential(*layers, nn.Linear(dim, num_classes))


def learned_tokens(number: int, dim: int) -> nn.Parameter | None:
    """Return a parameter (1, number, D), or ``None`` if ``number`` is 0."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, number, dim), std=0.02)) if number else None
