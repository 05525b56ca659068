"""The batch transforms, against torchvision's on one image at a time."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF

from vit_lightning.config import AugmentConfig
from vit_lightning.recipe.augment import (
    centre_crop,
    colour_jitter,
    denormalise,
    eval_transform,
    mix,
    random_affine,
    random_boxes,
    random_crop,
    sampling_grid,
    train_transform,
)

MEAN, STD = torch.tensor([0.5071, 0.4865, 0.4409]), torch.tensor([0.2673, 0.2564, 0.2762])
PLAIN = (torch.zeros(3), torch.ones(3))  # no normalisation: values stay in [0, 1]
STILL = AugmentConfig(rotation=0.0, flip=0.0, shift=0.0)


def photos(batch: int, side: int) -> torch.Tensor:
    """Smooth random colour images with some noise, uint8."""
    coarse = torch.rand(batch, 3, 5, 5)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)
    return (255 * (0.9 * smooth + 0.1 * torch.rand(batch, 3, side, side))).to(torch.uint8)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("source", "target"), [(32, 72), (8, 16), (32, 32), (97, 36), (40, 33)])
def test_eval_transform_is_torchvisions(source, target):
    images = photos(3, source)
    pil = v2.Compose([v2.Resize((target, target)), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    expected = torch.stack([pil(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    plain = eval_transform(images, target, *PLAIN)
    in_floats = TF.resize(images / 255, [target, target], antialias=True)
    torch.testing.assert_close(plain, in_floats, rtol=0, atol=1e-6)
    within = 1 / 255 + 1e-6  # PIL rounds twice, after each axis
    assert (plain - expected).abs().max() <= within
    normalised = v2.functional.normalize(expected, MEAN.tolist(), STD.tolist())
    ours = eval_transform(images, target, MEAN, STD)
    assert ((ours - normalised) * STD.view(3, 1, 1)).abs().max() <= within


@pytest.mark.parametrize(("height", "width"), [(40, 20), (20, 40), (31, 9), (9, 30)])
def test_an_oblong_image_is_cropped_to_its_centre(height, width):
    """As Pillow does, at whole pixels."""
    images, side = photos(3, 40)[:, :, :height, :width].contiguous(), min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    for image, cropped in zip(images, centre_crop(images), strict=True):
        expected = Image.fromarray(image.permute(1, 2, 0).numpy()).crop((left, top, left + side, top + side))
        assert np.array_equal(cropped.permute(1, 2, 0), np.asarray(expected))
    square = images[:, :, top : top + side, left : left + side]
    torch.testing.assert_close(eval_transform(images, 12, MEAN, STD), eval_transform(square, 12, MEAN, STD))
    ours, theirs = (train_transform(x, 12, MEAN, STD, STILL) for x in (images, square))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("source", "target"), [(32, 72), (8, 16), (32, 32), (97, 36)])
def test_training_transform_without_augmentation_is_the_eval_transform(source, target):
    images = photos(3, source)
    ours = train_transform(images, target, MEAN, STD, STILL)
    torch.testing.assert_close(ours, eval_transform(images, target, MEAN, STD), rtol=1e-4, atol=1e-4)


def test_the_sampling_grid_is_torchs_affine_grid():
    theta = random_affine(5, AugmentConfig(rotation=40.0, shift=0.3))
    theirs = torch.nn.functional.affine_grid(theta, [5, 1, 11, 11], align_corners=False)
    torch.testing.assert_close(sampling_grid(theta, 11).permute(0, 2, 3, 1), theirs)


def test_flip_mirrors():
    images = photos(3, 32)
    flipped = train_transform(images, 72, MEAN, STD, AugmentConfig(rotation=0.0, flip=1.0))
    torch.testing.assert_close(flipped, eval_transform(images.flip(-1), 72, MEAN, STD), rtol=1e-4, atol=1e-4)


def test_rotation_is_torchvisions():
    images = photos(16, 32)
    config = AugmentConfig(rotation=30.0, flip=0.0)
    torch.manual_seed(7)
    theta = random_affine(16, config)
    torch.manual_seed(7)
    ours = train_transform(images, 72, *PLAIN, config)
    resized = eval_transform(images, 72, *PLAIN)
    for image, matrix, result in zip(resized, theta, ours, strict=True):
        degrees = math.degrees(math.atan2(matrix[1, 0], matrix[0, 0]))
        expected = TF.rotate(image, degrees, InterpolationMode.BILINEAR, fill=0)
        inner = (slice(None), slice(12, 60), slice(12, 60))  # away from the black corners
        assert (result - expected)[inner].abs().max() < 0.06  # they interpolate twice, we once
        assert (result - expected).abs().mean() < 0.01


def test_corners_that_a_rotation_brings_in_are_black():
    white = torch.full((8, 3, 32, 32), 255, dtype=torch.uint8)
    turned = train_transform(white, 72, MEAN, STD, AugmentConfig(rotation=180.0, flip=0.0))
    seen = denormalise(turned, MEAN, STD)
    oblique = seen[:, 0, 0, 0] < 0.01
    assert oblique.any()
    torch.testing.assert_close(seen[:, :, 36, 36], torch.ones(8, 3))


def test_shift_moves_by_source_pixels():
    images = photos(64, 8)
    config = AugmentConfig(rotation=0.0, flip=0.0, shift=0.125)
    torch.manual_seed(7)
    theta = random_affine(64, config)
    torch.manual_seed(7)
    ours = train_transform(images, 8, *PLAIN, config)
    dx, dy = theta[:, 0, 2] * 4, theta[:, 1, 2] * 4  # in pixels of 8
    assert dx.abs().max() <= 1
    assert dy.abs().max() <= 1
    for image, result, x, y in zip(images / 255, ours, dx, dy, strict=True):
        expected = TF.affine(
            image, 0, [-x.item(), -y.item()], scale=1, shear=[0], interpolation=InterpolationMode.BILINEAR
        )
        torch.testing.assert_close(result[:, 2:6, 2:6], expected[:, 2:6, 2:6], rtol=0, atol=1e-4)


def test_random_crop_is_torchvisions_with_reflected_padding():
    images = photos(500, 9)
    torch.manual_seed(7)
    cropped = random_crop(images, 3)
    torch.manual_seed(7)
    shift = torch.randint(-3, 4, (2, 500, 1))[..., 0]
    padded = TF.pad(images, [3], padding_mode="reflect")
    for image, result, dy, dx in zip(padded, cropped, *shift.tolist(), strict=True):
        assert torch.equal(result, TF.crop(image, 3 + dy, 3 + dx, 9, 9))
    for offsets in shift:
        assert stats.chisquare(torch.bincount(offsets + 3, minlength=7)).pvalue > 0.001
    assert abs(np.corrcoef(shift)[0, 1]) < 0.15


def test_crop_and_flip_take_pixels_as_they_are():
    images = photos(64, 9)
    result = (255 * train_transform(images, 9, *PLAIN, AugmentConfig(crop=2, rotation=0, flip=0.5))).round().byte()
    mirrored = 0
    for image, one in zip(images, result, strict=True):
        inner = one[:, 2:-2, 2:-2]
        windows = TF.pad(image, [0]).unfold(1, 5, 1).unfold(2, 5, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        found = (windows == inner).flatten(1).all(1).any()
        found_mirrored = (windows.flip(-1) == inner).flatten(1).all(1).any()
        assert found or found_mirrored
        mirrored += int(found_mirrored)
    assert 16 < mirrored < 48


def test_erasing_is_a_rectangle_of_torchvisions_sizes():
    images = torch.full((4000, 3, 20, 20), 200, dtype=torch.uint8)
    erased = train_transform(images, 20, MEAN, STD, AugmentConfig(rotation=0, flip=0, erase=0.25))
    hit = (erased == 0).all(dim=1).flatten(1).any(1)
    assert stats.binomtest(int(hit.sum()), 4000, 0.25).pvalue > 0.001
    shares = (erased[hit] == 0).all(dim=1).float().mean(dim=(1, 2))
    assert 0 < shares.min() < 0.03
    assert 0.3 < shares.max() < 0.45


def test_boxes_have_the_area_asked_where_the_image_holds_them():
    area = torch.linspace(0.0, 0.3, 3000)
    boxes = random_boxes(area, torch.full((3000,), 2.0), 50).float()
    rows, columns = boxes.amax(dim=3).sum(dim=(1, 2)), boxes.amax(dim=2).sum(dim=(1, 2))
    torch.testing.assert_close(boxes.sum(dim=(1, 2, 3)), rows * columns)  # full rectangles
    whole = rows >= rows.mul(0) + (area * 2).sqrt() * 50 - 1.001
    whole &= columns >= (area / 2).sqrt() * 50 - 1.001
    assert whole.float().mean() > 0.3
    torch.testing.assert_close(boxes.mean(dim=(1, 2, 3))[whole], area[whole], rtol=0, atol=0.04)
    assert not boxes[0].any()


def test_mixup_blends_neighbours_by_shares_of_their_own():
    images, labels = torch.randn(403, 3, 6, 6), torch.arange(403) % 7
    mixed, targets = mix(images, labels, 7, AugmentConfig(mixup=0.8))
    neighbour = images.roll(1, 0)
    share = ((mixed - images) / (neighbour - images)).median(dim=1).values.median(dim=1).values.median(dim=1).values
    torch.testing.assert_close(mixed, torch.lerp(images, neighbour, share.view(-1, 1, 1, 1)), rtol=1e-3, atol=1e-3)
    assert stats.kstest(share.double().numpy(), stats.beta(0.8, 0.8).cdf).pvalue > 0.001
    torch.testing.assert_close(targets.sum(1), torch.ones(403))
    torch.testing.assert_close(targets[torch.arange(403), labels.roll(1, 0)], share, rtol=1e-3, atol=1e-3)


def test_cutmix_pastes_boxes_and_counts_what_is_pasted():
    images, labels = torch.randn(403, 3, 16, 16), torch.arange(403) % 7
    mixed, targets = mix(images, labels, 7, AugmentConfig(cutmix=1.0))
    pasted = (mixed != images).all(dim=1)
    assert torch.equal(torch.where(pasted[:, None], images.roll(1, 0), images), mixed)
    share = pasted.float().mean(dim=(1, 2))
    torch.testing.assert_close(targets[torch.arange(403), labels.roll(1, 0)], share)
    torch.testing.assert_close(targets[torch.arange(403), labels], 1 - share)
    assert len(share.unique()) > 50


def test_cutmix_boxes_have_the_papers_size():
    """Sides √(1 - λ) of the image's, λ from Beta(α, α), which is uniform for α = 1; seen where no border cuts them."""
    images, labels = torch.randn(4000, 1, 48, 48), torch.zeros(4000, dtype=torch.int64)
    mixed, _ = mix(images, labels, 2, AugmentConfig(cutmix=1.0))
    pasted = (mixed != images)[:, 0]
    rows, columns = pasted.any(dim=2), pasted.any(dim=1)
    whole = ~(rows[:, 0] | rows[:, -1] | columns[:, 0] | columns[:, -1])
    high, wide = rows.sum(1)[whole], columns.sum(1)[whole]
    assert (high - wide).abs().max() <= 1  # square, but for the pixels' grid
    side = np.linspace(0, 48, 200_001)[1:]
    density = np.clip(47 - side, 0, None) ** 2 * side  # of a side whose square is uniform, at places that hold it
    cdf = np.cumsum(density) / density.sum()
    measured = high.double().numpy() + np.random.default_rng(0).uniform(-0.5, 0.5, len(high))
    measured = measured[high.numpy() >= 3]
    low = np.interp(2.5, side, cdf)
    assert len(measured) > 500
    assert stats.kstest(measured, lambda x: (np.interp(x, side, cdf) - low) / (1 - low)).pvalue > 0.001


