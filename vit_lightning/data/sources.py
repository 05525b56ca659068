"""The data sources. Each returns its images, or how to read them into the cache; register your own the same way."""

import hashlib
import inspect
import pickle
import zipfile
import zlib
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torchvision
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision import datasets

from vit_lightning import register
from vit_lightning.config import DataConfig
from vit_lightning.data import folder, stream
from vit_lightning.data.cache import PARTS, ImageArrays, ImageSet, Source, in_memory, open_source
from vit_lightning.data.images import UNREADABLE, fingerprint, to_array, unreadable
from vit_lightning.keys import InputError
from vit_lightning.terminal import with_bar

__all__ = ["folder", "load_arrays", "stream"]  # importing folder and stream registers their sources


def load_arrays(config: DataConfig, image_size: int) -> ImageArrays:
    """Open the images of a source.

    Args:
        config: names the source and its directories.
        image_size: side in pixels at which images of differing sizes are kept, unless ``config.stored_size`` is set.

    Raises:
        InputError: if the source is missing, cannot be downloaded, or is unsuitable for training.
    """
    made = register.source.build(config.source, config.options, config, image_size)
    if isinstance(made, ImageArrays):
        return made
    return open_source(made, config, image_size) if isinstance(made, Source) else in_memory(made)


@register.source("cifar10")
@register.source("cifar100")
def cifar(config: DataConfig, image_size: int) -> Source:
    """CIFAR-10 or CIFAR-100 (Krizhevsky, 2009) from torchvision, which downloads, verifies and keeps the archive.

    Images are sorted by class, then by name, as in a folder of them, so that both give the same splits.
    """
    name, root = config.source, Path(config.root).expanduser()
    kind: type[datasets.CIFAR10] = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    place = root / kind.base_folder
    names = [file for file, _ in [*kind.train_list, *kind.test_list]] + [kind.meta["filename"]]

    def decode() -> ImageSet:
        try:
            sets = {part: kind(str(root), train=part == "train", download=True) for part in ("train", "test")}
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"data={name}: {place} has no valid copy, and {kind.url} cannot be downloaded "
                f"({' '.join(str(error).split())}); put that archive at {root / kind.filename}, "
                "or train on data=digits, which needs no download (experiment=quickstart)"
            ) from error
        order = {}
        for part, data in sets.items():
            files = kind.train_list if part == "train" else kind.test_list
            batches = [_unpickle(place / file, md5) for file, md5 in files]  # torchvision does not return file names
            order[part] = np.lexsort((list(chain.from_iterable(b["filenames"] for b in batches)), data.targets))
        return ImageSet(
            class_names=sets["train"].classes,
            labels={part: np.array(data.targets)[order[part]] for part, data in sets.items()},
            images={part: data.data.transpose(0, 3, 1, 2)[order[part]] for part, data in sets.items()},
        )

    return Source(lambda: fingerprint(root, [place / file for file in names]) + " by name", decode)


def _unpickle(path: Path, md5: str) -> Any:
    """Load a pickle after verifying its checksum, because any other pickle could run code."""
    content = path.read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise InputError(f"{path} was changed while it was read; delete it and start again")
    return pickle.loads(content, encoding="latin1")


@register.source("digits")
def digits(config: DataConfig, image_size: int) -> Source:
    """The 1,797 handwritten digits, 8 × 8, grayscale (Alpaydin and Kaynak, 1998), included in scikit-learn.

    They have no test set, so a fifth of each class, drawn with a fixed seed, serves as one.
    """

    def decode() -> ImageSet:
        data = load_digits()
        images = np.rint(data.images * (255 / 16)).astype(np.uint8)
        x_train, x_test, y_train, y_test = train_test_split(
            images, data.target, test_size=0.2, random_state=42, stratify=data.target
        )
        return ImageSet(
            class_names=[str(name) for name in data.target_names],
            labels={"train": y_train, "test": y_test},
            images={"train": x_train, "test": x_test},
        )

    return Source(lambda: sklearn.__version__, decode)


