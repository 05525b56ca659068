"""The LightningModule: metrics against scikit-learn, checkpoints, optimizer."""

from dataclasses import asdict

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from conftest import TRAINER
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
from torch.utils.data import DataLoader, TensorDataset

from vit_lightning.config import ModelConfig, OptimConfig
from vit_lightning.recipe.classifier import ViTClassifier

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*logging interval")


def classifier(classes: int = 11, **optim) -> ViTClassifier:
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
    )


def loader(classes: int = 11, count: int = 53, batch_size: int = 20) -> DataLoader:
    """The last batch is smaller: means of batch means would differ from means over samples."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 1, 6, 6, generator=generator) * 5
    return DataLoader(TensorDataset(images, torch.arange(count) % classes), batch_size=batch_size)


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


def test_with_few_classes_top5_is_certain():
    [metrics] = L.Trainer(**TRAINER).test(classifier(classes=3), loader(classes=3), verbose=False)
    assert metrics["test/acc5"] == 1.0


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
    module = classifier(label_smoothing=0.3).eval()
    module.trainer = L.Trainer(**TRAINER)
    module.trainer.state.fn = "fit"
    module.log_dict = module.log = lambda *args, **kwargs: None
    images, labels = torch.randn(7, 1, 6, 6), torch.arange(7)
    shares = F.one_hot(labels, 11).float()
    if mixed:
        shares = labels = torch.lerp(shares, shares.roll(1, 0), 0.25)
    logits = module(images)
    smooth = 0.7 * shares + 0.3 / 11
    expected = -(smooth * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(module.training_step((images, labels), 0), expected)
    if not mixed:
        module.validation_step((images, labels), 0)
        plain = -logits.log_softmax(1).gather(1, labels[:, None]).mean()
        torch.testing.assert_close(module.metrics["val/loss"].compute(), plain)


def test_gradients_of_both_optimizers_are_clipped_together(monkeypatch):
    module, norms = classifier(name="muon", lr=0.01, schedule="constant", warmup=0.0), []

    def keep(*_):  # after the step, whose gradients are still there
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in module.net.parameters()]).item())

    monkeypatch.setattr(module, "on_train_batch_end", keep)
    L.Trainer(**TRAINER, max_steps=3, gradient_clip_val=0.01).fit(module, loader(), loader())
    assert norms == pytest.approx([0.01] * 3, rel=1e-3)


def test_the_first_part_of_a_run_sees_small_images(monkeypatch):
    module, sizes = classifier(small_size=3, small_share=0.5), []
    forward = module.net.forward
    monkeypatch.setattr(module.net, "forward", lambda images: (sizes.append(images.shape[-1]), forward(images))[1])
    L.Trainer(**TRAINER, max_epochs=2, num_sanity_val_steps=0).fit(module, loader(), loader())
    training, validation = [3, 3, 3], [6, 6, 6]
    assert sizes == [*training, *validation, 6, 6, 6, *validation]
