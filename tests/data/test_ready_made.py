"""Data sets by name: arrays, torchvision's and Hugging Face's, on small local copies; and sources of one's own."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from vit_lightning import register
from vit_lightning.config import DataConfig
from vit_lightning.data.cache import ImageSet
from vit_lightning.data.module import ImageData
from vit_lightning.keys import InputError, key


def opened(tmp_path: Path, **changes) -> ImageData:
    config = DataConfig(**{"cache_dir": str(tmp_path / "cache"), "split": "standard", "batch_size": 2, **changes})
    data = ImageData(config, 8)
    data.setup()
    return data


def pixels(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, *shape), dtype=np.uint8)


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (8, 8, 3), (3, 8, 8)])
def test_arrays_of_an_npz_file(tmp_path, shape):
    arrays = {f"{part}_images": pixels(count, *shape) for part, count in (("train", 6), ("val", 4), ("test", 2))}
    labels = {
        f"{part}_labels": np.arange(len(arrays[f"{part}_images"]))[:, None] % 2 for part in ("train", "val", "test")
    }
    np.savez(tmp_path / "set.npz", **arrays, **labels)
    data = opened(tmp_path, source="npz", root=str(tmp_path / "set.npz"))
    assert [len(data.indices[split]) for split in ("train", "val", "test")] == [6, 4, 2]
    image, label = data.stored("val", torch.tensor([3]))
    expected = arrays["val_images"][3]
    expected = expected if expected.shape[0] == 3 else np.atleast_3d(expected).transpose(2, 0, 1)
    assert np.array_equal(image[0].numpy(), expected)
    assert (label.item(), data.class_names) == (1, ["0", "1"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (dict(images=pixels(3, 8, 8)), "needs the arrays train_images, train_labels"),
        (dict(train_images=pixels(3, 8, 8)), "needs the arrays train_images, train_labels"),
        (dict(train_images=np.zeros((3, 8, 8)), train_labels=np.arange(3)), "must be uint8 of 3 or 4 dimensions"),
        (dict(train_images=pixels(3, 8, 8), train_labels=np.arange(2)), "3 train images have 2 labels"),
        (dict(train_images=pixels(3, 8, 8), train_labels=np.arange(3) - 1), "labels must be from 0 to 1"),
        (None, "cannot be read as an .npz file"),
    ],
)
def test_a_mistaken_npz_file_is_refused(tmp_path, content, message):
    if content is None:
        (tmp_path / "set.npz").write_bytes(b"no archive")
    else:
        np.savez(tmp_path / "set.npz", **content)
    with pytest.raises(InputError, match=message):
        opened(tmp_path, source="npz", root=str(tmp_path / "set.npz"))


def test_a_data_set_of_torchvision(tmp_path, monkeypatch):
    """GTSRB reads folders of pictures of any size; here some that need no download."""
    root = tmp_path / "gtsrb"  # within data.root
    for label in range(3):
        for index in range(4):
            path = root / "GTSRB" / "Training" / f"{label:05}" / f"{index}.ppm"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels(label * 10 + index + 1, 9 + index, 3)).save(path)
    test = root / "GTSRB" / "Final_Test" / "Images"
    test.mkdir(parents=True)
    with (root / "GT-final_test.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["Filename", "ClassId"])
        for index in range(3):
            Image.fromarray(pixels(index + 50, 20, 3)).save(test / f"{index}.ppm")
            writer.writerow([f"{index}.ppm", index])
    monkeypatch.setattr(datasets.GTSRB, "download", lambda self: None)
    data = opened(tmp_path, source="torchvision", name="GTSRB", root=str(tmp_path), val_fraction=0.25)
    assert [len(data.indices[split]) for split in ("train", "val", "test")] == [9, 3, 3]
    assert data.arrays.images["train"].shape[1:] == (3, 8, 8)
    assert data.arrays.labels["test"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", [None, "Nothing", "VisionDataset", "ImageFolder"])
def test_a_name_that_is_no_data_set_of_torchvision(tmp_path, name):
    with pytest.raises(InputError, match=f"data.name={name} is not a classification data set of torchvision"):
        opened(tmp_path, source="torchvision", name=name)


def test_a_directory_that_hugging_face_reads(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for part, count in (("train", 6), ("test", 2)):
        for label in ("cat", "dog"):
            for index in range(count):
                path = tmp_path / "photos" / part / label / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (index, 0, len(label))).save(path)
    data = opened(tmp_path, source="huggingface", name=str(tmp_path / "photos"))
    assert [len(data.indices[split]) for split in ("train", "val", "test")] == [10, 2, 4]
    assert data.class_names == ["cat", "dog"]


@pytest.mark.usefixtures("registries")
def test_a_source_of_ones_own_needs_nothing_but_arrays(tmp_path):
    @register.source("stripes", count=key(6, "Images.", low=1))
    def stripes(config: DataConfig, image_size: int, count: int) -> ImageSet:
        labels = np.arange(count) % 2
        return ImageSet(
            ["dark", "light"], {"train": labels}, {"train": np.repeat(labels, 64).reshape(-1, 8, 8).astype("u1")}
        )

    data, again = (opened(tmp_path, source="stripes", options={"stripes": {"count": 40}}) for _ in range(2))
    assert [len(data.indices[split]) for split in ("train", "val", "test")] == [32, 4, 4]
    assert data.arrays.digest == again.arrays.digest
    assert not (tmp_path / "cache").exists()
