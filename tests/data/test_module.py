"""Splits and batches of the LightningDataModule."""

from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from conftest import TRAINER, write_folder
from scipy.stats import chisquare
from torch import nn
from torch.utils.data import WeightedRandomSampler, random_split

from vit_lightning.config import AugmentConfig, Config, DataConfig, ModelConfig
from vit_lightning.data.cache import ImageArrays
from vit_lightning.data.module import BatchIndices, ImageData, follow_data
from vit_lightning.data.splits import split_indices
from vit_lightning.keys import InputError


def arrays_of(train_labels: torch.Tensor, test_labels: torch.Tensor) -> ImageArrays:
    labels = {"train": train_labels, "test": test_labels}
    images = {split: torch.zeros(len(values), 1, 1, 1, dtype=torch.uint8) for split, values in labels.items()}
    return ImageArrays(images, labels, ["a", "b"], [0.0], [1.0], {})


CIFAR_LIKE = arrays_of(torch.arange(50_000) % 100, torch.arange(10_000) % 100)


def test_blog_split_is_random_splits():
    parts = split_indices(CIFAR_LIKE, DataConfig(split="blog"))
    generator = torch.Generator().manual_seed(42)
    val, test = random_split(range(10_000), [7_000, 3_000], generator=generator)
    assert parts["val"].tolist() == list(val.indices)
    assert parts["test"].tolist() == list(test.indices)
    assert len(parts["train"]) == 50_000


def test_standard_split_holds_out_class_by_class_and_keeps_the_test_set():
    parts = split_indices(CIFAR_LIKE, DataConfig(split="standard", val_fraction=0.1))
    assert torch.equal(parts["test"], torch.arange(10_000))
    assert torch.equal(torch.cat([parts["train"], parts["val"]]).sort().values, torch.arange(50_000))
    assert torch.bincount(CIFAR_LIKE.labels["train"][parts["val"]]).tolist() == [50] * 100
    again = split_indices(CIFAR_LIKE, DataConfig(split="standard", val_fraction=0.1))
    other = split_indices(CIFAR_LIKE, DataConfig(split="standard", val_fraction=0.1, split_seed=1))
    assert torch.equal(parts["val"], again["val"])
    assert not torch.equal(parts["val"], other["val"])


def test_folds_are_a_stratified_cross_validation():
    arrays = arrays_of(torch.arange(100) % 4, torch.arange(8) % 4)
    parts = [split_indices(arrays, DataConfig(split="standard", folds=5, fold=fold)) for fold in range(5)]
    assert torch.equal(torch.cat([part["val"] for part in parts]).sort().values, torch.arange(100))
    for part in parts:
        assert torch.equal(torch.cat([part["train"], part["val"]]).sort().values, torch.arange(100))
        assert torch.bincount(arrays.labels["train"][part["val"]]).tolist() == [5] * 4
        assert torch.equal(part["test"], torch.arange(8))


def test_splits_that_cannot_be_made_are_refused():
    few = arrays_of(torch.tensor([0] * 50 + [1] * 3), torch.arange(9))
    with pytest.raises(InputError, match=r"data\.folds=5 needs at least as many images of each class; b has 3"):
        split_indices(few, DataConfig(split="standard", folds=5))
    with pytest.raises(InputError, match=r"data\.fold=5 must be less than data\.folds=5"):
        DataConfig(split="standard", folds=5, fold=5)
    with pytest.raises(InputError, match=r"data\.folds=5 needs data\.split=standard"):
        DataConfig(split="blog", folds=5)
    with pytest.raises(InputError, match=r"data\.split=blog cannot split 1 test image"):
        split_indices(arrays_of(torch.tensor([0, 1]), torch.tensor([0])), DataConfig(split="blog"))
    with pytest.raises(InputError, match=r"data\.val_fraction=0\.1 cannot be held out class by class"):
        split_indices(arrays_of(torch.tensor([0] * 50 + [1]), torch.arange(9)), DataConfig(split="standard"))


def data_module(config: DataConfig, **arguments) -> ImageData:
    data = ImageData(config, **{"image_size": 12, **arguments})
    data.setup()
    return data


def seen(loader) -> list[bytes]:
    return [image.numpy().tobytes() for images, _ in loader for image in images]


@pytest.mark.parametrize("split", ["blog", "standard"])
@pytest.mark.parametrize("eval_batch_size", [1, 4, 1000])
def test_every_evaluation_image_counts_once(folder_config, split, eval_batch_size):
    data = data_module(replace(folder_config, split=split, val_fraction=0.25, eval_batch_size=eval_batch_size))
    val, test = seen(data.val_dataloader()), seen(data.test_dataloader())
    arrays = data.arrays
    every = [image.numpy().tobytes() for image in arrays.images["test"]]
    if split == "blog":
        assert sorted(val + test) == sorted(every)
        assert (len(val), len(test)) == (14, 7)
    else:
        assert test == every
        train = {arrays.images["train"][i].numpy().tobytes() for i in data.indices["train"]}
        assert not train & set(val)
        assert len(train) + len(val) == 27


def test_training_batches_are_full_and_no_image_comes_twice(folder_config):
    data = data_module(folder_config)
    batches = list(data.train_dataloader())
    assert [len(labels) for _, labels in batches] == [5] * 5  # 27 images
    assert len(data.train_dataloader()) == 5
    assert len(set(seen(data.train_dataloader()))) == 25


