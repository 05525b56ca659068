"""Patch embeddings: images (B, C, S, S) to tokens (B, (S / P)², D). Each is constructed with the configuration.

Axes as in :mod:`vit_lightning.model.vit`; h and w are the height and width of a feature map.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from vit_lightning import register
from vit_lightning.config import ModelConfig


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches, row by row.

    Args:
        images: (B, C, S, S).
        patch_size: P, a divisor of S.

    Returns:
        (B, (S / P)², C · P · P), channel-major within a patch.
    """
    return F.unfold(images, patch_size, stride=patch_size).transpose(1, 2)


@register.patch_embed("unfold")
class PatchEmbed(nn.Linear):
    """A linear map of each patch's pixels (Dosovitskiy et al., 2021, equation 1)."""

    def __init__(self, config: ModelConfig) -> None:
        assert config.channels is not None
        super().__init__(config.channels * config.patch_size**2, config.embed_dim)
        self.patch_size = config.patch_size

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, S, S) to (B, (S / P)², D)."""
        return super().forward(patchify(images, self.patch_size))


def conv3x3(channels: int, width: int) -> nn.Conv2d:
    """Return a 3 × 3 convolution that keeps the image's size."""
    return nn.Conv2d(channels, width, 3, padding=1, bias=False)


class ResidualConv(nn.Sequential):
    """A 3 × 3 convolution, batch norm and GELU, added to the input (He et al., 2016, arXiv:1512.03385, section 3).

    With ``se``, its channels are weighted by squeeze-and-excitation (Hu et al., 2018, arXiv:1709.01507, section 3)
    with a bottleneck of an eighth of the width.
    """

    def __init__(self, width: int, se: bool) -> None:
        gate = [SqueezeExcitation(width, max(1, width // 8))] if se else []
        super().__init__(conv3x3(width, width), nn.BatchNorm2d(width), nn.GELU(), *gate)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, h, w) to (B, width, h, w)."""
        return x + super().forward(x)


@register.patch_embed("conv")
class ConvStem(nn.Sequential):
    """A convolutional stem: stages that halve the image until each pixel is a token.

    A stage is a 3 × 3 convolution, max-pooling, batch norm and GELU, and in all but the last stage
    ``config.stem_depth`` residual convolutions. The width doubles from stage to stage, up to D. After Hassani et al.,
    2021 (https://arxiv.org/abs/2104.05704, section 3.3), without norms; pooling first reduces the cost of the norm and
    the activation to a quarter.
    """

    def __init__(self, config: ModelConfig) -> None:
        assert config.channels is not None
        stages = config.patch_size.bit_length() - 1
        depth = config.stem_depth
        depths = depth if isinstance(depth, list) else [depth] * (stages - 1)
        widths = [config.channels, *(config.embed_dim >> stage for stage in reversed(range(stages)))]
        super().__init__(
            *(
                nn.Sequential(
                    conv3x3(channels, width),
                    nn.MaxPool2d(2),
                    nn.BatchNorm2d(width),
                    nn.GELU(),
                    *(ResidualConv(width, config.stem_se) for _ in range(depth)),
                )
                for (channels, width), depth in zip(itertools.pairwise(widths), [*depths, 0], strict=True)
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, S, S) to (B, (S / P)², D)."""
        images = images.contiguous(memory_format=torch.channels_last)  # the faster layout for convolutions
        return super().forward(images).flatten(2).transpose(1, 2)
