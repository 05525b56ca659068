"""The LightningDataModule: splits, batches and transforms of one data source."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vit_lightning.config import AugmentConfig, ConfigT, DataConfig, InputError
from vit_lightning.data.sources import ImageArrays, load_arrays
from vit_lightning.recipe.augment import eval_transform, mix, train_transform


class ImageData(L.LightningDataModule):
    """Images of one source as batches of normalised floats.

    Loaders yield uint8 images (B, C, h, w) and labels (B,); on the training device a batch then becomes
    float32 (B, C, S, S) by :mod:`vit_lightning.recipe.augment`. In validation and test every image counts once. With
    ``data.workers=0``, on a GPU whose free memory is more than twice as large as the images, they lie there, and no
    batch is copied.

    Args:
        data: source, split and batches.
        augment: random transforms of the training images.
        image_size: S, in pixels.
        seed: seed of the order of the training images, and of what is random in a step.
    """

    def __init__(self, data: DataConfig, augment: AugmentConfig, image_size: int, seed: int = 0) -> None:
        super().__init__()
        self.config = data
        self.augment = augment
        self.image_size = image_size
        self.seed = seed
        self.arrays: ImageArrays | None = None
        self.resident: dict[str, tuple[Tensor, Tensor]] = {}
        self.gone_before: dict[str, int] = {}

    def state_dict(self) -> dict[str, Any]:
        """Where the training images are, so that a run can go on within an epoch."""
        loader = self.trainer.train_dataloader if self.trainer else None
        return loader.state_dict() if isinstance(loader, ResumableLoader) else {}  # there is none outside of training

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`, also for a loader that is there already.

        The Trainer restores loaders as it makes them, which a schedule that asks for its steps has it do too early.
        """
        self.gone_before.update(state_dict)

    def prepare_data(self) -> None:
        """Download and decode what is not there yet."""
        if self.arrays is None:
            load_arrays(self.config, self.image_size)

    def setup(self, stage: str | None = None) -> None:
        """Open the arrays and split them.

        Raises:
            InputError: if the source cannot be read, or is too small for the split, the batch size or the crop.
        """
        if self.arrays is not None:
            return
        arrays = load_arrays(self.config, self.image_size)
        self.indices = split_indices(arrays, self.config)
        if self.config.batch_size > len(self.indices["train"]):
            raise InputError(
                f"data.batch_size={self.config.batch_size} exceeds the {len(self.indices['train'])} training images"
            )
        side = arrays.images["train"].shape[-1]
        if self.augment.crop >= side:
            raise InputError(f"augment.crop={self.augment.crop} must be less than the images' {side} pixels")
        self.mean = torch.tensor(arrays.mean)
        self.std = torch.tensor(arrays.std)
        self.class_names = arrays.class_names
        self.channels = arrays.images["train"].shape[1]
        self.arrays = arrays

    def train_dataloader(self) -> DataLoader:
        """Shuffled anew each epoch; the last incomplete batch is dropped."""
        return self._loader("train", self.config.batch_size, shuffle=True)

    def eval_dataloader(self, split: str) -> DataLoader:
        """Every image of ``train``, ``val`` or ``test``, once, in order."""
        return self._loader(split, self.config.eval_batch_size, shuffle=False)

    def val_dataloader(self) -> DataLoader:
        """Every validation image, once, in order."""
        return self.eval_dataloader("val")

    def test_dataloader(self) -> DataLoader:
        """Every test image, once, in order."""
        return self.eval_dataloader("test")

    def stored(self, split: str, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Images as they are stored (n, C, h, w), uint8, and labels (n,), at n positions of a split, on the CPU."""
        assert self.arrays is not None, "setup() comes first"
        part, indices = self._part(split), self.indices[split][positions]
        return self.arrays.images[part][indices], self.arrays.labels[part][indices]

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Transform a batch on the device it is on: randomly in training, plainly elsewhere.

        Where images are mixed, the labels become probabilities (B, classes).
        """
        images, labels = batch
        mean, std = self.mean.to(images.device), self.std.to(images.device)
        if self.trainer is not None and self.trainer.training:
            # Augmentation and dropout of a step follow from its number alone, so that a resumed run repeats them.
            use = f"step {self.trainer.global_rank}" if self.trainer.global_rank else "step"
            torch.manual_seed(derived_seed(self.seed, self.trainer.global_step, use))
            augment = self.augment
            if augment.until < 1 and cast(Any, self.trainer.lightning_module).progress() >= augment.until:
                augment = replace(augment, policy="none", erase=0.0, mixup=0.0, cutmix=0.0)
            images = train_transform(images, self.image_size, mean, std, augment)
            if augment.mixup or augment.cutmix:
                return mix(images, labels, len(self.class_names), augment)
            return images, labels
        return eval_transform(images, self.image_size, mean, std), labels

    def _loader(self, split: str, batch_size: int, shuffle: bool) -> DataLoader:
        assert self.arrays is not None, "setup() comes first"
        part = self._part(split)
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        share = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        images, labels = self._on_device(part, device)
        sampler = BatchIndices(self.indices[split], batch_size, shuffle, self.seed, share)
        if shuffle:
            sampler.gone_before = self.gone_before
        return ResumableLoader(
            ArrayDataset(images, labels),
            sampler=sampler,
            batch_size=None,  # the sampler makes the batches
            num_workers=self.config.workers,
            persistent_workers=self.config.workers > 0,
            pin_memory=device.type == "cuda" and images.device.type == "cpu",
        )

    def _part(self, split: str) -> str:
        """The source's own split that holds the images."""
        return "test" if split == "test" or (split == "val" and self.config.split == "blog") else "train"

    def _on_device(self, part: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """The images and labels of ``train`` or ``test``, on a GPU where they fit beside a network."""
        assert self.arrays is not None
        images, labels = self.arrays.images[part], self.arrays.labels[part]
        if device.type != "cuda" or self.config.workers:
            return images, labels
        if part not in self.resident and images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            self.resident[part] = images.to(device), labels.to(device)
        return self.resident.get(part, (images, labels))


def follow_data(config: ConfigT, data: ImageData) -> ConfigT:
    """Set the number of classes and channels from the data.

    Raises:
        InputError: if they are set, and otherwise.
    """
    classes, channels = len(data.class_names), data.channels
    for key, found in (("num_classes", classes), ("channels", channels)):
        wanted = getattr(config.model, key)
        if wanted not in (None, found):
            raise InputError(
                f"model.{key}={wanted}, but data.source={config.data.source} has {found}; leave model.{key} out"
            )
    return replace(config, model=replace(config.model, num_classes=classes, channels=channels))


def split_indices(arrays: ImageArrays, config: DataConfig) -> dict[str, Tensor]:
    """Indices of the training, validation and test images: validation's point into the test images in the blog split.

    Returns:
        ``train``, ``val`` and ``test``, each int64 of shape (number of images,).

    Raises:
        InputError: if a part would be empty, or a class too small to be in each.
    """
    n_train, n_test = len(arrays.labels["train"]), len(arrays.labels["test"])
    if config.split == "blog":
        # The same numbers as random_split(test_set, [n_val, n_test - n_val], generator=...).
        order = torch.randperm(n_test, generator=torch.Generator().manual_seed(config.split_seed))
        n_val = int(0.7 * n_test)
        if not 0 < n_val < n_test:
            raise InputError(f"data.split=blog cannot split {n_test} test image(s) 70/30; use data.split=standard")
        return {"train": torch.arange(n_train), "val": order[:n_val], "test": order[n_val:]}

    try:
        train, val = train_test_split(
            np.arange(n_train),
            test_size=config.val_fraction,
            random_state=config.split_seed,
            stratify=arrays.labels["train"].numpy(),
        )
    except ValueError as error:
        reason = f"data.val_fraction={config.val_fraction} cannot be held out class by class: {error}"
        raise InputError(reason) from error
    return {
        "train": torch.from_numpy(np.sort(train)),
        "val": torch.from_numpy(np.sort(val)),
        "test": torch.arange(n_test),
    }


class ArrayDataset(Dataset):
    """Gathers whole batches from arrays: ``dataset[indices]``, indices an int64 tensor."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        indices = indices.to(self.images.device)
        return self.images[indices], self.labels[indices]


class BatchIndices(Sampler[Tensor]):
    """Batches of indices. The order of an epoch follows from the seed and the epoch's number and from nothing else.

    Args:
        indices: (number of images,).
        batch_size: indices of a batch.
        shuffle: whether each epoch has an order of its own and drops its last incomplete batch (training).
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
        self.rank, self.processes = share
        self.epoch = 0
        self.gone_before: dict[str, int] = {}  # epoch and batches at which a run goes on

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; the Trainer calls this at the start of every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(len(self.indices), self.batch_size)
        return full + (rest > 0 and not self.shuffle)

    @property
    def first(self) -> int:
        """The number, from 0, of the epoch's next batch to be given: 0 but in an epoch that was interrupted."""
        return self.gone_before["batches"] if self.epoch == self.gone_before.get("epoch") else 0

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.batches()[self.first :]

    def batches(self) -> list[Tensor]:
        """All batches of the epoch, this process's share of each."""
        order = self.indices
        if self.shuffle:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch, "order"))
            order = order[torch.randperm(len(order), generator=generator)]
        batches = order.split(self.batch_size)[: len(self)]
        if self.processes > 1 and not self.shuffle:
            batches = order.tensor_split(len(self))  # none so small that a process goes without
        return [batch.tensor_split(self.processes)[self.rank] for batch in batches]


class ResumableLoader(DataLoader):
    """Knows how many batches of an epoch it has given; takes :class:`BatchIndices`."""

    sampler: BatchIndices
    given = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:  # type: ignore[override]
        self.given = self.sampler.first  # at the first batch, when the Trainer has set the epoch
        for batch in super().__iter__():
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Where it is."""
        return {"epoch": self.sampler.epoch, "batches": self.given}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from there."""
        self.sampler.gone_before.update(state_dict)


def derived_seed(seed: int, number: int, use: str) -> int:
    """A seed for one use of one epoch or step of a run, which has nothing in common with those of others."""
    return int(np.random.SeedSequence([seed, number, *use.encode()]).generate_state(1, np.uint64)[0]) >> 1
