"""The LightningDataModule: the images of one data source, in batches."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vit_lightning.config import ConfigT, DataConfig
from vit_lightning.data.cache import ImageArrays
from vit_lightning.data.sources import load_arrays
from vit_lightning.data.splits import split_indices
from vit_lightning.devices import derived_seed
from vit_lightning.keys import InputError


class ImageData(L.LightningDataModule):
    """Images of one source as batches of uint8 images (B, C, h, w) and int64 labels (B,).

    In validation and test, every image counts exactly once. With ``data.workers=0``, on a GPU whose free memory is more
    than twice the size of the images, the images stay on the GPU, and no batch is copied.

    Args:
        data: configuration of the source, split and batches.
        image_size: S, side of the network's images in pixels, on which the stored size may depend.
        seed: seed of the order of the training images.
    """

    def __init__(self, data: DataConfig, image_size: int, seed: int = 0) -> None:
        super().__init__()
        self.config = data
        self.image_size = image_size
        self.seed = seed
        self.arrays: ImageArrays | None = None
        self.resident: dict[str, tuple[Tensor, Tensor]] = {}
        self.resume_position: dict[str, int] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the training images, so that a run can be resumed within an epoch."""
        loader = self._training_loader()
        return {} if loader is None else loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the position.

        A schedule that needs the number of steps makes the Trainer create its loader before this call, so an existing
        loader is moved as well.
        """
        self.resume_position = state_dict
        loader = self._training_loader()
        if loader is not None:
            loader.load_state_dict(state_dict)

    def _training_loader(self) -> "ResumableLoader | None":
        """The Trainer's loader; ``None`` outside training."""
        loader = self.trainer.train_dataloader if self.trainer else None
        return loader if isinstance(loader, ResumableLoader) else None

    def prepare_data(self) -> None:
        """Download and decode images that are not cached yet."""
        if self.arrays is None:
            load_arrays(self.config, self.image_size)

    def setup(self, stage: str | None = None) -> None:
        """Open the images and split them.

        Raises:
            InputError: if the source cannot be read, or is too small for the split or the batch size.
        """
        if self.arrays is not None:
            return
        arrays = load_arrays(self.config, self.image_size)
        self.indices = split_indices(arrays, self.config)
        count = len(self.indices["train"])
        if count and self.config.batch_size > count:
            raise InputError(f"data.batch_size={self.config.batch_size} exceeds the {count} training images")
        self.mean = torch.tensor(arrays.mean)
        self.std = torch.tensor(arrays.std)
        self.class_names = arrays.class_names
        self.channels = next(iter(arrays.images.values())).shape[1]
        self.arrays = arrays

    def train_dataloader(self) -> DataLoader:
        """Return training batches, in a different order each epoch; the last incomplete batch is dropped."""
        return self._loader("train", self.config.batch_size, shuffle=True)

    def eval_dataloader(self, split: str) -> DataLoader:
        """Return every image of ``train``, ``val`` or ``test`` once, in order.

        Raises:
            InputError: if the split has no images.
        """
        if not len(self.indices[split]):
            raise InputError(f"data.source={self.config.source}, data.root={self.config.root} has no {split} images")
        return self._loader(split, self.config.eval_batch_size, shuffle=False)

    def val_dataloader(self) -> DataLoader:
        """Return every validation image once, in order."""
        return self.eval_dataloader("val")

    def test_dataloader(self) -> DataLoader:
        """Return every test image once, in order."""
        return self.eval_dataloader("test")

    def stored(self, split: str, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images (n, C, h, w), uint8, and labels (n,) at n positions of a split, on the CPU."""
        assert self.arrays is not None, "call setup() first"
        part, indices = self._part(split), self.indices[split][positions]
        return self.arrays.images[part][indices], self.arrays.labels[part][indices]

    def class_counts(self) -> Tensor:
        """Number of training images of each class: (classes,), int64."""
        assert self.arrays is not None, "call setup() first"
        labels = self.arrays.labels[self._part("train")][self.indices["train"]]
        return torch.bincount(labels, minlength=len(self.class_names))

    def files(self, split: str) -> list[str] | None:
        """The files of a split's images, relative to ``data.root``; ``None`` if they are not files."""
        assert self.arrays is not None, "call setup() first"
        if not len(self.indices[split]):
            return []
        paths = self.arrays.paths.get(self._part(split))
        return None if paths is None else [paths[index] for index in self.indices[split].tolist()]

    def _loader(self, split: str, batch_size: int, shuffle: bool) -> DataLoader:
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        share = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        images, labels = self._on_device(self._part(split), device)
        sampler = BatchIndices(self.indices[split], batch_size, shuffle, self.seed, share)
        if not isinstance(images, Tensor):
            sampler.order = images.shuffled
        if shuffle:
            sampler.resume_position = self.resume_position
            if self.config.sampler == "balanced":
                sampler.weights = 1 / self.class_counts().double()[labels[self.indices[split]].cpu()]
        return ResumableLoader(
            ArrayDataset(images, labels),
            sampler=sampler,
            batch_size=None,  # the sampler yields whole batches
            num_workers=self.config.workers,
            persistent_workers=self.config.workers > 0,
            pin_memory=device.type == "cuda" and images.device.type == "cpu",
        )

    def _part(self, split: str) -> str:
        """The part of the source that contains the images of a split."""
        assert self.arrays is not None, "call setup() first"
        if split in self.arrays.images:
            return split
        blog = split == "val" and self.config.split == "blog" and "test" in self.arrays.images
        return "test" if blog else "train"

    def _on_device(self, part: str, device: torch.device) -> tuple[Any, Tensor]:
        """The images and labels of a part of the source, on the GPU if they fit there along with a network."""
        assert self.arrays is not None
        images, labels = self.arrays.images[part], self.arrays.labels[part]
        if device.type != "cuda" or self.config.workers or not isinstance(images, Tensor):
            return images, labels
        if part not in self.resident and images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            self.resident[part] = images.to(device), labels.to(device)
        return self.resident.get(part, (images, labels))


def follow_data(config: ConfigT, data: ImageData) -> ConfigT:
    """Set the number of classes and channels from the data, and check ``augment.crop`` against the images' size.

    Raises:
        InputError: if ``model.num_classes`` or ``model.channels`` is set to another number, or the crop is too large.
    """
    assert data.arrays is not None, "call setup() first"
    side = next(iter(data.arrays.images.values())).shape[-1]
    if config.augment.crop >= side:
        raise InputError(f"augment.crop={config.augment.crop} must be less than the images' {side} pixels")
    classes, channels = len(data.class_names), data.channels
    for key, found in (("num_classes", classes), ("channels", channels)):
        wanted = getattr(config.model, key)
        if wanted not in (None, found):
            raise InputError(
                f"model.{key}={wanted}, but data.source={config.data.source} has {found}; leave model.{key} out"
            )
    return replace(config, model=replace(config.model, num_classes=classes, channels=channels))


class ArrayDataset(Dataset):
    """Gathers whole batches from arrays: ``dataset[indices]`` with an int64 tensor (B,)."""

    def __init__(self, images: Any, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        indices = indices.to(self.images.device)
        return self.images[indices], self.labels[indices]


def shuffled(indices: Tensor, generator: torch.Generator) -> Tensor:
    """Indices in random order."""
    return indices[torch.randperm(len(indices), generator=generator)]


class BatchIndices(Sampler[Tensor]):
    """Yields batches of indices, in an order that depends only on the seed and the epoch's number.

    Args:
        indices: int64 of shape (number of images,).
        batch_size: number of indices per batch.
        shuffle: whether to shuffle each epoch and drop its last incomplete batch, as in training.
        seed: seed of the orders.
        share: rank of the process and number of processes, among which every batch is divided.
    """

    def __init__(
        self, indices: Tensor, batch_size: int, shuffle: bool, seed: int, share: tuple[int, int] = (0, 1)
    ) -> None:
        self.indices = indices
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.weights: Tensor | None = None  # sampling weights of the indices, if epochs are drawn with replacement
        self.rank, self.processes = share
        self.order: Callable[[Tensor, torch.Generator], Tensor] = shuffled  # how an epoch is shuffled
        self.epoch = 0
        self.resume_position: dict[str, int] = {}  # the interrupted epoch and its number of completed batches

    def set_epoch(self, epoch: int) -> None:
        """Select the order; the Trainer calls this at the start of every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(len(self.indices), self.batch_size)
        return full + (rest > 0 and not self.shuffle)

    @property
    def first(self) -> int:
        """Index of the first batch to yield: 0, except in an epoch that was interrupted."""
        return self.resume_position["batches"] if self.epoch == self.resume_position.get("epoch") else 0

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.batches()[self.first :]

    def batches(self) -> list[Tensor]:
        """Return this process's share of all batches of the epoch."""
        order = self.indices
        if self.shuffle:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch, "order"))
            if self.weights is None:
                order = self.order(order, generator)
            else:
                order = order[self.weights.multinomial(len(order), replacement=True, generator=generator)]
        batches = order.split(self.batch_size)[: len(self)]
        if self.processes > 1 and not self.shuffle:
            batches = order.tensor_split(len(self))  # even parts, so that every process gets an image of each batch
        return [batch.tensor_split(self.processes)[self.rank] for batch in batches]


class ResumableLoader(DataLoader):
    """Counts the batches that it has yielded in an epoch; its sampler is a :class:`BatchIndices`."""

    sampler: BatchIndices
    yielded = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:  # type: ignore[override]
        self.yielded = self.sampler.first  # runs only after the Trainer has set the epoch
        for batch in super().__iter__():
            self.yielded += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the current position."""
        return {"epoch": self.sampler.epoch, "batches": self.yielded}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue from a position."""
        self.sampler.resume_position = state_dict