def test_both_share_the_batch_and_some_images_stay_as_they_are():
    images, labels = torch.randn(4000, 1, 8, 8), torch.arange(4000) % 3
    mixed, targets = mix(images, labels, 3, AugmentConfig(mixup=1.0, cutmix=1.0, mix_prob=0.6))
    changed = (mixed != images).flatten(1).float().mean(1)
    still = int((targets.amax(dim=1) == 1).sum())
    blended = int((changed == 1).sum())
    assert stats.binomtest(blended, 4000, 0.3).pvalue > 1e-4
    assert 0.38 * 4000 < still < 0.5 * 4000  # of the boxes some are empty


def test_every_image_has_parameters_of_its_own_distributed_as_asked():
    config = AugmentConfig(rotation=7.0, flip=0.25, shift=0.1)
    theta = random_affine(20_000, config).double().numpy()
    mirrored = np.linalg.det(theta[:, :, :2]) < 0
    angle = np.degrees(np.arctan2(-theta[:, 0, 1], theta[:, 1, 1]))
    assert stats.binomtest(int(mirrored.sum()), 20_000, 0.25).pvalue > 0.001
    assert stats.kstest(angle, stats.uniform(-7, 14).cdf).pvalue > 0.001
    for shift in (theta[:, 0, 2] / 2, theta[:, 1, 2] / 2):  # an image is 2 wide
        assert stats.kstest(shift, stats.uniform(-0.1, 0.2).cdf).pvalue > 0.001
    for other in (mirrored, theta[:, 0, 2], theta[:, 1, 2]):
        assert abs(np.corrcoef(angle, other)[0, 1]) < 0.03


