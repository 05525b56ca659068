"""Data sets as memory-mapped arrays: each source is decoded once into uint8 arrays that stay on disk."""

import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from vit_lightning.config import DataConfig
from vit_lightning.data.images import LISTED, describe_unreadable
from vit_lightning.keys import InputError
from vit_lightning.terminal import is_first

PARTS = ("train", "val", "test")  # the parts that a source may have


@dataclass(slots=True)
class ImageArrays:
    """A data set, in memory-mapped arrays if it comes from files.

    Attributes:
        images: by part (those of ``train``, ``val``, ``test`` that the source has), uint8 of shape (number of images,
            channels, height, width): tensors, or :class:`~vit_lightning.data.stream.ShardedImages`.
        labels: by part, int64 of shape (number of images,): indices into ``class_names``.
        class_names: names of the classes, in the order of their indices.
        mean: mean of each channel over the training images, in [0, 1].
        std: the standard deviation of each channel, likewise.
        digest: by part, a SHA-256 of its class names, labels and pixels, in order.
        paths: by part, the files of the images, relative to ``data.root``; empty if they are not files.
    """

    images: dict[str, Any]
    labels: dict[str, Tensor]
    class_names: list[str]
    mean: list[float]
    std: list[float]
    digest: dict[str, str]
    paths: dict[str, list[str]] = field(default_factory=dict)


@dataclass(slots=True)
class ImageSet:
    """The content of a source, by part (``train``, ``val``, ``test``); a part may be missing.

    Attributes:
        class_names: names of the classes, in the order of the labels.
        labels: indices into ``class_names``.
        images: an array of uint8, (n, height, width), (n, height, width, channels) or (n, channels, height, width); or
            images (channels, height, width) one at a time, each of ``shape``, so that any number fits in memory. An
            :class:`~vit_lightning.keys.InputError` in place of an image says why it cannot be read.
        shape: the shape of each image, if they come one at a time.
        fits_any_size: whether the size is the images' own, rather than chosen for ``model.image_size``.
        paths: the files of the images, relative to ``data.root``.
    """

    class_names: list[str]
    labels: dict[str, np.ndarray]
    images: dict[str, Iterable[np.ndarray | InputError]]
    shape: tuple[int, int, int] | None = None
    fits_any_size: bool = True
    paths: dict[str, list[str]] = field(default_factory=dict)


@dataclass(slots=True)
class Source:
    """A data set that is cached.

    Attributes:
        identify: returns a fingerprint of its current content.
        decode: reads the data set.
    """

    identify: Callable[[], str]
    decode: Callable[[], ImageSet]


def open_source(source: Source, config: DataConfig, image_size: int) -> ImageArrays:
    """Open the cached arrays of a source, which is decoded first if there are none or they no longer match.

    Raises:
        InputError: if the source cannot be read, or the cache cannot be written.
    """
    root = Path(config.root).expanduser().resolve()
    options = f" {config.name} {config.options}" if config.name or config.options else ""
    key = hashlib.sha256(os.fsencode(f"{root} {config.stored_size}{options}")).hexdigest()[:12]
    cache = Path(config.cache_dir).expanduser() / f"{config.source}-{key}"
    skip = config.skip_unreadable
    arrays = read_cache(cache, source.identify(), image_size, skip)  # without a lock, which needs a writable directory
    if arrays is not None:
        return arrays
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(cache.with_name(f".{cache.name}.lock")):  # if two runs start at once, one downloads and decodes
            arrays = read_cache(cache, source.identify(), image_size, skip)
            if arrays is None:
                decoded = source.decode()
                # A download changes the files, so they are identified again.
                write_cache(cache, source.identify(), decoded, skip)
                arrays = open_cache(cache)
    except OSError as error:
        reason = f"cannot be written ({error.strerror or error}); free disk space or choose another directory"
        raise InputError(f"data.cache_dir={config.cache_dir} {reason}") from error
    return arrays


