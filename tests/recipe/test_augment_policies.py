"""The policies of whole batches, against torchvision's classes on one image at a time."""

import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_sample_images
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from vit_lightning.config import AugmentConfig
from vit_lightning.keys import from_python
from vit_lightning.provenance import provenance
from vit_lightning.recipe.augment import train_transform
from vit_lightning.recipe.policies import OPERATIONS, apply_operations, apply_policy, draw_operations, magnitude_bins

THEIRS = {
    "trivial": v2.TrivialAugmentWide(),
    "rand": v2.RandAugment(),
    "auto": v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
}
NAMES = list(OPERATIONS)
PLAIN = (torch.zeros(3), torch.ones(3))  # no normalisation: values stay in [0, 1]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def photographs(side: int) -> torch.Tensor:
    """Two photographs (2, 3, side, side)."""
    images = np.stack(load_sample_images().images)[:, :, 106:533]
    return TF.resize(torch.from_numpy(images).permute(0, 3, 1, 2), [side, side], antialias=True)


def space(policy: str, name: str, side: int) -> list[float]:
    """The magnitudes of an operation, with both signs where torchvision draws one."""
    bins, signed = THEIRS[policy]._AUGMENTATION_SPACE[name]
    magnitudes = bins(10 if policy == "auto" else 31, side, side)
    if magnitudes is None:
        return [0.0]
    return [sign * float(value) for value in magnitudes for sign in ((1, -1) if signed else (1,))]


def by_torchvision(policy: str, name: str, images: torch.Tensor, magnitudes: list[float]) -> torch.Tensor:
    theirs = THEIRS[policy]
    return torch.stack(
        [
            theirs._apply_image_or_video_transform(image, name, magnitude, "nearest", theirs._fill)
            for image, magnitude in zip(images, magnitudes, strict=True)
        ]
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("policy", "side"), [("trivial", 32), ("rand", 32), ("auto", 32), ("trivial", 45)])
def test_every_operation_is_torchvisions_at_every_magnitude(policy, side, channels):
    images = photographs(side)[:, :channels]
    for position, name in enumerate(NAMES):
        if name not in THEIRS[policy]._AUGMENTATION_SPACE:
            assert (policy, name) in (("auto", "Identity"), ("trivial", "Invert"), ("rand", "Invert"))
            continue
        magnitudes = space(policy, name, side)
        assert magnitude_bins(policy, side)[position].tolist()[: len(magnitudes)] == [
            abs(magnitude) for magnitude in magnitudes[:: 2 if min(magnitudes) < 0 else 1]
        ]
        several = images.repeat_interleave(len(magnitudes), dim=0)
        ours = apply_operations(several, torch.full((len(several),), position), torch.tensor(magnitudes * 2))
        expected = by_torchvision(policy, name, several, magnitudes * 2)
        assert torch.equal(ours, expected), name


@pytest.mark.parametrize("policy", ["rand", "auto"])
def test_geometry_differs_from_torchvisions_only_where_two_pixels_are_equally_near(policy):
    images = photographs(48)
    for name in ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"):
        magnitudes = space(policy, name, 48)
        several = images.repeat_interleave(len(magnitudes), dim=0)
        ours = apply_operations(several, torch.full((len(several),), NAMES.index(name)), torch.tensor(magnitudes * 2))
        different = ours != by_torchvision(policy, name, several, magnitudes * 2)
        assert different.float().mean() < 0.005, name


def test_operations_of_a_batch_reach_their_images():
    operations = torch.randint(len(NAMES), (60,))
    strengths = {"TranslateX": 5.0, "TranslateY": -4.0, "Rotate": 20.0, "Posterize": 3.0, "Solarize": 0.5}
    magnitudes = torch.tensor([strengths.get(name, 0.25) for name in NAMES])[operations]
    images = photographs(32).repeat(30, 1, 1, 1)
    images = images + torch.arange(60, dtype=torch.uint8).view(-1, 1, 1, 1)
    for image, result, operation, magnitude in zip(
        images, apply_operations(images, operations, magnitudes), operations.tolist(), magnitudes.tolist(), strict=True
    ):
        assert torch.equal(result[None], by_torchvision("auto", NAMES[operation], image[None], [magnitude]))


@pytest.mark.parametrize("policy", ["trivial", "rand"])
def test_operations_magnitudes_and_signs_are_drawn_uniformly(policy):
    config, side, n = AugmentConfig(policy=policy, magnitude=21), 32, 50_000
    operations, magnitudes = draw_operations(n, side, config)
    assert len(operations) == (1 if policy == "trivial" else THEIRS[policy].num_ops)
    names = list(THEIRS[policy]._AUGMENTATION_SPACE)
    for operation, magnitude in zip(operations, magnitudes, strict=True):
        assert stats.chisquare(torch.bincount(operation, minlength=len(names))).pvalue > 0.001
        for name in names:
            drawn = magnitude[operation == NAMES.index(name)].tolist()
            values = space(policy, name, side)
            if policy == "rand" and len(values) > 1:
                signs = len(values) // 31
                values = values[21 * signs : 22 * signs]
            wanted = {value: values.count(value) / len(values) for value in values}  # several bins of bits are equal
            assert set(drawn) <= set(wanted), name
            counts = [drawn.count(value) for value in wanted]
            assert (
                len(wanted) == 1
                or stats.chisquare(counts, [len(drawn) * share for share in wanted.values()]).pvalue > 1e-4
            ), name
    if len(operations) == 2:
        both = torch.bincount(operations[0] * len(names) + operations[1], minlength=len(names) ** 2)
        assert stats.chisquare(both).pvalue > 0.001


