"""Transforms of whole batches of uint8 images, on the device they are on, with parameters of their own for every image.

Resize, rotation, flip and shift are one affine sampling of the small source images; normalisation is folded into it.
Axes: B batch, C channels, h and w the source's height and width, S the network's image size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vit_lightning.config import AugmentConfig


def eval_transform(images: Tensor, size: int, mean: Tensor, std: Tensor) -> Tensor:
    """Resize to ``size`` (bilinear, antialiased), scale to [0, 1] and normalise, as torchvision does.

    Args:
        images: (B, C, h, w), uint8.
        size: S, in pixels.
        mean: (C,), the training set's mean of each channel on [0, 1].
        std: (C,), its standard deviation.

    Returns:
        (B, C, S, S), float32.
    """
    x = (images / 255 - _per_channel(mean)) / _per_channel(std)
    return _resize(x, size)


def train_transform(images: Tensor, size: int, mean: Tensor, std: Tensor, config: AugmentConfig) -> Tensor:
    """Resize, randomly rotate, flip and shift, scale to [0, 1] and normalise.

    What a rotation or a shift brings in from outside the image is black, as in torchvision's ``RandomRotation``;
    sampling is bilinear. The random numbers come from torch's CPU generator.

    Args:
        images: (B, C, h, w), uint8.
        size: S, in pixels.
        mean: (C,), the training set's mean of each channel on [0, 1].
        std: (C,), its standard deviation.
        config: strength of each transform.

    Returns:
        (B, C, S, S), float32.
    """
    h, w = images.shape[-2:]
    theta = random_affine(len(images), config).to(images.device)
    # Only divided here, so that black is still zero, which is what the outside becomes; the mean is taken off last.
    x = images / (255 * _per_channel(std))
    if h > size or w > size:  # sampling cannot average over the source pixels that a target pixel covers
        x = _resize(x, size)
    grid = sampling_grid(theta, size)  # (B, 2, S, S)
    inside = grid.abs().amax(dim=1, keepdim=True) <= 1  # (B, 1, S, S)
    x = F.grid_sample(x, grid.permute(0, 2, 3, 1), mode="bilinear", padding_mode="border", align_corners=False)
    return x.mul_(inside).sub_(_per_channel(mean / std))


def random_affine(batch: int, config: AugmentConfig) -> Tensor:
    """Random maps from target to source coordinates: a rotation, after it a flip and a shift.

    Args:
        batch: B, the number of images.
        config: strength of each transform.

    Returns:
        (B, 2, 3) on the CPU, in the coordinates of :func:`torch.nn.functional.affine_grid`: x and y in [-1, 1].
    """
    angle = (2 * torch.rand(batch) - 1) * math.radians(config.rotation)
    flip = 1 - 2 * (torch.rand(batch) < config.flip).float()  # -1 mirrors
    shift = (2 * torch.rand(2, batch) - 1) * 2 * config.shift  # an image is 2 wide in these coordinates
    cos, sin = angle.cos(), angle.sin()
    rows = torch.stack([cos * flip, -sin, shift[0], sin * flip, cos, shift[1]], dim=1)
    return rows.view(batch, 2, 3)


def sampling_grid(theta: Tensor, size: int) -> Tensor:
    """Where each target pixel lies in the source: :func:`torch.nn.functional.affine_grid`, many times as fast on a CPU.

    Args:
        theta: (B, 2, 3), from :func:`random_affine`.
        size: S, in pixels.

    Returns:
        (B, 2, S, S): x and y, in [-1, 1] inside the image.
    """
    centre = (torch.arange(size, device=theta.device) + 0.5) * (2 / size) - 1  # (S,), of each pixel
    by_column = theta[:, :, :1] * centre  # (B, 2, S)
    by_row = theta[:, :, 1:2] * centre + theta[:, :, 2:]
    return by_column[:, :, None, :] + by_row[:, :, :, None]


def denormalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Undo the normalisation: (B, C, S, S) float to values in [0, 1], for looking at."""
    return (images * _per_channel(std) + _per_channel(mean)).clamp(0, 1)


def _resize(images: Tensor, size: int) -> Tensor:
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


def _per_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)
