"""The data sources, each decoded once into uint8 arrays that stay on disk and are memory-mapped from then on."""

import hashlib
import json
import os
import pickle
import shutil
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from filelock import FileLock
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision import datasets

from vit_lightning.config import DataConfig
from vit_lightning.keys import InputError
from vit_lightning.terminal import with_bar

ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {  # what undoes each of its values but 1
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
UNREADABLE = (
    *(OSError, SyntaxError, ValueError, struct.error),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)

warnings.filterwarnings("error", category=Image.DecompressionBombWarning)  # 90 million pixels, or too large to read

SPLITS = ("train", "test")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
MAX_OWN_SIZE = 256  # pixels; larger images are kept at the size that the network sees, or they would fill the disk
LARGE_FILE = 16 * 1024  # bytes; measured: 32 × 32 PNGs of 2 KB decode three times as fast in one thread as in two


@dataclass(slots=True)
class ImageArrays:
    """A data set in memory-mapped arrays.

    Attributes:
        images: by split (``train``, ``test``), uint8 of shape (number of images, channels, side, side).
        labels: by split, int64 of shape (number of images,): indices into ``class_names``.
        class_names: in the order of their indices.
        mean: of each channel over the training images, on [0, 1].
        std: the standard deviation of each channel, likewise.
    """

    images: dict[str, Tensor]
    labels: dict[str, Tensor]
    class_names: list[str]
    mean: list[float]
    std: list[float]


@dataclass(slots=True)
class Decoded:
    """What a source hands to the cache; images (C, side, side) of uint8 come one at a time, so that any number fits."""

    class_names: list[str]
    shape: tuple[int, int, int]
    labels: dict[str, np.ndarray]
    images: dict[str, Iterable[np.ndarray]]
    fits_any_size: bool = True  # whether the side is the images' own, not chosen for model.image_size


def load_arrays(config: DataConfig, image_size: int) -> ImageArrays:
    """Open the cached arrays of a source, first decoding it where there are none or they no longer match it.

    Args:
        config: names the source and its directories.
        image_size: side at which images of differing sizes are kept, in pixels, unless ``config.stored_size`` is set.

    Raises:
        InputError: if the source is missing, cannot be downloaded, or holds what cannot be trained on.
    """
    root = Path(config.root).expanduser()
    if config.source == "digits":
        identify, decode = digits()
    elif config.source == "image_folder":
        identify, decode = image_folder(root, config.stored_size, image_size)
    else:
        identify, decode = cifar(config.source, root)

    key = hashlib.sha256(f"{root.resolve()} {config.stored_size}".encode()).hexdigest()[:12]
    cache = Path(config.cache_dir).expanduser() / f"{config.source}-{key}"
    arrays = read_cache(cache, identify(), image_size)  # without the lock, which needs a directory that can be written
    if arrays is not None:
        return arrays
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(cache.with_name(f".{cache.name}.lock")):  # of two first starts at once, one downloads and decodes
            arrays = read_cache(cache, identify(), image_size)
            if arrays is None:
                decoded = decode()
                write_cache(cache, identify(), decoded)  # identified again: a download changed the files
                arrays = open_cache(cache)
    except OSError as error:
        reason = f"cannot be written ({error.strerror or error}); choose another directory"
        raise InputError(f"data.cache_dir={config.cache_dir} {reason}") from error
    return arrays


# --- sources: each returns a function that identifies its present content, and one that decodes it --------------------

Source = tuple[Callable[[], str], Callable[[], Decoded]]


def cifar(name: str, root: Path) -> Source:
    """CIFAR-10 or CIFAR-100 (Krizhevsky, 2009) by torchvision, which downloads, verifies and keeps the archive.

    Its images come class by class and by their names, as from a folder of them, so that both give the same splits.
    """
    kind: type[datasets.CIFAR10] = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    folder = root / kind.base_folder
    names = [file for file, _ in [*kind.train_list, *kind.test_list]] + [kind.meta["filename"]]

    def decode() -> Decoded:
        try:
            sets = {split: kind(str(root), train=split == "train", download=True) for split in SPLITS}
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"data={name}: {folder} holds no sound copy, and {kind.url} cannot be downloaded "
                f"({' '.join(str(error).split())}); put that archive at {root / kind.filename}, "
                "or train on data=digits, which needs no download (experiment=quickstart)"
            ) from error
        order = {}
        for split, data in sets.items():
            files = kind.train_list if split == "train" else kind.test_list
            batches = [_unpickle(folder / file, md5) for file, md5 in files]  # torchvision leaves out the names
            order[split] = np.lexsort((list(chain.from_iterable(b["filenames"] for b in batches)), data.targets))
        return Decoded(
            class_names=sets["train"].classes,
            shape=(3, 32, 32),
            labels={split: np.array(data.targets)[order[split]] for split, data in sets.items()},
            images={split: data.data.transpose(0, 3, 1, 2)[order[split]] for split, data in sets.items()},
        )

    return lambda: _fingerprint(root, [folder / file for file in names]) + " by name", decode


