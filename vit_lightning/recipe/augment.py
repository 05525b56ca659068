"""Transforms of whole batches of uint8 images, on the images' device, with independent parameters per image.

Resizing, random resized crop, rotation, flip and shift are one affine sampling of the source images, with the
normalisation folded in. A transform that is switched off costs nothing.
Axes: B batch, C channels, h and w the source's height and width, S the network's image size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vit_lightning.config import AugmentConfig
from vit_lightning.recipe.policies import apply_policy


def eval_transform(images: Tensor, size: int, mean: Tensor, std: Tensor) -> Tensor:
    """Crop to the central square, scale to [0, 1], normalise and resize, as torchvision does.

    Args:
        images: (B, C, h, w), uint8, of any height and width.
        size: S, in pixels.
        mean: (C,), mean of each channel of the training set, with pixel values in [0, 1].
        std: (C,), standard deviation of each channel.

    Returns:
        (B, C, S, S), float32.
    """
    x = (centre_crop(images) / 255 - _per_channel(mean)) / _per_channel(std)
    return resize(x, size)


def train_transform(images: Tensor, size: int, mean: Tensor, std: Tensor, config: AugmentConfig) -> Tensor:
    """Crop, apply a policy, resize, randomly crop, rotate, flip and shift, scale to [0, 1], normalise and erase.

    Areas that a rotation or a shift moves in from outside the image are black, as in torchvision's ``RandomRotation``;
    areas from outside a random resized crop show the image around it. Sampling is bilinear. The random numbers come
    from torch's CPU generator.

    Args:
        images: (B, C, h, w), uint8, of any height and width; the central square is used.
        size: S, in pixels.
        mean: (C,), mean of each channel of the training set, with pixel values in [0, 1].
        std: (C,), standard deviation of each channel.
        config: strength of each transform.

    Returns:
        (B, C, S, S), float32.
    """
    images = centre_crop(images)
    side = images.shape[-1]
    if config.crop:
        images = random_crop(images, config.crop)
    if config.policy != "none":
        images = apply_policy(images, config)
    if config.jitter:
        images = colour_jitter(images, 1 + config.jitter * (2 * torch.rand(3, len(images)) - 1))
    # Only division for now, so that black stays zero like the area outside; the mean is subtracted last.
    x = images / (255 * _per_channel(std))
    if side > size and config.scale == 1:  # sampling cannot average the source pixels of a target pixel
        x = resize(x, size)
    if config.rotation or config.shift or config.scale < 1 or x.shape[-2:] != (size, size):
        x = sample(x, random_affine(len(images), config), size)
    elif config.flip:
        mirror = (torch.rand(len(images)) < config.flip).to(images.device)
        x = torch.where(mirror.view(-1, 1, 1, 1), x.flip(-1), x)
    x.sub_(_per_channel(mean / std))
    if config.erase:
        # Area and ratio are in the range of Zhong et al., 2020 (https://arxiv.org/abs/1708.04896, section 3), and the
        # fill is the mean. Unlike theirs, the ratio is log-uniform, and a box that crosses the border is clipped.
        erased = torch.rand(len(images)) < config.erase
        area = torch.empty(len(images)).uniform_(0.02, 0.4) * erased
        ratio = torch.empty(len(images)).uniform_(math.log(0.3), math.log(1 / 0.3)).exp()
        x.mul_(~random_boxes(area, ratio, size).to(x.device))
    return x


def mix(images: Tensor, labels: Tensor, classes: int, config: AugmentConfig) -> tuple[Tensor, Tensor]:
    """Mix each image with another of the batch by MixUp or CutMix, with an independent share and box per image.

    MixUp: Zhang et al., 2018, https://arxiv.org/abs/1710.09412, section 2. CutMix: Yun et al., 2019,
    https://arxiv.org/abs/1905.04899, section 3.1.

    Args:
        images: (B, C, S, S), float.
        labels: (B,), int64.
        classes: number of classes.
        config: ``mixup``, ``cutmix`` and ``mix_prob``.

    Returns:
        The mixed images (B, C, S, S), and the class probabilities (B, classes).
    """
    B, device = len(labels), images.device
    cut = torch.full((B,), config.cutmix > 0)
    if config.cutmix and config.mixup:
        cut = torch.rand(B) < 0.5
    share = torch.where(cut, _beta(config.cutmix, B), _beta(config.mixup, B))  # the share of the other image
    share = share * (torch.rand(B) < config.mix_prob)
    box = random_boxes(share * cut, torch.ones(B), images.shape[-1])
    share = torch.where(cut, box.float().mean(dim=(1, 2, 3)), share).to(device)  # the box may be clipped
    weight = torch.where(cut.to(device).view(-1, 1, 1, 1), box.to(device).float(), share.view(-1, 1, 1, 1))
    targets = F.one_hot(labels, classes).float()
    # Training batches are already in random order, so an image's neighbour is a random other image.
    return torch.lerp(images, images.roll(1, dims=0), weight), torch.lerp(
        targets, targets.roll(1, dims=0), share.view(-1, 1)
    )


def random_crop(images: Tensor, padding: int) -> Tensor:
    """Shift every image by up to ``padding`` whole pixels along each axis, with a reflected border.

    Args:
        images: (B, C, h, w).
        padding: in pixels, less than h and w.

    Returns:
        (B, C, h, w), as torchvision's ``RandomCrop`` with reflected padding, applied to each image.
    """
    B, _, h, w = images.shape
    shift = torch.randint(-padding, padding + 1, (2, B, 1))
    rows, columns = (
        (length - 1 - (length - 1 - (torch.arange(length) + by).abs()).abs()).to(images.device)
        for length, by in zip((h, w), shift, strict=True)
    )  # (B, h) and (B, w)
    image = torch.arange(B, device=images.device).view(-1, 1, 1)
    return images.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def colour_jitter(images: Tensor, factors: Tensor) -> Tensor:
    """Change the brightness, contrast and saturation of every image by a factor of its own.

    Args:
        images: (B, C, h, w), uint8.
        factors: (3, B): 0 gives a black, a uniformly gray and a grayscale image, respectively; 1 gives the original.

    Returns:
        (B, C, h, w), uint8, as torchvision's ``adjust_brightness``, ``adjust_contrast`` and ``adjust_saturation`` in
        this order; images of one channel have no saturation.
    """
    brightness, contrast, saturation = factors.to(images.device).view(3, -1, 1, 1, 1).unbind()
    x = (images * brightness).clamp(0, 255)
    x = torch.lerp(_gray(x).mean(dim=(1, 2, 3), keepdim=True), x, contrast).clamp(0, 255)
    if images.shape[1] == 3:
        x = torch.lerp(_gray(x), x, saturation).clamp(0, 255)
    return x.round().to(torch.uint8)


def _gray(images: Tensor) -> Tensor:
    """The luma (B, 1, h, w) of images."""
    if images.shape[1] == 1:
        return images
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device)
    return (images * weights.view(3, 1, 1)).sum(dim=1, keepdim=True)


def random_boxes(area: Tensor, ratio: Tensor, size: int) -> Tensor:
    """Draw rectangles at random places, clipped to the image.

    Args:
        area: (B,), as a fraction of the image.
        ratio: (B,), height divided by width.
        size: S, side of the image in pixels.

    Returns:
        (B, 1, S, S), bool, true inside.
    """
    half = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()]) * size / 2  # (2, B): half of height and width
    centre = torch.rand(2, len(area)) * size
    pixel = torch.arange(size) + 0.5
    rows, columns = ((pixel - centre[..., None]).abs() < half[..., None]).unbind()  # (B, S) each
    return (rows[:, :, None] & columns[:, None, :]).unsqueeze(1)


def random_affine(batch: int, config: AugmentConfig) -> Tensor:
    """Draw affine maps from target to source coordinates: a flip, then a rotation, a shift and a crop.

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
    theta = torch.stack([cos * flip, -sin, shift[0], sin * flip, cos, shift[1]], dim=1).view(batch, 2, 3)
    if config.scale < 1:
        sides = random_sides(batch, config)
        theta *= sides[:, :, None]
        theta[:, :, 2] += (2 * torch.rand(batch, 2) - 1) * (1 - sides)  # the position of the crop's centre
    return theta


