"""TrivialAugment, RandAugment and AutoAugment of whole batches of uint8 images, on the images' device.

Every image draws its own operations; images that drew the same operation are transformed together, so that the number
of kernels does not depend on the batch size. Operations, magnitudes and probabilities are those of torchvision's
classes of the same names, with their default nearest-neighbour sampling and black fill.

TrivialAugment (wide): Müller and Hutter, 2021, https://arxiv.org/abs/2103.10158. RandAugment: Cubuk et al., 2019,
https://arxiv.org/abs/1909.13719. AutoAugment: Cubuk et al., 2018, https://arxiv.org/abs/1805.09501, table 7.

Axes: B batch, R rounds of operations, n images that drew the same operation, C channels, h and w height and width, s
the side of square images.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from vit_lightning.config import AugmentConfig

Row: TypeAlias = tuple[Tensor | float, Tensor | float, Tensor | float]


def warp(images: Tensor, across: Row, down: Row) -> Tensor:
    """Sample every image by an affine map of its own: nearest neighbour, and black outside.

    Args:
        images: (n, C, h, w), uint8.
        across: a, b and c, numbers or (n, 1, 1, 1): the target (x, y) shows the source's x = ax + by + c, in pixels
            from the centre of the image.
        down: likewise for the source's y.

    Returns:
        (n, C, h, w), uint8.
    """
    n, C, h, w = images.shape
    x = torch.arange(w, device=images.device) - (w - 1) / 2
    y = (torch.arange(h, device=images.device) - (h - 1) / 2).unsqueeze(1)
    (a, b, c), (d, e, f) = across, down
    column = (a * x + b * y + c).add_((w - 1) / 2).round_()
    row = (d * x + e * y + f).add_((h - 1) / 2).round_()
    inside = (column.clamp(0, w - 1) == column) & (row.clamp(0, h - 1) == row)  # (n, 1, h, w)
    source = (row * w + column).mul_(inside).long()
    pixels = images.flatten(2).gather(2, source.view(n, 1, h * w).expand(-1, C, -1))
    return pixels.view_as(images).mul_(inside)


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Rotate anticlockwise."""
    cos, sin = degrees.deg2rad().cos(), degrees.deg2rad().sin()
    return warp(images, (cos, -sin, 0), (sin, cos, 0))


def color(images: Tensor, change: Tensor) -> Tensor:
    """Blend with the gray image, which a change of -1 gives; images of one channel do not change."""
    return blend(images, gray(images), change) if images.shape[1] == 3 else images


def contrast(images: Tensor, change: Tensor) -> Tensor:
    """Blend with the gray image's mean, which a change of -1 gives."""
    return blend(images, gray(images).mean(dim=(1, 2, 3), keepdim=True), change)