def digits() -> Source:
    """1,797 handwritten digits, 8 × 8, grayscale (Alpaydin and Kaynak, 1998), which scikit-learn carries.

    They have no test set of their own: a fifth of each class is one, drawn with a fixed seed.
    """

    def decode() -> Decoded:

        data = load_digits()
        images = np.rint(data.images * (255 / 16)).astype(np.uint8)[:, None]
        x_train, x_test, y_train, y_test = train_test_split(
            images, data.target, test_size=0.2, random_state=42, stratify=data.target
        )
        return Decoded(
            class_names=[str(name) for name in data.target_names],
            shape=(1, 8, 8),
            labels={"train": y_train, "test": y_test},
            images={"train": x_train, "test": x_test},
        )

    return lambda: sklearn.__version__, decode


def image_folder(root: Path, stored_size: int | None, image_size: int) -> Source:
    """A tree ``root/{train,test}/<class>/*`` of PNG, JPEG and WebP files; class indices follow the sorted folders."""
    try:
        files = {split: _class_files(root / split) for split in SPLITS}
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}); mend its permissions") from error
    class_names = sorted(files["train"])
    if len(class_names) < 2:
        raise InputError(f"{root / 'train'} holds {len(class_names)} class folder; a classifier needs two or more")
    for name in sorted(files["test"]):
        if name not in files["train"]:
            raise InputError(f"{root / 'test' / name} is a class that {root / 'train'} lacks; add or remove it")
    paths = {split: [path for name in sorted(files[split]) for path in files[split][name]] for split in SPLITS}
    labels = {
        split: np.array([class_names.index(name) for name in sorted(files[split]) for _ in files[split][name]])
        for split in SPLITS
    }

    def decode() -> Decoded:
        side = stored_size
        if side is None:
            every = [*paths["train"], *paths["test"]]
            sizes = set(with_bar(map(_image_size, every), "Reading image sizes", len(every)))
            width, height = next(iter(sizes))
            side = width if len(sizes) == 1 and width == height <= MAX_OWN_SIZE else None
        keep = side or image_size
        return Decoded(
            class_names=class_names,
            shape=(3, keep, keep),
            labels=labels,
            images={
                split: with_bar(_decode_all(paths[split], keep), f"Decoding {split} images", len(paths[split]))
                for split in SPLITS
            },
            fits_any_size=side is not None,
        )

    return lambda: _fingerprint(root, chain(*paths.values())), decode


def decode_image(path: Path, side: int, channels: int = 3) -> np.ndarray:
    """Read any picture as (channels, side, side) uint8: upright by its EXIF tag, shorter side resized, centre cropped.

    RGB, or gray for one channel; of an animation the first picture. Transparent parts show white, as on paper; 16-bit
    grayscale keeps its range.

    Raises:
        InputError: if the file cannot be read as an image.
    """
    try:
        with Image.open(path) as file:
            file.load()  # tags may come last
            # Pillow's exif_transpose would write all tags anew, and fails on odd ones.
            turn = UPRIGHT.get(file.getexif().get(ORIENTATION, 1))
            image = file if turn is None else file.transpose(turn)
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB" if channels == 3 else "L")
    except UNREADABLE as error:
        raise _unreadable(path, error) from error
    if image.size != (side, side):
        image = ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


def _class_files(folder: Path) -> dict[str, list[Path]]:
    """The image files of each class folder below ``folder``, sorted."""
    if not folder.is_dir():
        raise InputError(
            f"data.root={folder.parent} has no folder {folder.name}/; "
            "data=image_folder reads train/<class>/* and test/<class>/* below data.root"
        )
    classes = {}
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            files = sorted(file for file in entry.iterdir() if file.suffix.lower() in SUFFIXES)
            if not files:
                raise InputError(f"{entry} holds no PNG, JPEG or WebP file; fill it or remove it")
            classes[entry.name] = files
    if not classes:
        raise InputError(f"{folder} holds no class folder; put images into {folder}/<class>/")
    return classes