def random_sides(batch: int, config: AugmentConfig) -> Tensor:
    """Draw the width and height of crops as torchvision's ``RandomResizedCrop`` does, but not in whole pixels.

    The area is uniform, the ratio log-uniform; crops that do not fit into the image are drawn again. See Szegedy et
    al., 2015, https://arxiv.org/abs/1409.4842, section 6.

    Args:
        batch: B, the number of images.
        config: ``scale`` and ``ratio``.

    Returns:
        (B, 2), in (0, 1]: shares of the image's width and height.
    """
    area = torch.empty(10, batch).uniform_(config.scale, 1)
    ratio = torch.empty(10, batch).uniform_(-math.log(config.ratio), math.log(config.ratio)).exp()
    sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=-1)  # (10, B, 2)
    sides = torch.cat([sides, torch.ones(1, batch, 2)])  # the whole image if none of ten crops fits
    first = (sides <= 1).all(dim=-1).int().argmax(dim=0)  # (B,)
    return sides[first, torch.arange(batch)]


def sample(images: Tensor, theta: Tensor, size: int) -> Tensor:
    """Sample every image by an affine map of its own: bilinear, and zero outside the image.

    Args:
        images: (B, C, s, s), float.
        theta: (B, 2, 3), from :func:`random_affine`.
        size: S, in pixels.

    Returns:
        (B, C, S, S), float.
    """
    # A source larger than the target, which occurs only with random crops, is sampled at K × K points per target pixel,
    # whose average acts like an antialiased resize. Even in a crop of the whole image the points are at most 5/4 source
    # pixels apart, so bilinear sampling, which reaches one pixel either way, misses none. Resizing the source first
    # would discard the pixels that small crops consist of.
    K = max(1, math.ceil(images.shape[-1] / size - 1 / 4))
    grid = sampling_grid(theta.to(images.device), size * K)  # (B, 2, KS, KS)
    inside = grid.abs().amax(dim=1, keepdim=True) <= 1  # (B, 1, KS, KS)
    x = F.grid_sample(images, grid.permute(0, 2, 3, 1), mode="bilinear", padding_mode="border", align_corners=False)
    x.mul_(inside)
    return F.avg_pool2d(x, K) if K > 1 else x