def test_autoaugment_draws_the_pairs_of_its_table():
    theirs, n = THEIRS["auto"], 50_000
    expected: dict[tuple[tuple[str, float], ...], float] = {}
    for pair in theirs._policies:
        steps = []
        for name, probability, level in pair:
            bins, signed = theirs._AUGMENTATION_SPACE[name]
            value = 0.0 if level is None else float(bins(10, 32, 32)[level])
            values = [value, -value] if signed and value else [value]
            steps.append([(None, 1 - probability), *(((name, v), probability / len(values)) for v in values)])
        for (first, p), (second, q) in itertools.product(*steps):
            expected[first, second] = expected.get((first, second), 0) + p * q / len(theirs._policies)
    operations, magnitudes = draw_operations(n, 32, AugmentConfig(policy="auto"))
    counts = dict.fromkeys(expected, 0)
    for pair, values in zip(operations.T.tolist(), magnitudes.T.tolist(), strict=True):
        drawn = zip(pair, values, strict=True)
        counts[tuple((NAMES[operation], abs(v) if v == 0 else v) if operation else None for operation, v in drawn)] += 1
    assert set(counts) == set(expected)  # nothing else was drawn
    likely = [drawn for drawn, share in expected.items() if share * n > 5]
    impossible = [drawn for drawn, share in expected.items() if share == 0]
    assert not any(counts[drawn] for drawn in impossible)
    observed, wanted = np.array([(counts[drawn], n * expected[drawn]) for drawn in likely]).T
    assert stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 0.001


@pytest.mark.parametrize("policy", ["trivial", "rand", "auto"])
def test_the_results_are_distributed_as_torchvisions(policy):
    image = photographs(24)[:1]
    ours = apply_policy(image.expand(1500, -1, -1, -1), AugmentConfig(policy=policy))
    theirs = torch.stack([THEIRS[policy](image[0]) for _ in range(1500)])
    for moment in (
        lambda x: x.mean(dim=(1, 2, 3)),
        lambda x: x.std(dim=(1, 2, 3)),
        lambda x: x.std(dim=1).mean(dim=(1, 2)),  # how colourful it is
        lambda x: (x - image).abs().mean(dim=(1, 2, 3)),
        lambda x: x.diff(dim=-1).abs().mean(dim=(1, 2, 3)),  # how sharp it is
    ):
        assert stats.ks_2samp(moment(ours.float()).numpy(), moment(theirs.float()).numpy()).pvalue > 0.001


@pytest.mark.parametrize("policy", ["trivial", "rand", "auto"])
def test_the_number_of_kernels_does_not_depend_on_the_batch(policy):
    class Calls(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += 1
            return function(*args, **kwargs or {})

    counts = []
    for batch in (1000, 4000):  # all operations occur in both
        with Calls() as calls:
            apply_policy(torch.zeros(batch, 3, 4, 4, dtype=torch.uint8), AugmentConfig(policy=policy))
        counts.append(calls.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("policy", ["trivial", "rand", "auto"])
def test_a_policy_treats_every_image_differently_and_the_seed_decides(policy):
    images = photographs(16)[:1].expand(40, -1, -1, -1)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(train_transform(images, 16, *PLAIN, AugmentConfig(policy=policy, rotation=0, flip=0)))
    assert torch.equal(*results)
    assert len({tuple(result.flatten().tolist()) for result in results[0]}) > 12  # AutoAugment leaves some as they are


def test_a_policy_changes_a_share_of_the_images():
    config = AugmentConfig(policy="rand", policy_prob=0.3, magnitude=20)
    images = photographs(12).repeat(500, 1, 1, 1)
    changed = (apply_policy(images, config) != images).flatten(1).any(dim=1).float().mean()
    always = (apply_policy(images, AugmentConfig(policy="rand", magnitude=20)) != images).flatten(1).any(dim=1)
    assert abs(changed - 0.3 * always.float().mean()) < 0.05


@pytest.mark.parametrize("side", [1, 2, 3])
def test_tiny_images_are_no_special_case(side):
    images = photographs(32)[:, :, :side, :side].repeat(100, 1, 1, 1)
    for policy in THEIRS:
        assert apply_policy(images, AugmentConfig(policy=policy)).shape == images.shape


def measure(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds for 250 images of 32 × 32 on one thread, ours and torchvision's image by image, in turn."""
    torch.set_num_threads(1)
    images = photographs(32).repeat(125, 1, 1, 1)
    seconds: dict[str, dict[str, list[float]]] = {name: {"ours": [], "torchvision": []} for name in THEIRS}
    for _, (name, policy) in itertools.product(range(rounds), THEIRS.items()):
        for whose, transform in (
            ("ours", lambda batch, name=name: apply_policy(batch, AugmentConfig(policy=name))),
            ("torchvision", lambda batch, policy=policy: torch.stack([policy(image) for image in batch])),
        ):
            start = time.perf_counter()
            transform(images)
            seconds[name][whose].append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    home = Path(sys.argv[1])
    home.mkdir(parents=True, exist_ok=True)
    seconds = measure(20)
    (home / "policies.json").write_text(json.dumps({**provenance(from_python()), "seconds": seconds}, indent=2) + "\n")
    for name, times in seconds.items():
        ours, theirs = sorted(times["ours"])[10], sorted(times["torchvision"])[10]
        print(f"{name}: ours {1000 * ours:.1f} ms, torchvision {1000 * theirs:.1f} ms, {theirs / ours:.1f} times")