def in_memory(content: ImageSet) -> ImageArrays:
    """Convert a data set that is read each time instead of cached."""
    images = {part: channels_first(np.asarray(array)) for part, array in content.images.items()}
    labels = {part: np.asarray(content.labels[part]).astype(np.int64) for part in images}
    shapes = {array.shape[1:] for array in images.values()}
    if len(shapes) > 1:
        raise InputError(f"data: images of all parts must have one shape, not {' and '.join(map(str, shapes))}")
    digest = {}
    for part, array in images.items():
        check_labels(part, labels[part], len(array), content.class_names)
        sha = hashlib.sha256(_start_of_digest(content.class_names, labels[part]))
        sha.update(np.ascontiguousarray(array).data)
        digest[part] = sha.hexdigest()
    mean, std = channel_statistics(next(iter(images.values())))
    tensors = {part: torch.from_numpy(np.ascontiguousarray(array)) for part, array in images.items()}
    numbers = {part: torch.from_numpy(array) for part, array in labels.items()}
    return ImageArrays(tensors, numbers, list(content.class_names), mean, std, digest)


def check_labels(part: str, labels: np.ndarray, count: int, class_names: list[str]) -> None:
    """Check that a part has images, each labelled with the index of a class, and two classes if it is for training.

    Raises:
        InputError: if not.
    """
    if not count or count != len(labels):
        raise InputError(f"data: {count} {part} images have {len(labels)} labels")
    if not 0 <= labels.min() <= labels.max() < len(class_names):
        raise InputError(f"data: the {part} labels must be from 0 to {len(class_names) - 1}")
    if part == "train" and len(class_names) < 2:
        raise InputError("data: the training images are of only one class; a classifier needs at least two")


def channels_first(images: np.ndarray) -> np.ndarray:
    """Convert arrays of uint8 images to (n, channels, height, width).

    Raises:
        InputError: if they are not arrays of uint8 images.
    """
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise InputError(f"data: images must be uint8 of 3 or 4 dimensions, not {images.dtype} of {images.ndim}")
    if images.ndim == 3:
        return images[:, None]
    return images if images.shape[1] in (1, 3) else images.transpose(0, 3, 1, 2)


def read_cache(cache: Path, fingerprint: str, image_size: int, skip_unreadable: bool = False) -> ImageArrays | None:
    """Memory-map the arrays at ``cache``; ``None`` if they are missing or corrupt, or their content differs.

    A cache that lacks unreadable images counts as different, unless such images are to be skipped.
    """
    try:
        meta = json.loads((cache / "meta.json").read_text(encoding="utf-8"))
        if meta["fingerprint"] != fingerprint or meta["image_size"] not in (None, image_size):
            return None
        if meta.get("skipped") and not skip_unreadable:
            return None
        return open_cache(cache)
    except (OSError, EOFError, ValueError, LookupError, TypeError):
        return None


def open_cache(cache: Path) -> ImageArrays:
    """Memory-map the arrays at ``cache``, whatever their content."""
    meta = json.loads((cache / "meta.json").read_text(encoding="utf-8"))
    parts = list(meta["digest"])
    # Copy on write ("c"): torch needs writable memory, and the file must not change.
    images = {part: np.load(cache / f"{part}_images.npy", mmap_mode="c") for part in parts}
    labels = {part: np.load(cache / f"{part}_labels.npy") for part in parts}
    return ImageArrays(
        images={part: torch.from_numpy(array) for part, array in images.items()},
        labels={part: torch.from_numpy(array) for part, array in labels.items()},
        class_names=meta["class_names"],
        mean=meta["mean"],
        std=meta["std"],
        digest=meta["digest"],
        paths=json.loads((cache / "paths.json").read_text(encoding="utf-8")),
    )


