"""The LightningModule: transforms against torchvision, metrics against scikit-learn, checkpoints, optimizer."""

import csv
from dataclasses import asdict

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from conftest import TRAINER
from lightning.pytorch.loggers import CSVLogger
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from vit_lightning import register
from vit_lightning.config import AugmentConfig, ModelConfig, OptimConfig
from vit_lightning.keys import InputError
from vit_lightning.recipe.classifier import ViTClassifier

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*logging interval")


def classifier(
    classes: int = 11,
    augment: AugmentConfig | None = None,
    seed: int = 0,
    class_weights: list[float] | None = None,
    **optim,
) -> ViTClassifier:
    if class_weights is not None:
        optim["class_weights"] = "balanced"
    model = ModelConfig(
        image_size=6, patch_size=3, channels=1, num_classes=classes, embed_dim=8, heads=2, layers=2, mlp_head_units=[7]
    )
    torch.manual_seed(0)
    return ViTClassifier(
        model=asdict(model),
        optim=asdict(OptimConfig(**optim)),
        class_names=[f"class {index}" for index in range(classes)],
        mean=[0.5],
        std=[0.25],
        augment=asdict(augment) if augment else None,
        seed=seed,
        class_weights=class_weights,
    )


def loader(classes: int = 11, count: int = 53, batch_size: int = 20) -> DataLoader:
    """The last batch is smaller: means of batch means would differ from means over samples."""
    return DataLoader(TensorDataset(pictures(count), torch.arange(count) % classes), batch_size=batch_size)


def pictures(count: int, height: int = 6, width: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 1, height, width), generator=generator, dtype=torch.uint8)