def sharpness(images: Tensor, change: Tensor) -> Tensor:
    """Blend with the smoothed image, which a change of -1 gives; the outermost pixels do not change."""
    x = images.float()
    rows = x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :]
    inner = x[..., 1:-1, 1:-1]
    smooth = (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]).add_(inner, alpha=4).div_(13).round_()
    inner.addcmul_(smooth.sub_(inner), -change)
    return x.clamp_(0, 255).to(torch.uint8)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert the values that are at least the threshold, which is in [0, 1]."""
    above = images >= (255 * threshold).ceil().to(torch.uint8)
    return images ^ above.to(torch.uint8).neg_()  # negating 1 gives 255, with all bits set


def blend(images: Tensor, other: Tensor, change: Tensor) -> Tensor:
    """Move images away from others, or towards them if the change is negative."""
    return images.float().mul_(1 + change).addcmul_(other, -change).clamp_(0, 255).to(torch.uint8)


def gray(images: Tensor) -> Tensor:
    """Compute the luma (n, 1, h, w) in integers."""
    if images.shape[1] == 1:
        return images.float()
    red, green, blue = images.float().split(1, dim=1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()


# Functions of images (n, C, h, w), uint8, and their magnitudes (n, 1, 1, 1) on the same device.
OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Identity": lambda x, _: x,
    "ShearX": lambda x, slope: warp(x, (1, slope, slope * (x.shape[-2] / 2)), (0, 1, 0)),
    "ShearY": lambda x, slope: warp(x, (1, 0, 0), (slope, 1, slope * (x.shape[-1] / 2))),
    "TranslateX": lambda x, pixels: warp(x, (1, 0, -pixels.trunc()), (0, 1, 0)),
    "TranslateY": lambda x, pixels: warp(x, (1, 0, 0), (0, 1, -pixels.trunc())),
    "Rotate": rotate,
    "Brightness": lambda x, change: (x * (1 + change)).clamp_(0, 255).to(torch.uint8),
    "Color": color,
    "Contrast": contrast,
    "Sharpness": sharpness,
    "Posterize": lambda x, bits: x & (256 - 2 ** (8 - bits)).to(torch.uint8),
    "Solarize": solarize,
    "AutoContrast": lambda x, _: TF.autocontrast(x),
    "Equalize": lambda x, _: TF.equalize(x),
    "Invert": lambda x, _: TF.invert(x),
}
SIGNED = list(OPERATIONS).index("Sharpness")  # the last operation whose magnitude has a random sign

# AutoAugment's pairs of operations for CIFAR-10: name, probability in tenths, and magnitude of 0 to 9.
_PAIRS = """
Invert 1 0, Contrast 2 6
Rotate 7 2, TranslateX 3 9
Sharpness 8 1, Sharpness 9 3
ShearY 5 8, TranslateY 7 9
AutoContrast 5 0, Equalize 9 0
ShearY 2 7, Posterize 3 7
Color 4 3, Brightness 6 7
Sharpness 3 9, Brightness 7 9
Equalize 6 0, Equalize 5 0
Contrast 6 7, Sharpness 6 5
Color 7 7, TranslateX 5 8
Equalize 3 0, AutoContrast 4 0
TranslateY 4 3, Sharpness 2 6
Brightness 9 6, Color 2 8
Solarize 5 2, Invert 0 0
Equalize 2 0, AutoContrast 6 0
Equalize 2 0, Equalize 6 0
Color 9 9, Equalize 6 0
AutoContrast 8 0, Solarize 2 8
Brightness 1 3, Color 7 0
Solarize 4 5, AutoContrast 9 0
TranslateY 9 9, TranslateY 7 9
AutoContrast 9 0, Solarize 8 3
Equalize 8 0, Invert 1 0
TranslateY 7 9, AutoContrast 9 0
"""
CIFAR10 = torch.tensor(
    [
        [(list(OPERATIONS).index(name), int(tenths), int(level)) for name, tenths, level in map(str.split, pair)]
        for pair in (line.split(",") for line in _PAIRS.strip().splitlines())
    ]
)  # (25, 2, 3)


def magnitude_bins(policy: str, side: int) -> Tensor:
    """List the magnitudes that a policy draws from, without signs.

    Args:
        policy: ``trivial``, ``rand`` or ``auto``.
        side: s, side of the images in pixels.

    Returns:
        (operations, bins): a slope, pixels, degrees, a relative change, the number of bits kept, a threshold in [0, 1],
        or 0 for operations without a magnitude.
    """
    wide, bins = policy == "trivial", 10 if policy == "auto" else 31
    slope, pixels, degrees, change, fewer = (0.99, 32, 135, 0.99, 6) if wide else (0.3, 150 / 331 * side, 30, 0.9, 4)
    largest = [0, slope, slope, pixels, pixels, degrees, change, change, change, change]
    rows = [torch.linspace(0, value, bins) for value in largest]
    rows += [(8 - torch.arange(bins) / ((bins - 1) / fewer)).round(), torch.linspace(1, 0, bins)]
    return torch.stack(rows + [torch.zeros(bins)] * (len(OPERATIONS) - len(rows)))


def draw_operations(batch: int, side: int, config: AugmentConfig) -> tuple[Tensor, Tensor]:
    """Draw the operations of every image from torch's CPU generator.

    Args:
        batch: B, the number of images.
        side: s, side of the images in pixels.
        config: ``policy``, ``policy_prob`` and ``magnitude``.

    Returns:
        Positions in ``OPERATIONS`` (R, B), int64, and magnitudes (R, B): R is 1 for TrivialAugment, else 2.
    """
    rounds = 1 if config.policy == "trivial" else 2
    if config.policy == "auto":
        operations, tenths, level = CIFAR10[torch.randint(len(CIFAR10), (batch,))].permute(2, 1, 0)  # (2, B) each
        operations = operations * (torch.rand(2, batch) <= tenths / 10)  # 0 is the identity
    else:
        operations = torch.randint(len(OPERATIONS) - 1, (rounds, batch))  # all but Invert, only in AutoAugment
        level = torch.randint(31, (rounds, batch)) if config.policy == "trivial" else torch.tensor(config.magnitude)
    if config.policy_prob < 1:
        operations = operations * (torch.rand(batch) < config.policy_prob)
    magnitudes = magnitude_bins(config.policy, side)[operations, level]
    negative = (torch.rand(rounds, batch) <= 0.5) & (operations <= SIGNED)
    return operations, torch.where(negative, -magnitudes, magnitudes)


def apply_operations(images: Tensor, operations: Tensor, magnitudes: Tensor) -> Tensor:
    """Apply one operation to each image.

    Args:
        images: (B, C, s, s), uint8, of 1 or 3 channels.
        operations: (B,), int64, on the CPU: positions in ``OPERATIONS``.
        magnitudes: (B,), on the CPU: values from :func:`magnitude_bins`, or their negatives.

    Returns:
        (B, C, s, s), uint8.
    """
    order = operations.argsort(stable=True)
    counts = torch.bincount(operations, minlength=len(OPERATIONS)).tolist()
    groups = images.index_select(0, order.to(images.device)).split(counts)
    strengths = magnitudes[order].to(images.device).view(-1, 1, 1, 1).split(counts)
    changed = [
        function(group, strength) if len(group) else group
        for function, group, strength in zip(OPERATIONS.values(), groups, strengths, strict=True)
    ]
    return torch.cat(changed).index_select(0, order.argsort().to(images.device))


def apply_policy(images: Tensor, config: AugmentConfig) -> Tensor:
    """Transform every image with its own random operations.

    Args:
        images: (B, C, s, s), uint8, of 1 or 3 channels.
        config: ``policy``, ``policy_prob`` and ``magnitude``.

    Returns:
        (B, C, s, s), uint8.
    """
    operations, magnitudes = draw_operations(len(images), images.shape[-1], config)
    for operation, magnitude in zip(operations, magnitudes, strict=True):
        images = apply_operations(images, operation, magnitude)
    return images