def write_cache(cache: Path, fingerprint: str, content: ImageSet, skip_unreadable: bool = False) -> None:
    """Write the arrays next to ``cache``, and rename their directory once it is complete.

    Raises:
        InputError: if images cannot be read, unless they are to be skipped and others of each class remain.
    """
    for left in cache.parent.glob(f".{cache.name}-*"):  # from a process that was killed
        shutil.rmtree(left)
    new = Path(tempfile.mkdtemp(prefix=f".{cache.name}-", dir=cache.parent))
    try:
        problems: list[InputError] = []
        digest, paths = {}, {}
        first = next(iter(content.images))
        lost: list[str] = []  # classes without any readable image
        for part, labels in content.labels.items():
            kept, digest[part] = _write_part(new, part, content, problems)
            if part == first or not any(kept):
                lost += [content.class_names[label] for label in np.setdiff1d(labels, labels[kept])]
            if part in content.paths:
                paths[part] = [name for name, keep in zip(content.paths[part], kept, strict=True) if keep]
        if problems and not skip_unreadable:
            raise InputError(describe_unreadable(problems) + "; fix or remove them, or set data.skip_unreadable=true")
        if problems and is_first():
            print(f"warning: {len(problems):,} images are left out: {describe_unreadable(problems)}", file=sys.stderr)
        if lost:
            raise InputError(f"no image of {', '.join(lost[:LISTED])} can be read; replace them or remove the class")
        training = np.load(new / f"{first}_images.npy", mmap_mode="r")
        mean, std = channel_statistics(training)
        meta = {
            "fingerprint": fingerprint,
            "image_size": None if content.fits_any_size else training.shape[-1],
            "class_names": content.class_names,
            "mean": mean,
            "std": std,
            "digest": digest,
            "skipped": len(problems),
        }
        (new / "paths.json").write_text(json.dumps(paths))
        (new / "meta.json").write_text(json.dumps(meta, indent=1))
        if cache.exists():
            shutil.rmtree(cache)
        new.rename(cache)
    except BaseException:
        shutil.rmtree(new)
        raise


def _write_part(folder: Path, part: str, content: ImageSet, problems: list[InputError]) -> tuple[list[bool], str]:
    """Write the images and labels of a part, and collect the errors of those that cannot be read.

    Returns:
        Whether each image was read, and the digest.
    """
    labels = np.asarray(content.labels[part]).astype(np.int64)
    shape, images = content.shape, content.images[part]
    if shape is None:
        images = channels_first(np.asarray(images))
        shape = images.shape[1:]
    kept = []
    pixels = hashlib.sha256()
    with (folder / f"{part}_images.npy").open("wb") as file:  # on a full disk, a memory map would kill the process
        # NumPy leaves room in the header for another number of images.
        np.lib.format.write_array_header_1_0(file, _header(len(labels), shape))
        start = file.tell()
        for image in images:
            kept.append(not isinstance(image, InputError))
            if isinstance(image, InputError):
                problems.append(image)
                continue
            if image.shape != shape or image.dtype != np.uint8:
                raise InputError(f"data: a {part} image is {image.dtype} of shape {image.shape}, not uint8 of {shape}")
            data = image.tobytes()
            pixels.update(data)
            file.write(data)
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, _header(sum(kept), shape))
        assert file.tell() == start
    check_labels(part, labels, len(kept), content.class_names)
    buffer = io.BytesIO()  # NumPy would report a full disk less clearly
    np.save(buffer, labels[kept])
    (folder / f"{part}_labels.npy").write_bytes(buffer.getvalue())
    return kept, hashlib.sha256(_start_of_digest(content.class_names, labels[kept]) + pixels.digest()).hexdigest()


def _header(count: int, shape: tuple[int, ...]) -> dict[str, object]:
    return {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}


def _start_of_digest(class_names: list[str], labels: np.ndarray) -> bytes:
    return json.dumps(class_names).encode() + labels.tobytes()


def channel_statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Exact mean and standard deviation of each channel of (n, C, h, w) uint8 images, in [0, 1], from histograms."""
    channels = range(images.shape[1])
    counts = np.zeros((images.shape[1], 256))
    for start in range(0, len(images), 4096):
        chunk = images[start : start + 4096]
        counts += np.stack([np.bincount(chunk[:, c].ravel(), minlength=256) for c in channels])
    share = counts / counts.sum(axis=1, keepdims=True)
    values = np.arange(256) / 255
    mean = share @ values
    std = np.sqrt(share @ values**2 - mean**2)
    return mean.tolist(), np.maximum(std, 1 / 255).tolist()  # avoids a division by zero for a blank channel