def _unpickle(path: Path, md5: str) -> Any:
    """The content of a pickle, if its bytes are those that the checksum is of: others could run code."""
    content = path.read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise InputError(f"{path} was changed while it was read; delete it and start again")
    return pickle.loads(content, encoding="latin1")


def _image_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except UNREADABLE as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> InputError:
    reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else getattr(error, "strerror", None)
    return InputError(f"{path} cannot be read ({reason or error}); mend or remove it")


def _decode_all(paths: list[Path], side: int) -> Iterator[np.ndarray]:
    """Decode files in order: large ones on all cores, small ones one by one, where threads only get in the way."""
    sample = [path for path in paths[:: -(-len(paths) // 100)] if os.access(path, os.R_OK)]  # decoding names others
    if sum(path.stat().st_size for path in sample) < LARGE_FILE * len(sample):
        yield from (decode_image(path, side) for path in paths)
        return
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), 1024):  # by parts, so that results do not pile up
            yield from pool.map(lambda path: decode_image(path, side), paths[start : start + 1024])


# --- the cache -------------------------------------------------------------------------------------------------------


def read_cache(cache: Path, fingerprint: str, image_size: int) -> ImageArrays | None:
    """Memory-map the arrays at ``cache``; ``None`` if there are none, or they are of other content or damaged."""
    try:
        meta = json.loads((cache / "meta.json").read_text())
        if meta["fingerprint"] != fingerprint or meta["image_size"] not in (None, image_size):
            return None
        return open_cache(cache)
    except (OSError, EOFError, ValueError, KeyError):
        return None


def open_cache(cache: Path) -> ImageArrays:
    """Memory-map the arrays at ``cache``, whatever their content."""
    meta = json.loads((cache / "meta.json").read_text())
    # "c" (copy on write): torch wants writable memory, and nothing may reach the file.
    images = {split: np.load(cache / f"{split}_images.npy", mmap_mode="c") for split in SPLITS}
    labels = {split: np.load(cache / f"{split}_labels.npy") for split in SPLITS}
    return ImageArrays(
        images={split: torch.from_numpy(array) for split, array in images.items()},
        labels={split: torch.from_numpy(array) for split, array in labels.items()},
        class_names=meta["class_names"],
        mean=meta["mean"],
        std=meta["std"],
    )


def write_cache(cache: Path, fingerprint: str, decoded: Decoded) -> None:
    """Write the arrays beside ``cache`` and put them in its place when they are complete."""
    for left in cache.parent.glob(f".{cache.name}-*"):  # by a process that was killed
        shutil.rmtree(left)
    new = Path(tempfile.mkdtemp(prefix=f".{cache.name}-", dir=cache.parent))
    try:
        for split in SPLITS:
            labels = decoded.labels[split].astype(np.int64)
            np.save(new / f"{split}_labels.npy", labels)
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *decoded.shape)}
            with (new / f"{split}_images.npy").open("wb") as file:  # not through a memory map: a full disk kills those
                np.lib.format.write_array_header_1_0(file, header)
                for image in decoded.images[split]:
                    file.write(image.tobytes())
        mean, std = channel_statistics(np.load(new / "train_images.npy", mmap_mode="r"))
        meta = {
            "fingerprint": fingerprint,
            "image_size": None if decoded.fits_any_size else decoded.shape[1],
            "class_names": decoded.class_names,
            "mean": mean,
            "std": std,
        }
        (new / "meta.json").write_text(json.dumps(meta, indent=1))
        if cache.exists():
            shutil.rmtree(cache)
        new.rename(cache)
    except BaseException:
        shutil.rmtree(new)
        raise


def channel_statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Exact mean and standard deviation of each channel of (B, C, h, w) uint8 images, on [0, 1], from histograms."""
    channels = range(images.shape[1])
    counts = np.zeros((images.shape[1], 256))
    for start in range(0, len(images), 4096):
        chunk = images[start : start + 4096]
        counts += np.stack([np.bincount(chunk[:, c].ravel(), minlength=256) for c in channels])
    share = counts / counts.sum(axis=1, keepdims=True)
    values = np.arange(256) / 255
    mean = share @ values
    std = np.sqrt(share @ values**2 - mean**2)
    return mean.tolist(), np.maximum(std, 1 / 255).tolist()  # a blank channel must not divide by zero


def _fingerprint(root: Path, files: Iterable[Path]) -> str:
    """A digest of the names, sizes and modification times of files below ``root``; unreadable ones count too."""
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat() if os.access(file, os.R_OK) else None
        digest.update(f"{file.relative_to(root)} {stat and (stat.st_size, stat.st_mtime_ns)}\n".encode())
    return digest.hexdigest()
