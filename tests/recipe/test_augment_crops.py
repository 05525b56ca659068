"""Random resized crops, against torchvision's ``RandomResizedCrop`` and ``resized_crop``."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_sample_images
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF

from vit_lightning.config import AugmentConfig
from vit_lightning.recipe.augment import random_affine, random_sides, sample, train_transform

PLAIN = (torch.zeros(3), torch.ones(3))  # no normalisation: values stay in [0, 1]
CROPS = [(0.08, 4 / 3), (0.35, 1.333), (0.9, 3.0), (0.5, 1.0)]  # most of the third kind do not fit


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def photographs(side: int) -> torch.Tensor:
    """Two photographs (2, 3, side, side), uint8."""
    images = np.stack(load_sample_images().images)[:, :, 106:533]
    return TF.resize(torch.from_numpy(images).permute(0, 3, 1, 2), [side, side], antialias=True)


def affine(top: int, left: int, height: int, width: int, side: int) -> torch.Tensor:
    """The map from a target to a crop of whole pixels, for two images."""
    rows = [[width, 0, 2 * left + width - side], [0, height, 2 * top + height - side]]
    return torch.tensor([rows, rows]) / side


@pytest.mark.parametrize(("side", "box"), [(48, (3, 5, 23, 31)), (48, (0, 0, 48, 40)), (128, (60, 20, 68, 100))])
def test_a_crop_up_to_the_networks_size_is_torchvisions(side, box):
    """But at its border, where torchvision does not see the pixels around the crop."""
    images = photographs(side) / 255
    expected = TF.resized_crop(images, *box, [104, 104], antialias=True)
    ours = sample(images, affine(*box, side), 104)
    torch.testing.assert_close(ours[..., 4:-4, 4:-4], expected[..., 4:-4, 4:-4], rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [16, 24, 48, 80, 112, 120])
def test_larger_crops_average_over_the_pixels_of_the_source(size):
    """Within 4 of 255 levels on average: a box and a triangle weigh the pixels, as torchvision's triangle does."""
    images = photographs(128) / 255
    for height, width in ((128, 128), (128, 97), (85, 111), (61, 61), (45, 38)):
        box = (128 - height) // 2, (128 - width) // 3, height, width
        expected = TF.resized_crop(images, *box, [size, size], antialias=True)
        error = (sample(images, affine(*box, 128), size) - expected).abs().mean()
        assert error < 4 / 255, box
        if min(height, width) > 2 * size:
            plain = TF.resized_crop(images, *box, [size, size], antialias=False)
            assert error < 0.6 * (plain - expected).abs().mean(), box


def test_stripes_of_one_pixel_turn_gray():
    stripes = (torch.arange(128) % 2).float().expand(2, 3, 128, -1)
    gray = sample(stripes, affine(0, 0, 128, 128, 128), 32)
    torch.testing.assert_close(gray, torch.full_like(gray, 0.5), rtol=0, atol=0.02)


@pytest.mark.parametrize(("scale", "ratio"), CROPS)
def test_area_and_ratio_are_distributed_as_torchvisions(scale, ratio):
    theirs = v2.RandomResizedCrop(8, scale=(scale, 1.0), ratio=(1 / ratio, ratio))
    image = torch.empty(1, 10_000, 10_000, device="meta")
    params = [theirs.make_params([image]) for _ in range(3000)]
    expected = np.array([(p["width"] / 10_000, p["height"] / 10_000) for p in params])
    sides = random_sides(3000, AugmentConfig(scale=scale, ratio=ratio)).double().numpy()
    assert 0 < sides.min() <= sides.max() <= 1
    for measure in (lambda wh: wh[:, 0] * wh[:, 1], lambda wh: wh[:, 0] / wh[:, 1], lambda wh: wh[:, 0]):
        ours, other = (measure(wh).round(3) for wh in (sides, expected))
        assert stats.ks_2samp(ours, other).pvalue > 0.001


def test_every_place_inside_the_image_is_equally_likely():
    theta = random_affine(5000, AugmentConfig(rotation=0.0, flip=0.0, scale=0.2)).double()
    sides, centre = torch.stack([theta[:, 0, 0], theta[:, 1, 1]], dim=1), theta[:, :, 2]
    place = (centre / (1 - sides))[(sides < 0.99).all(dim=1)]
    for axis in place.T:
        assert stats.kstest(axis.numpy(), stats.uniform(-1, 2).cdf).pvalue > 0.001
    assert abs(np.corrcoef(place.T)[0, 1]) < 0.06


def test_a_crop_is_flipped_and_rotated_as_a_whole():
    """Torchvision crops whole pixels and interpolates twice; a photograph of 400 pixels makes that a small matter."""
    images = (photographs(400) / 255)[:1].expand(12, -1, -1, -1)
    theta = random_affine(12, AugmentConfig(rotation=25.0, flip=0.5, scale=0.2))
    width, height = theta[:, :, :2].norm(dim=2).T * 400
    flipped = theta[:, :, :2].det() < 0
    assert flipped.unique().tolist() == [False, True]
    for i, result in enumerate(sample(images, theta, 40)):
        w, h = width[i].item(), height[i].item()
        left, top = ((theta[i, axis, 2].item() + 1) * 200 - length / 2 for axis, length in enumerate((w, h)))
        crop = TF.resized_crop(images[i], round(top), round(left), round(h), round(w), [40, 40], antialias=True)
        degrees = math.degrees(math.atan2(-theta[i, 0, 1] / w, theta[i, 1, 1] / h))
        expected = TF.rotate(crop, degrees, InterpolationMode.BILINEAR)
        expected = expected.flip(-1) if flipped[i] else expected
        inner = (slice(None), slice(8, 32), slice(8, 32))  # away from the corners, which torchvision makes black
        assert (result - expected)[inner].abs().mean() < 0.04


def test_crops_keep_inside_the_image_and_corners_show_what_is_around_them():
    white = torch.full((200, 3, 40, 40), 255, dtype=torch.uint8)
    config = {"scale": 0.1, "flip": 0.5, "rotation": 0.0}
    assert (train_transform(white, 32, *PLAIN, AugmentConfig(**config)) > 0.999).all()
    turned = train_transform(white, 32, *PLAIN, AugmentConfig(**config | {"rotation": 20.0}))
    whole = train_transform(white, 32, *PLAIN, AugmentConfig(rotation=20.0))
    assert (turned < 0.5).float().mean() < 0.3 * (whole < 0.5).float().mean()


@pytest.mark.parametrize(("source", "target"), [(32, 72), (64, 32), (40, 40), (97, 32)])
def test_images_of_every_size_are_cropped_along_with_all_else(source, target):
    config = AugmentConfig(scale=0.3, crop=2, policy="trivial", jitter=0.2, shift=0.1, erase=0.2)
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results.append(train_transform(photographs(source), target, *PLAIN, config))
    assert torch.equal(*results)
    assert results[0].shape == (2, 3, target, target)