@register.source("npz")
def npz(config: DataConfig, image_size: int) -> ImageSet:
    """Arrays of a ``.npz`` file, ``data.root``, named as in MedMNIST: ``train_images``, ``train_labels``, ``val_…``.

    With ``images`` and ``labels`` alone, validation and test images are held out of them. Images are uint8, (n, height,
    width) or (n, height, width, channels). ``class_names`` may name the classes.
    """
    path = Path(config.root).expanduser()
    try:
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as file:  # rejects a file of a single array
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"data.root={config.root} cannot be read as an .npz file ({error})") from error
    prefixes = {part: f"{part}_" for part in PARTS if f"{part}_images" in arrays} or {"train": ""}
    for name in [f"{prefix}{kind}" for prefix in prefixes.values() for kind in ("images", "labels")]:
        if name not in arrays:
            names = "train_images, train_labels and so on, or images and labels"
            raise InputError(f"data.root={config.root} needs the arrays {names}; it lacks {name}")
    labels = {part: arrays[f"{prefix}labels"] for part, prefix in prefixes.items()}
    for part, values in labels.items():
        if not values.size or values.size != len(values) or values.dtype.kind not in "iub":
            raise InputError(
                f"data.root={config.root}: {prefixes[part]}labels must be one whole number per image, "
                f"not {values.dtype} of shape {values.shape}"
            )
    images = {part: arrays[f"{prefix}images"] for part, prefix in prefixes.items()}
    return ImageSet(
        class_names(labels, arrays.get("class_names")), {p: v.reshape(-1) for p, v in labels.items()}, images
    )


def class_names(labels: dict[str, np.ndarray], names: Iterable[Any] | None) -> list[str]:
    """The names of the classes, or else their numbers; of several names for one class, the first."""
    if names is not None:
        return [str(name[0] if isinstance(name, tuple) else name) for name in names]
    return [str(number) for number in range(1 + max(int(values.max()) for values in labels.values()))]


def taken(argument: str, train: Any, val: Any = None, test: Any = None, **others: Any) -> dict[str, dict[str, Any]]:
    """The arguments for each part of a torchvision data set; ``argument`` is the one that selects the part."""
    values = {"train": train, "val": val, "test": test}
    return {part: {argument: value, **others} for part, value in values.items() if value is not None}


TORCHVISION: dict[str, dict[str, dict[str, Any]]] = {  # classification data sets, and each part's arguments
    name: parts
    for names, parts in (
        ("CIFAR10 CIFAR100 FashionMNIST KMNIST MNIST QMNIST USPS", taken("train", True, test=False)),
        ("EMNIST", taken("train", True, test=False, split="balanced")),
        ("Caltech101 Caltech256 EuroSAT SEMEION SUN397", taken("download", True)),  # these have one part
        ("FER2013 Food101 GTSRB STL10 SVHN StanfordCars", taken("split", "train", test="test")),
        ("DTD FGVCAircraft Flowers102 PCAM RenderedSST2", taken("split", "train", "val", "test")),
        ("CLEVRClassification ImageNet Imagenette", taken("split", "train", "val")),
        ("Country211", taken("split", "train", "valid", "test")),
        ("OxfordIIITPet", taken("split", "trainval", test="test")),
        ("Places365", taken("split", "train-standard", "val")),
    )
    for name in names.split()
}


@register.source("torchvision")
def of_torchvision(config: DataConfig, image_size: int) -> Source:
    """A torchvision classification data set by the name of its class (``data.name=Flowers102``); downloaded once."""
    if config.name not in TORCHVISION:
        raise InputError(
            f"data.name={config.name} is not a classification data set of torchvision; choose one of "
            + ", ".join(sorted(TORCHVISION))
        )

    def decode() -> ImageSet:
        assert config.name is not None
        try:
            sets = {part: torchvision_part(config, takes) for part, takes in TORCHVISION[config.name].items()}
        except (OSError, RuntimeError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"data.name={config.name} cannot be read or downloaded ({reason})") from error
        labels = {part: labels_of(data) for part, data in sets.items()}
        names = getattr(sets["train"], "classes", getattr(sets["train"], "categories", None))
        return pictures(labels, {part: (data, 0) for part, data in sets.items()}, config, image_size, names)

    return Source(lambda: f"{config.name} {torchvision.__version__}", decode)


