"""Data sets by name: arrays, torchvision's and Hugging Face's, on small local copies; and sources of one's own."""

import csv
import urllib.request
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from vit_lightning import register
from vit_lightning.config import DataConfig
from vit_lightning.data import cache
from vit_lightning.data.cache import ImageSet
from vit_lightning.data.module import ImageData
from vit_lightning.data.sources import TORCHVISION
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


def test_arrays_of_one_part_are_split(tmp_path):
    np.savez(tmp_path / "set.npz", images=pixels(40, 8, 8), labels=np.arange(40) % 2, class_names=["cat", "dog"])
    data = opened(tmp_path, source="npz", root=str(tmp_path / "set.npz"))
    assert [len(data.indices[split]) for split in ("train", "val", "test")] == [32, 4, 4]
    assert data.class_names == ["cat", "dog"]


def test_one_array_is_no_npz_file(tmp_path):
    with (tmp_path / "set.npz").open("wb") as file:
        np.save(file, pixels(3, 8, 8))
    with pytest.raises(InputError, match=r"cannot be read as an \.npz file"):
        opened(tmp_path, source="npz", root=str(tmp_path / "set.npz"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (dict(images=pixels(3, 8, 8)), "images and labels; it lacks labels"),
        (dict(train_images=pixels(3, 8, 8)), "needs the arrays train_images, .*; it lacks train_labels"),
        (dict(other=pixels(3, 8, 8)), "needs the arrays train_images, .*; it lacks images"),
        (dict(train_images=pixels(3, 8, 8), train_labels=np.array(["0", "1", "0"])), "train_labels must be one whole"),
        (dict(train_images=pixels(3, 8, 8), train_labels=np.array([0.5, 1, 0])), "must be one .*, not float64"),
        (dict(train_images=pixels(3, 8, 8), train_labels=np.eye(3, 2, dtype=int)), r"of shape \(3, 2\)"),
        (dict(train_images=pixels(0, 8, 8), train_labels=np.arange(0)), r"of shape \(0,\)"),
        (
            dict(
                train_images=pixels(2, 8, 8), train_labels=np.arange(2), val_images=pixels(2, 9, 9), val_labels=[0, 1]
            ),
            "images of all parts must have one shape",
        ),
        (dict(train_images=np.zeros((3, 8, 8)), train_labels=np.arange(3)), "must be uint8 of 3 or 4 dimensions"),
        (dict(train_images=pixels(3, 8, 8), train_labels=np.arange(2)), "3 train images have 2 labels"),
        (dict(train_images=pixels(3, 8, 8), train_labels=np.arange(3) - 1), "labels must be from 0 to 1"),
        (b"no archive", "cannot be read as an .npz file"),
        (b"PK\x03\x04 cut short", "cannot be read as an .npz file"),
        (b"", "cannot be read as an .npz file"),
    ],
)
def test_a_mistaken_npz_file_is_refused(tmp_path, content, message):
    if isinstance(content, bytes):
        (tmp_path / "set.npz").write_bytes(content)
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


def write_pets(root: Path) -> None:
    """Oxford-IIIT Pet, whose training images are called trainval."""
    for folder in ("images", "annotations"):
        (root / "oxford-iiit-pet" / folder).mkdir(parents=True)
    for split, count in (("trainval", 20), ("test", 3)):
        rows = []
        for number in range(count):
            name = f"{['cat', 'great_dog'][number % 2]}_{split}{number}"
            Image.fromarray(pixels(9, 12, 3)).save(root / "oxford-iiit-pet" / "images" / f"{name}.jpg")
            rows.append(f"{name} {number % 2 + 1} 1 1")
        (root / "oxford-iiit-pet" / "annotations" / f"{split}.txt").write_text("\n".join(rows))