def sampling_grid(theta: Tensor, size: int) -> Tensor:
    """Compute the source coordinates of each target pixel, faster on a CPU than ``torch.nn.functional.affine_grid``.

    Args:
        theta: (B, 2, 3), from :func:`random_affine`.
        size: S, in pixels.

    Returns:
        (B, 2, S, S): x and y, in [-1, 1] inside the image.
    """
    centre = (torch.arange(size, device=theta.device) + 0.5) * (2 / size) - 1  # (S,), the centre of each pixel
    by_column = theta[:, :, :1] * centre  # (B, 2, S)
    by_row = theta[:, :, 1:2] * centre + theta[:, :, 2:]
    return by_column[:, :, None, :] + by_row[:, :, :, None]


def centre_crop(images: Tensor) -> Tensor:
    """Crop images (B, C, h, w) to the central square (B, C, s, s), where s = min(h, w)."""
    h, w = images.shape[-2:]
    if not torch.compiler.is_exporting() and h == w:  # an exported graph cannot branch on its input's size
        return images
    side = torch.sym_min(h, w)
    # A slice would tie an exported graph to the layout, and so to the orientation, of the example image.
    pixel = torch.arange(side, device=images.device)
    return images.index_select(-2, pixel + (h - side) // 2).index_select(-1, pixel + (w - side) // 2)


def resize(images: Tensor, size: int) -> Tensor:
    """Resize float images (B, C, h, w) to (B, C, S, S): bilinear, antialiased."""
    if not torch.compiler.is_exporting() and images.shape[-2:] == (size, size):  # an exported graph cannot branch
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


def denormalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Undo the normalisation of images (B, C, S, S), to display them: float, in [0, 1]."""
    return (images * _per_channel(std) + _per_channel(mean)).clamp(0, 1)


def _beta(a: float, batch: int) -> Tensor:
    return torch.distributions.Beta(a, a).sample((batch,)) if a else torch.zeros(batch)


def _per_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)
