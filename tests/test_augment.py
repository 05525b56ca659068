"""The batch transforms, against torchvision's on one image at a time."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF

from vit_lightning.augment import denormalise, eval_transform, random_affine, sampling_grid, train_transform
from vit_lightning.config import AugmentConfig

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