def test_images_keep_their_labels(folder_config):
    data = data_module(folder_config)
    label_of = {
        image.numpy().tobytes(): label.item()
        for image, label in zip(data.arrays.images["train"], data.arrays.labels["train"], strict=True)
    }
    for images, labels in data.train_dataloader():
        assert [label_of[image.numpy().tobytes()] for image in images] == labels.tolist()


def test_the_order_follows_from_seed_and_epoch():
    def order(seed: int, epoch: int) -> list[int]:
        sampler = BatchIndices(torch.arange(100), 10, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        return torch.cat(list(sampler)).tolist()

    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    assert order(0, 1) == orders[1]
    for index, one in enumerate(orders):
        assert sorted(one) == list(range(100))
        assert one != list(range(100))
        assert one not in orders[:index]


def unequal(config: DataConfig, tmp_path: Path) -> DataConfig:
    write_folder(tmp_path / "unequal", {"many": (40, 4), "few": (5, 4)})
    return replace(config, root=str(tmp_path / "unequal"), sampler="balanced")


def drawn(data: ImageData, epochs: int) -> torch.Tensor:
    """How often each training image comes."""
    sampler = data.train_dataloader().sampler
    counts = torch.zeros(45)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        counts += torch.bincount(torch.cat(list(sampler)), minlength=45)
    return counts


def test_a_balanced_sampler_draws_as_torchs_weighted_one(folder_config, tmp_path):
    data = data_module(unequal(folder_config, tmp_path))
    labels = data.arrays.labels["train"]
    assert data.class_counts().tolist() == torch.bincount(labels).tolist()
    ours, weights = drawn(data, 400), 1 / torch.bincount(labels)[labels]
    theirs = torch.bincount(torch.tensor(list(WeightedRandomSampler(weights, 400 * 45))), minlength=45)
    assert ours.sum() == 400 * 45  # as many as without it
    for counts in (ours, theirs):
        assert chisquare(counts, weights / weights.sum() * 400 * 45).pvalue > 1e-4
    assert (torch.bincount(labels, ours) / ours.sum()).tolist() == pytest.approx([0.5, 0.5], abs=0.02)


def test_a_balanced_order_follows_from_seed_and_epoch_and_continues_where_it_stopped(folder_config, tmp_path):
    config = unequal(folder_config, tmp_path)

    def order(seed: int, epoch: int, batches: int = 0) -> list[int]:
        data = data_module(config, seed=seed)
        data.load_state_dict({"epoch": epoch, "batches": batches})
        sampler = data.train_dataloader().sampler
        sampler.set_epoch(epoch)
        return torch.cat(list(sampler)).tolist()

    assert order(0, 1) == order(0, 1)
    assert order(0, 1, batches=3) == order(0, 1)[3 * config.batch_size :]
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert sorted(order(0, 0)) != sorted(order(0, 1))


def test_workers_change_nothing(folder_config):
    workers, alone = data_module(replace(folder_config, workers=2)), data_module(folder_config)
    assert seen(workers.train_dataloader()) == seen(alone.train_dataloader())


def test_a_batch_larger_than_the_training_set_is_refused(folder_config):
    with pytest.raises(InputError, match=r"data\.batch_size=28 exceeds the 27 training images"):
        data_module(replace(folder_config, batch_size=28))


def test_a_crop_as_wide_as_the_images_is_refused(folder_config):
    with pytest.raises(InputError, match=r"augment\.crop=8 must be less than the images' 8 pixels"):
        follow_data(Config(data=folder_config, augment=AugmentConfig(crop=8)), data_module(folder_config))


def test_classes_and_channels_follow_the_data(folder_config):
    data = data_module(folder_config)
    for model in (ModelConfig(), ModelConfig(num_classes=3, channels=3)):
        followed = follow_data(Config(model=model, data=folder_config), data).model
        assert (followed.num_classes, followed.channels) == (3, 3)
    with pytest.raises(InputError, match=r"model\.num_classes=11, but data\.source=image_folder has 3; leave"):
        follow_data(Config(model=ModelConfig(num_classes=11), data=folder_config), data)
    with pytest.raises(InputError, match=r"model\.channels=1, but data\.source=image_folder has 3; leave"):
        follow_data(Config(model=ModelConfig(channels=1), data=folder_config), data)


class Keeper(L.LightningModule):
    """Keeps the batches that a Trainer hands it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.epochs: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        self.validation: list[torch.Tensor] = []

    def on_train_epoch_start(self) -> None:
        self.epochs.append([])

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.epochs[-1].append(batch)
        return self.scale * batch[0].float().mean()

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        self.validation.append(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_trainer_gets_stored_images_and_each_epoch_has_its_own_order(folder_config):
    data = ImageData(folder_config, image_size=12)
    keeper = Keeper()
    trainer = L.Trainer(**TRAINER, max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(keeper, data)

    index = {image.numpy().tobytes(): number for number, image in enumerate(data.arrays.images["train"])}
    orders = []
    for batches in keeper.epochs:
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        order = [index[image.numpy().tobytes()] for image in images]
        assert torch.equal(labels, data.arrays.labels["train"][order])
        orders.append(order)
    assert [len(set(order)) for order in orders] == [25, 25]  # of 27 images, in batches of 5
    assert orders[0] != orders[1]

    val = data.arrays.images["test"][data.indices["val"]]
    assert torch.equal(torch.cat(keeper.validation), torch.cat([val, val]))