def test_the_seed_decides():
    images = photos(4, 32)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(train_transform(images, 72, MEAN, STD, AugmentConfig()))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_denormalise_undoes_it():
    images = photos(3, 32)
    torch.testing.assert_close(denormalise(eval_transform(images, 32, MEAN, STD), MEAN, STD), images / 255)


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_change_as_by_torchvision(channels):
    images, factors = photos(20, 9)[:, :channels], 0.3 + 1.5 * torch.rand(3, 20)
    for image, ours, (b, c, s) in zip(images, colour_jitter(images, factors), factors.T.tolist(), strict=True):
        expected = TF.adjust_contrast(TF.adjust_brightness(image, b), c)
        expected = TF.adjust_saturation(expected, s) if channels == 3 else expected
        assert (ours.int() - expected.int()).abs().max() <= 3  # torchvision rounds after each step
    assert torch.equal(colour_jitter(images, torch.ones(3, 20)), images)


def test_jitter_draws_factors_for_each_image():
    images = torch.full((500, 3, 4, 4), 100, dtype=torch.uint8)
    out = train_transform(images, 4, *PLAIN, AugmentConfig(rotation=0.0, flip=0.0, jitter=0.5))[:, 0, 0, 0]
    assert 0.19 < out.min() < 0.22
    assert 0.57 < out.max() < 0.6
    assert abs(out.mean() - 100 / 255) < 0.01
    assert len(out.unique()) > 50