def torchvision_part(config: DataConfig, takes: dict[str, Any]) -> Any:
    """Open a part of a torchvision data set, and download it if torchvision can."""
    kind = getattr(datasets, config.name or "")
    known = inspect.signature(kind).parameters
    download = {"download": True} if {"download", "kwargs"} & known.keys() and kind is not datasets.ImageNet else {}
    return kind(str(Path(config.root).expanduser()), **takes | download)


def labels_of(data: Any) -> np.ndarray:
    """The labels of a torchvision data set; its images are decoded only if it does not list the labels."""
    for name in ("targets", "_labels", "labels", "y"):
        labels = np.asarray(getattr(data, name, None))
        if labels.ndim == 1:
            return labels
    return np.array([label for _, label in getattr(data, "_samples", data)])


@register.source("huggingface")
def of_huggingface(config: DataConfig, image_size: int) -> Source:
    """A data set of the Hugging Face Hub by its name (``data.name=cifar100``), or a directory of such a data set."""
    try:
        import datasets as hub
    except ImportError as error:
        raise InputError("data.source=huggingface needs datasets: pip install datasets") from error
    if not config.name:
        raise InputError("data.source=huggingface needs data.name, the name of a data set or a directory")
    try:
        loaded = hub.load_dataset(config.name)
    except Exception as error:  # the library raises many types
        [reason, *_] = str(error).splitlines() or [""]
        raise InputError(f"data.name={config.name} cannot be loaded ({type(error).__name__}: {reason})") from error
    parts = {"train": ("train",), "val": ("validation", "val", "dev"), "test": ("test",)}
    sets = {part: loaded[name] for part, names in parts.items() for name in names if name in loaded}
    if not sets:
        raise InputError(f"data.name={config.name} has none of the splits train, validation and test")
    features = next(iter(sets.values())).features
    image = next((name for name, kind in features.items() if isinstance(kind, hub.Image)), None)
    label = next((name for name, kind in features.items() if isinstance(kind, hub.ClassLabel)), None)
    if image is None or label is None:
        raise InputError(f"data.name={config.name} needs a column of images and one of class labels")

    def decode() -> ImageSet:
        labels = {
            part: np.array([-1 if value is None else value for value in data[label]]) for part, data in sets.items()
        }
        known = {
            part: values for part, values in labels.items() if (values >= 0).any()
        }  # a test set's labels may be secret (-1)
        if not known:
            raise InputError(f"data.name={config.name} has no labels in its column {label}")
        images = {part: (sets[part], image) for part in known}
        return pictures(known, images, config, image_size, features[label].names)

    return Source(lambda: " ".join(data._fingerprint for data in sets.values()), decode)


def pictures(
    labels: dict[str, np.ndarray],
    sets: dict[str, tuple[Any, Any]],
    config: DataConfig,
    image_size: int,
    names: list[Any] | None,
) -> ImageSet:
    """Convert labels and Pillow images, by part, at ``data.stored_size`` or else at the network's size.

    Args:
        labels: by part, (number of images,).
        sets: by part, a data set and the index or key of the image in its items.
        config: gives the name of the data set, and the size.
        image_size: the network's image size.
        names: names of the classes; ``None`` for their numbers.
    """
    side = config.stored_size or image_size

    def read(part: str, number: int) -> np.ndarray | InputError:
        data, place = sets[part]
        try:
            return to_array(data[number][place], side)
        except UNREADABLE as error:
            return unreadable(f"data.name={config.name}: {part} image {number}", error)

    def read_all(part: str) -> Iterable[np.ndarray | InputError]:
        count = len(labels[part])
        return with_bar((read(part, number) for number in range(count)), f"Reading {part} images", count)

    return ImageSet(
        class_names=class_names(labels, names),
        labels=labels,
        images={part: read_all(part) for part in sets},
        shape=(3, side, side),
        fits_any_size=config.stored_size is not None,
    )