def network_inputs(module: ViTClassifier, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """A list of what the network gets from now on."""
    seen, forward = [], module.net.forward
    monkeypatch.setattr(module.net, "forward", lambda x: (seen.append(x), forward(x))[1])
    return seen


@pytest.mark.parametrize("size", [(6, 6), (3, 3), (10, 20), (20, 10), (13, 7), (64, 9)])
def test_images_of_any_size_are_cropped_resized_and_normalised_as_by_torchvision(size):
    module, images = classifier().eval(), pictures(5, *size)
    steps = [v2.CenterCrop(min(size)), v2.ToDtype(torch.float32, scale=True), v2.Resize((6, 6))]
    # Of an odd difference, torchvision rounds the offset to even.
    if (size[0] - size[1]) % 2:
        offset = abs(size[0] - size[1]) // 2
        top, left = (offset, 0) if size[0] > size[1] else (0, offset)
        steps[0] = v2.Lambda(lambda image: v2.functional.crop(image, top, left, min(size), min(size)))
    expected = v2.Compose([*steps, v2.Normalize([0.5], [0.25])])(images)
    torch.testing.assert_close(module.normalise(images), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(module(images), module.net(expected), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(module.classify(images), module.net(expected).softmax(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", [0, 3])
def test_a_steps_random_numbers_follow_from_the_seed_alone(seed):
    module, images, labels = classifier(augment=AugmentConfig(), seed=seed), pictures(20), torch.arange(20) % 11
    first, _ = module.augmented(images, labels)
    dropout = torch.rand(3)
    torch.rand(1)
    again, _ = classifier(augment=AugmentConfig(), seed=seed).augmented(images, labels)
    assert torch.equal(first, again)
    assert torch.equal(dropout, torch.rand(3))
    other, _ = classifier(augment=AugmentConfig(), seed=seed + 1).augmented(images, labels)
    assert not torch.equal(first, other)


def test_only_training_images_are_augmented(monkeypatch):
    module = classifier(augment=AugmentConfig(rotation=0, flip=1))
    inputs = network_inputs(module, monkeypatch)
    L.Trainer(**TRAINER, max_epochs=1, num_sanity_val_steps=0).fit(module, loader(), loader())
    plain = module.normalise(pictures(53))
    torch.testing.assert_close(torch.cat(inputs[:3]), plain.flip(-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(inputs[3:]), plain, rtol=1e-4, atol=1e-4)


def test_without_an_augmentation_training_images_are_as_in_evaluation():
    module, images, labels = classifier(), pictures(7, 12, 10), torch.arange(7)
    x, same = module.augmented(images, labels)
    torch.testing.assert_close(x, module.normalise(images), rtol=1e-4, atol=1e-4)
    assert torch.equal(same, labels)


def test_labels_of_mixed_images_are_probabilities_in_training_alone():
    """Through the Trainer: the loss and the metrics of a run take them too."""
    module = classifier(augment=AugmentConfig(cutmix=1.0))
    _, targets = module.augmented(pictures(20), torch.arange(20) % 11)
    assert targets.shape == (20, 11)
    torch.testing.assert_close(targets.sum(1), torch.ones(20))
    assert ((targets > 0) & (targets < 1)).any()
    trainer = L.Trainer(**TRAINER, max_epochs=1)
    trainer.fit(module, loader(), loader())
    assert 0 <= trainer.callback_metrics["train/acc"] <= 1
    images, labels = loader().dataset.tensors
    [metrics] = trainer.validate(module, loader(), verbose=False)
    guesses = module.eval().classify(images).argmax(1)
    assert metrics["val/acc"] == pytest.approx(accuracy_score(labels, guesses))


def test_policies_and_mixing_end_before_the_run_does(monkeypatch):
    augment = AugmentConfig(policy="trivial", erase=1.0, mixup=0.8, cutmix=1.0, until=0.5, rotation=0, flip=0)
    module, images, labels = classifier(augment=augment), pictures(9), torch.arange(9)
    monkeypatch.setattr(module, "progress", lambda: 0.49)
    assert module.augmented(images, labels)[1].ndim == 2
    monkeypatch.setattr(module, "progress", lambda: 0.5)
    x, plain = module.augmented(images, labels)
    torch.testing.assert_close(x, module.normalise(images), rtol=1e-4, atol=1e-4)
    assert plain is labels


@pytest.mark.parametrize("policy", ["trivial", "none"])
def test_mixed_precision_augments_in_full_precision(policy):
    module = classifier(augment=AugmentConfig(policy=policy, mixup=0.4))
    batch = pictures(20, 32, 32), torch.arange(20) % 11
    expected = module.augmented(*batch)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module.augmented(*batch), expected, rtol=0, atol=0)


def test_under_a_plain_trainer_every_stage_is_logged(tmp_path):
    """With Lightning's own logger, and none of this project's callbacks."""
    module = classifier()
    trainer = L.Trainer(**{**TRAINER, "logger": CSVLogger(tmp_path, name="", version="")}, max_epochs=2)
    trainer.fit(module, loader(), loader())
    trainer.test(module, loader(), verbose=False)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for stage, count in (("train", 2), ("val", 2), ("test", 1)):
        for name in ("loss", "acc", "acc5"):
            assert len([row for row in rows if row[f"{stage}/{name}"]]) == count, f"{stage}/{name}"
    assert not [name for name in rows[0] if name.endswith("images")]
    assert trainer.callback_metrics["test/images"] == 53


@pytest.mark.parametrize("stage", ["val", "test"])
def test_metrics_are_scikit_learns_over_all_samples(stage):
    module, data = classifier(), loader()
    trainer = L.Trainer(**TRAINER)
    run = trainer.validate if stage == "val" else trainer.test
    [metrics] = run(module, data, verbose=False)

    images, labels = data.dataset.tensors
    with torch.no_grad():
        probabilities = module.eval()(images).double().softmax(-1).numpy()
    every = list(range(11))
    assert metrics[f"{stage}/loss"] == pytest.approx(log_loss(labels, probabilities, labels=every), rel=1e-5)
    assert metrics[f"{stage}/acc"] == pytest.approx(accuracy_score(labels, probabilities.argmax(-1)))
    top5 = top_k_accuracy_score(labels, probabilities, k=5, labels=every)
    assert metrics[f"{stage}/acc5"] == pytest.approx(top5)
    assert 0 < metrics[f"{stage}/acc"] < top5 < 1


@pytest.mark.parametrize("classes", [3, 10, 11])
def test_top5_is_measured_of_more_than_ten_classes(classes):
    [metrics] = L.Trainer(**TRAINER).test(classifier(classes), loader(classes), verbose=False)
    assert ("test/acc5" in metrics) == (classes == 11)


def test_it_learns_and_logs_training_metrics():
    module = classifier(lr=1e-2)
    trainer = L.Trainer(**TRAINER, max_epochs=1)
    trainer.fit(module, loader(), loader())
    first = {name: trainer.callback_metrics[name].item() for name in ("train/loss", "val/loss")}
    assert {"train/acc", "train/acc5", "val/acc", "val/acc5"} <= trainer.callback_metrics.keys()
    trainer = L.Trainer(**TRAINER, max_epochs=30)
    trainer.fit(module, loader(), loader())
    assert trainer.callback_metrics["train/loss"] < first["train/loss"] - 0.2
    assert trainer.callback_metrics["val/loss"] < first["val/loss"] - 0.2


def test_a_checkpoint_needs_nothing_else(tmp_path):
    module = classifier(lr=1e-2)
    trainer = L.Trainer(**TRAINER, max_epochs=1)
    trainer.fit(module, loader(), loader())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = ViTClassifier.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True).eval()
    images, _ = loader().dataset.tensors
    assert torch.equal(loaded(images), module.eval()(images))
    assert loaded.hparams["class_names"][10] == "class 10"
    assert loaded.hparams["mean"] == [0.5]
    assert loaded.hparams["model"]["mlp_head_units"] == [7]


def test_the_schedule_spans_the_run():
    module = classifier(lr=0.5, schedule="cosine")
    trainer = L.Trainer(**TRAINER, max_epochs=2)
    trainer.fit(module, loader(), loader())
    assert trainer.global_step == 6
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("mixed", [False, True])
def test_labels_are_smoothed_in_training_alone(mixed):
    """Szegedy et al., 2016, section 7: a share of each label goes evenly to all classes."""
    augment = AugmentConfig(mixup=0.4) if mixed else None
    module = classifier(label_smoothing=0.3, augment=augment).eval()
    module.log = lambda *args, **kwargs: None
    images, labels = pictures(7), torch.arange(7)
    x, targets = module.augmented(images, labels)
    shares = targets if mixed else F.one_hot(labels, 11).float()
    smooth = 0.7 * shares + 0.3 / 11
    expected = -(smooth * module.net(x).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(module.training_step((images, labels), 0), expected)
    module.validation_step((images, labels), 0)
    plain = -module(images).log_softmax(1).gather(1, labels[:, None]).mean()
    torch.testing.assert_close(module.val_metrics["loss"].compute(), plain)


@pytest.mark.parametrize("mixed", [False, True])
def test_class_weights_count_in_the_training_loss_alone(mixed, tmp_path):
    weights = [0.5, 4.0, *[1.0] * 9]
    augment = AugmentConfig(mixup=0.4) if mixed else None
    module = classifier(augment=augment, class_weights=weights, label_smoothing=0.1).eval()
    module.log = lambda *args, **kwargs: None
    images, labels = pictures(7), torch.arange(7)
    x, targets = module.augmented(images, labels)
    tensor = torch.tensor(weights)
    expected = F.cross_entropy(module.net(x), targets, tensor, reduction="sum", label_smoothing=0.1) / 7
    torch.testing.assert_close(module.training_step((images, labels), 0), expected)
    module.validation_step((images, labels), 0)
    torch.testing.assert_close(module.val_metrics["loss"].compute(), F.cross_entropy(module(images), labels))

    trainer = L.Trainer(**TRAINER, max_epochs=1)
    del module.log
    trainer.fit(module.train(), loader(), loader())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = ViTClassifier.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert loaded.class_weights.tolist() == weights
    assert not [name for name in loaded.state_dict() if "class_weights" in name]


def test_a_loss_that_takes_no_class_weights_is_refused(registries):
    register.loss("plain")(lambda logits, targets, label_smoothing: F.cross_entropy(logits, targets))
    register.loss("own", weight=1.0)(lambda logits, targets, label_smoothing, weight: weight * logits.sum())
    for name in ("plain", "own"):
        classifier(loss=name)
        with pytest.raises(
            InputError, match=rf"optim\.class_weights=balanced: optim\.loss={name} takes no class weigh"
        ):
            classifier(loss=name, class_weights=[1.0] * 11)


def test_gradients_of_both_optimizers_are_clipped_together(monkeypatch):
    module, norms = classifier(name="muon", lr=0.01, schedule="constant", warmup=0.0), []

    def keep(*_):  # after the step, whose gradients are still there
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in module.net.parameters()]).item())

    monkeypatch.setattr(module, "on_train_batch_end", keep)
    L.Trainer(**TRAINER, max_steps=3, gradient_clip_val=0.01).fit(module, loader(), loader())
    assert norms == pytest.approx([0.01] * 3, rel=1e-3)


def test_the_first_part_of_a_run_sees_small_images(monkeypatch):
    module = classifier(small_size=3, small_share=0.5)
    inputs = network_inputs(module, monkeypatch)
    L.Trainer(**TRAINER, max_epochs=2, num_sanity_val_steps=0).fit(module, loader(), loader())
    training, validation = [3, 3, 3], [6, 6, 6]
    assert [x.shape[-1] for x in inputs] == [*training, *validation, 6, 6, 6, *validation]
