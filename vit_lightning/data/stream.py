"""Images in shards that are read when needed, so that a data set may exceed a machine's memory and disk.

A directory of shards is written by ``python -m vit_lightning.shard``: a litdata data set for each of ``train``,
``val`` and ``test`` that has images, with ``labels.npy`` next to its shards; ``paths.json``; and ``shards.json``, which
is written last. The directory may be moved to an object store, from which shards are downloaded to ``data.cache_dir``
when their first image is needed.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from vit_lightning import register
from vit_lightning.config import DataConfig
from vit_lightning.data.cache import ImageArrays
from vit_lightning.keys import InputError, key

ABOUT = "shards.json"
DOWNLOADS = 8  # maximum number of simultaneous downloads per process


@register.source("stream", window=key(16, "Shards among which training images are shuffled.", low=1))
def stream(config: DataConfig, network_size: int, window: int) -> ImageArrays:
    """Images in a directory of shards, local or in an object store (``s3://``, ``gs://``, ``azure://``, ``r2://``).

    Raises:
        InputError: if the directory is incomplete or cannot be downloaded.
    """
    remote = config.root.rstrip("/") if "://" in config.root or config.root.startswith("local:") else None
    disk_bytes = None if config.cache_gb is None or remote is None else config.cache_gb * 1e9
    try:
        folder = local_copy(remote, config.cache_dir) if remote else Path(config.root).expanduser()
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        labels = {part: torch.from_numpy(np.load(folder / part / "labels.npy")) for part in about["digest"]}
        images = {
            part: ShardedImages(folder / part, about["shape"], window, remote and f"{remote}/{part}", disk_bytes)
            for part in labels
        }
        for part, values in labels.items():
            if len(values) != len(images[part]):
                raise ValueError(f"{part}: {len(images[part])} images have {len(values)} labels")
        paths = json.loads((folder / "paths.json").read_text(encoding="utf-8"))
        return ImageArrays(images, labels, about["class_names"], about["mean"], about["std"], about["digest"], paths)
    except InputError:
        raise
    except (OSError, EOFError, ValueError, LookupError, TypeError) as error:
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        raise InputError(
            f"data.root={config.root} is not a complete directory of shards ({reason}); "
            "write one with python -m vit_lightning.shard"
        ) from error


class ShardedImages:
    """The images of a part, gathered from memory-mapped shards: ``images[indices]``, as from a tensor.

    Args:
        folder: the litdata data set, or where it is downloaded to.
        shape: shape of an image, (channels, height, width).
        window: number of shards among which images are shuffled, and that stay mapped.
        remote: where missing shards are downloaded from; ``None`` if all are in ``folder``.
        disk_bytes: maximum disk space of the downloaded shards of all parts; ``None`` for no limit.

    Raises:
        InputError: if ``disk_bytes`` is less than two windows take.
        OSError: if a file is missing.
        ValueError: if a file differs from what was written.
    """

    device = torch.device("cpu")  # device of the gathered tensors

    def __init__(
        self, folder: Path, shape: Sequence[int], window: int, remote: str | None, disk_bytes: float | None
    ) -> None:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        self.folder, self.window, self.remote, self.disk_bytes = folder, window, remote, disk_bytes
        self.shards: list[dict[str, Any]] = index["chunks"]
        image_bytes = math.prod(shape)
        if not self.shards or any(each["dim"] != each["chunk_size"] * image_bytes for each in self.shards):
            raise ValueError(f"{folder / 'index.json'} does not list shards of images of shape {shape}")
        for each in [] if remote else self.shards:
            self._check_size(each)
        needed = sum(sorted((each["chunk_bytes"] for each in self.shards), reverse=True)[: 2 * window])
        if disk_bytes is not None and disk_bytes < needed:  # every batch would download shards again
            raise InputError(
                f"data.cache_gb={disk_bytes / 1e9:g} is less than two windows of shards take; use data.cache_gb="
                f"{math.ceil(needed / 1e8) / 10} or more, or a smaller data.options.stream.window"
            )
        self.starts = np.cumsum([0, *(each["chunk_size"] for each in self.shards)])
        self.shape = (int(self.starts[-1]), *shape)
        self.nbytes = math.prod(self.shape)
        self._mapped: OrderedDict[int, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return self.shape[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": OrderedDict()}  # mapped arrays would be pickled in full

    def __getitem__(self, indices: Tensor | int) -> Tensor:
        """Gather images.

        Args:
            indices: int64, of any shape.

        Returns:
            uint8, of the shape of ``indices`` followed by (channels, height, width).

        Raises:
            InputError: if a shard cannot be read or downloaded.
        """
        wanted = torch.as_tensor(indices)
        flat = wanted.reshape(-1).numpy()
        numbers = np.searchsorted(self.starts, flat, side="right") - 1
        needed = np.unique(numbers).tolist()
        images = np.empty((len(flat), *self.shape[1:]), np.uint8)
        try:
            missing = [number for number in needed if number not in self._mapped]
            if self.remote and missing:
                with ThreadPoolExecutor(DOWNLOADS) as pool:
                    list(pool.map(self._download, missing))
            for number in needed:
                here = numbers == number
                images[here] = self._map(number)[flat[here] - self.starts[number]]
            if self.remote and missing:
                self._free_disk()
        except InputError:
            raise
        except (OSError, ValueError) as error:
            where = self.remote or self.folder
            raise InputError(f"data.root: a shard of {where} cannot be read ({error}); restore it") from error
        return torch.from_numpy(images.reshape(*wanted.shape, *self.shape[1:]))

    def shuffled(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """Order an epoch with :func:`shuffle_by_shard`."""
        return shuffle_by_shard(indices, self.starts, self.window, generator)

    def _map(self, number: int) -> np.ndarray:
        """Memory-map the images of a shard; the last ``window`` shards stay mapped."""
        if number not in self._mapped:
            count = self.shards[number]["chunk_size"]
            header = 4 * (count + 2)  # litdata's: the number of images, where each begins and the last ends
            path = self.folder / self.shards[number]["filename"]
            if self.remote:
                self._download(number)  # it may have been deleted, if a batch needs more shards than are kept
            self._mapped[number] = np.asarray(np.memmap(path, np.uint8, "r", header, (count, *self.shape[1:])))
        self._mapped.move_to_end(number)
        while len(self._mapped) > self.window:
            self._mapped.popitem(last=False)
        return self._mapped[number]

    def _check_size(self, shard: dict[str, Any]) -> None:
        """Check that a shard is complete."""
        path = self.folder / shard["filename"]
        if path.stat().st_size != shard["chunk_bytes"]:
            raise ValueError(f"{path} has {path.stat().st_size:,} of {shard['chunk_bytes']:,} bytes")

    def _download(self, number: int) -> None:
        """Download a shard if it is missing, and mark it as being in use."""
        path = self.folder / self.shards[number]["filename"]
        with FileLock(path.with_suffix(".fetch")):  # only one process downloads it
            if not path.exists():
                download(f"{self.remote}/{path.name}", path)
                self._check_size(self.shards[number])
            path.touch()

    def _free_disk(self) -> None:
        """Delete the least recently opened shards until the rest take at most ``disk_bytes``."""
        if self.disk_bytes is None:
            return
        found = []
        for path in self.folder.parent.glob("*/*.bin"):
            with contextlib.suppress(FileNotFoundError):  # another process may have deleted it
                found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        excess = sum(size for _, size, _ in found) - self.disk_bytes
        for _, size, path in sorted(found):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size


def shuffle_by_shard(indices: Tensor, starts: np.ndarray, window: int, generator: torch.Generator) -> Tensor:
    """Shuffle an epoch so that few shards are read at a time.

    Shards are divided at random into windows of up to ``window`` shards, and the images of each window are shuffled.
    If all shards fit in one window, the order is as random as without shards.

    Args:
        indices: (number of images,).
        starts: (number of shards + 1,), the first index of each shard, and the total number of images.
        window: maximum number of shards in a window.
        generator: the random number generator.

    Returns:
        ``indices`` in the new order.
    """
    shards = len(starts) - 1
    shard_of = torch.from_numpy(np.searchsorted(starts, indices.numpy(), side="right") - 1)
    window_of = torch.randperm(shards, generator=generator)[shard_of] * -(-shards // window) // shards
    mixed = torch.randperm(len(indices), generator=generator)
    return indices[mixed[window_of[mixed].argsort(stable=True)]]


def local_copy(remote: str, cache_dir: str) -> Path:
    """Download the files that describe an object store's shards; the shards follow when they are needed.

    Returns:
        The directory below ``cache_dir`` for the current content of ``remote``.

    Raises:
        InputError: if a file cannot be downloaded or written.
    """
    cache = Path(cache_dir).expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".stream-", dir=cache) as new:
            download(f"{remote}/{ABOUT}", Path(new) / ABOUT)
            content = (Path(new) / ABOUT).read_bytes()
        name = hashlib.sha256(remote.encode() + content).hexdigest()[:12]
        folder = cache / f"stream-{name}"
        with FileLock(cache / f".stream-{name}.lock"):
            for part in json.loads(content)["digest"]:
                (folder / part).mkdir(parents=True, exist_ok=True)
                for file in ("labels.npy", "index.json"):
                    download(f"{remote}/{part}/{file}", folder / part / file)
            download(f"{remote}/paths.json", folder / "paths.json")
            (folder / ABOUT).write_bytes(content)
    except OSError as error:
        reason = f"cannot be written ({error.strerror or error}); free disk space or choose another directory"
        raise InputError(f"data.cache_dir={cache_dir} {reason}") from error
    return folder


def download(remote: str, path: Path) -> None:
    """Download a file with litdata, unless it already exists.

    Raises:
        InputError: if the file cannot be downloaded, or litdata is not installed.
    """
    try:
        downloader(remote.rpartition("/")[0], os.getpid()).download_file(remote, str(path))
        path.stat()  # litdata silently skips a file that it cannot lock
    except Exception as error:  # each store raises its own types
        if isinstance(error, ImportError) and (error.name or "").startswith("litdata"):
            raise InputError(f"data.root={remote} needs litdata: pip install litdata") from error
        [reason, *_] = str(error).splitlines() or [""]
        raise InputError(f"data.root: {remote} cannot be downloaded ({type(error).__name__}: {reason})") from error


@functools.cache
def downloader(remote: str, process: int) -> Any:
    """The downloader of a remote directory: one for each process, since connections do not survive a fork."""
    from litdata.streaming.downloader import get_downloader

    return get_downloader(remote, "", [])