def test_parts_are_found_whatever_torchvision_calls_them(tmp_path, monkeypatch):
    write_pets(tmp_path)
    monkeypatch.setattr(datasets.OxfordIIITPet, "_download", lambda self: None)
    data = opened(tmp_path, source="torchvision", name="OxfordIIITPet", root=str(tmp_path))
    assert [len(data.indices[split]) for split in ("train", "val", "test")] == [18, 2, 3]
    assert data.class_names == ["Cat", "Great Dog"]
    assert data.arrays.labels["test"].tolist() == [0, 1, 0]


def test_an_image_of_torchvision_that_cannot_be_read_is_named_or_left_out(tmp_path, monkeypatch):
    write_pets(tmp_path)
    monkeypatch.setattr(datasets.OxfordIIITPet, "_download", lambda self: None)
    (tmp_path / "oxford-iiit-pet" / "images" / "great_dog_test1.jpg").write_bytes(b"-")
    options = dict(source="torchvision", name="OxfordIIITPet", root=str(tmp_path))
    with pytest.raises(InputError, match=r"^data.name=OxfordIIITPet: test image 1 cannot be read \(not an image\)"):
        opened(tmp_path, **options)
    assert opened(tmp_path, **options, skip_unreadable=True).arrays.labels["test"].tolist() == [0, 0]


@pytest.mark.parametrize("name", sorted(TORCHVISION))
def test_each_data_set_of_torchvision_takes_its_arguments(tmp_path, monkeypatch, name):
    """Each begins its downloads, or says where to get it, once its arguments are checked."""

    def refuse(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    for part in TORCHVISION[name]:
        monkeypatch.setitem(TORCHVISION, name, {part: TORCHVISION[name][part]})
        with pytest.raises(InputError, match=f"data.name={name} cannot be read or downloaded") as error:
            opened(tmp_path, source="torchvision", name=name, root=str(tmp_path / "root"))
        assert "Unknown value" not in str(error.value)
        monkeypatch.undo()
        monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.mark.parametrize("name", [None, "Nothing", "VisionDataset", "ImageFolder", "VOCDetection"])
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


def test_test_labels_that_are_secret_leave_the_test_images_out(tmp_path, monkeypatch):
    hub = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    kinds = hub.Features(photo=hub.Image(), kind=hub.ClassLabel(names=["cat", "dog"]))
    for part, labels in (("train", [0, 1] * 20), ("test", [-1, -1])):
        photos = [Image.new("L", (8, 8), number) for number in range(len(labels))]
        (tmp_path / "rows").mkdir(exist_ok=True)
        hub.Dataset.from_dict(dict(photo=photos, kind=labels), kinds).to_parquet(tmp_path / "rows" / f"{part}.parquet")
    data = opened(tmp_path, source="huggingface", name=str(tmp_path / "rows"))
    assert [len(data.indices[split]) for split in ("train", "val", "test")] == [32, 4, 4]


def test_a_source_whose_images_do_not_fit_its_shape_or_labels_is_refused(tmp_path):
    def write(**changes) -> None:
        content = dict(class_names=["a", "b"], labels={"train": np.array([0, 1])}, shape=(3, 8, 8))
        cache.write_cache(tmp_path / "cache", "", ImageSet(**{**content, **changes}))

    with pytest.raises(InputError, match=r"a train image is uint8 of shape \(8, 8\), not uint8 of \(3, 8, 8\)"):
        write(images={"train": iter([pixels(3, 8, 8), pixels(8, 8)])})
    with pytest.raises(InputError, match="1 train images have 2 labels"):
        write(images={"train": iter([pixels(3, 8, 8)])})
    with pytest.raises(InputError, match="the training images are of only one class; a classifier needs at least two"):
        write(images={"train": iter([pixels(3, 8, 8)] * 2)}, class_names=["a"], labels={"train": np.array([0, 0])})
    with pytest.raises(InputError, match="the train labels must be from 0 to 0"):
        write(images={"train": iter([pixels(3, 8, 8)] * 2)}, class_names=["a"])


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
