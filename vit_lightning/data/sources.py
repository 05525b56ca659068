"""The data sources. Each returns its images, or how to read them into the cache; your own are registered likewise."""

import hashlib
import inspect
import pickle
from collections.abc import Collection, Iterator
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
from vit_lightning.data import folder
from vit_lightning.data.cache import ImageArrays, ImageSet, Source, fingerprint, in_memory, open_source
from vit_lightning.data.images import to_array
from vit_lightning.keys import InputError
from vit_lightning.terminal import with_bar

__all__ = ["folder", "load_arrays"]  # folder registers image_folder


def load_arrays(config: DataConfig, image_size: int) -> ImageArrays:
    """Open the images of a source.

    Args:
        config: names the source and its directories.
        image_size: side at which images of differing sizes are kept, in pixels, unless ``config.stored_size`` is set.

    Raises:
        InputError: if the source is missing, cannot be downloaded, or contains what cannot be trained on.
    """
    made = register.source.build(config.source, config.options, config, image_size)
    return open_source(made, config, image_size) if isinstance(made, Source) else in_memory(made)


@register.source("cifar10")
@register.source("cifar100")
def cifar(config: DataConfig, image_size: int) -> Source:
    """CIFAR-10 or CIFAR-100 (Krizhevsky, 2009) by torchvision, which downloads, verifies and keeps the archive.

    Its images come class by class and by their names, as from a folder of them, so that both give the same splits.
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
            batches = [_unpickle(place / file, md5) for file, md5 in files]  # torchvision leaves out the names
            order[part] = np.lexsort((list(chain.from_iterable(b["filenames"] for b in batches)), data.targets))
        return ImageSet(
            class_names=sets["train"].classes,
            labels={part: np.array(data.targets)[order[part]] for part, data in sets.items()},
            images={part: data.data.transpose(0, 3, 1, 2)[order[part]] for part, data in sets.items()},
        )

    return Source(lambda: fingerprint(root, [place / file for file in names]) + " by name", decode)


def _unpickle(path: Path, md5: str) -> Any:
    """The content of a pickle, if its bytes are those that the checksum is of: others could run code."""
    content = path.read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise InputError(f"{path} was changed while it was read; delete it and start again")
    return pickle.loads(content, encoding="latin1")


@register.source("digits")
def digits(config: DataConfig, image_size: int) -> Source:
    """1,797 handwritten digits, 8 × 8, grayscale (Alpaydin and Kaynak, 1998), that scikit-learn includes.

    They have no test set of their own: a fifth of each class is one, drawn with a fixed seed.
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
    """Arrays of one ``.npz`` file, ``data.root``, named as in MedMNIST: ``train_images``, ``train_labels``, ``val_…``.

    Images are uint8, (n, height, width) or (n, height, width, channels). ``class_names`` may name the classes.
    """
    path = Path(config.root).expanduser()
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"data.root={config.root} cannot be read as an .npz file ({error})") from error
    parts = [part for part in ("train", "val", "test") if f"{part}_images" in arrays]
    if not parts or any(f"{part}_labels" not in arrays for part in parts):
        raise InputError(f"data.root={config.root} needs the arrays train_images, train_labels and so on")
    labels = {part: arrays[f"{part}_labels"].reshape(-1) for part in parts}
    count = 1 + int(max(values.max() for values in labels.values()))
    names = [str(name) for name in arrays.get("class_names", range(count))]
    return ImageSet(names, labels, {part: arrays[f"{part}_images"] for part in parts})


@register.source("torchvision")
def of_torchvision(config: DataConfig, image_size: int) -> Source:
    """A classification data set of torchvision by its class's name, as in ``data.name=Flowers102``; downloaded once."""
    kind = getattr(datasets, config.name or "", None)
    takes = inspect.signature(kind).parameters if isinstance(kind, type) else {}
    if kind is None or not takes.keys() & {"train", "split"}:
        raise InputError(f"data.name={config.name} is not a classification data set of torchvision, such as Flowers102")
    root = Path(config.root).expanduser()

    def decode() -> ImageSet:
        labels, images, names = {}, {}, None
        for part, choices in (("train", ["train"]), ("val", ["val", "valid"]), ("test", ["test"])):
            for choice in choices:
                data = _torchvision_part(kind, root, choice, takes.keys())
                if data is not None:
                    known = getattr(data, "targets", getattr(data, "_labels", None))
                    labels[part] = np.array([item[1] for item in data] if known is None else list(known))
                    images[part] = _first_of_each(data)
                    names = getattr(data, "classes", None)
        return pictures(labels, images, config, image_size, names)

    return Source(lambda: f"{config.name} {torchvision.__version__}", decode)


def _torchvision_part(kind: Any, root: Path, choice: str, takes: Collection[str]) -> Any:
    """A part of a data set of torchvision; ``None`` if it has no such part."""
    if "train" in takes and choice not in ("train", "test"):
        return None
    which = {"train": choice == "train"} if "train" in takes else {"split": choice}
    try:
        return kind(str(root), **which, **({"download": True} if "download" in takes else {}))
    except (OSError, RuntimeError) as error:
        raise InputError(f"data.name={kind.__name__} cannot be read or downloaded ({error})") from error
    except ValueError:  # the split is not known
        return None


def _first_of_each(data: Any) -> Iterator[Any]:
    """The pictures of a data set of pairs, one at a time."""
    return (data[index][0] for index in range(len(data)))


@register.source("huggingface")
def of_huggingface(config: DataConfig, image_size: int) -> Source:
    """A data set of the Hugging Face hub by its name, ``data.name=cifar100``, or a directory that it can read."""
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
        labels = {part: np.array(data[label]) for part, data in sets.items()}
        images = {part: (row[image] for row in data) for part, data in sets.items()}
        return pictures(labels, images, config, image_size, features[label].names)

    return Source(lambda: " ".join(data._fingerprint for data in sets.values()), decode)


def pictures(
    labels: dict[str, np.ndarray], images: dict[str, Any], config: DataConfig, image_size: int, names: list[str] | None
) -> ImageSet:
    """Labels and Pillow images by part, at ``data.stored_size`` or else at the network's size."""
    side = config.stored_size or image_size
    count = 1 + int(max(values.max() for values in labels.values()))
    return ImageSet(
        class_names=[str(name) for name in names or range(count)],
        labels=labels,
        images={
            part: (to_array(image, side) for image in with_bar(each, f"Reading {part} images", len(labels[part])))
            for part, each in images.items()
        },
        shape=(3, side, side),
        fits_any_size=config.stored_size is not None,
    )
