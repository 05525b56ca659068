"""The LightningModule: transforms, network, loss, metrics and optimizer."""

from dataclasses import replace
from typing import Any, cast

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torchmetrics import MeanMetric, MetricCollection, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from vit_lightning.config import AugmentConfig, ModelConfig, OptimConfig
from vit_lightning.data.module import derived_seed
from vit_lightning.model.vit import ViT
from vit_lightning.recipe.augment import eval_transform, mix, resize, train_transform
from vit_lightning.recipe.optim import build_optimizer, build_schedule


class ImageCount(SumMetric):
    """The number of images that the other metrics of a collection are computed from."""

    def update(self, target: Tensor) -> None:  # type: ignore[override]
        """Count a batch by its labels (B,)."""
        super().update(len(target))


def build_metrics(classes: int) -> MetricCollection:
    """Everything that is measured in training, validation and testing.

    A batch updates a metric with those of ``preds`` (logits), ``target``, ``value`` (the loss) and ``weight`` (the
    number of images) that its ``update`` takes.
    """
    metrics = {
        "loss": MeanMetric(),
        "acc": MulticlassAccuracy(classes, average="micro", validate_args=False),
        # With fewer than five classes, any five guesses include the label.
        "acc5": MulticlassAccuracy(classes, top_k=min(5, classes), average="micro", validate_args=False),
        "images": ImageCount(),
    }
    # Metrics whose states are equal after one batch, as top-1 and top-5 may be, would otherwise be merged.
    return MetricCollection(cast(dict[str, Any], metrics), compute_groups=False)


class ViTClassifier(L.LightningModule):
    """A Vision Transformer from uint8 images to logits, trained with cross-entropy.

    Every argument is a plain container that is saved in the checkpoint: ``ViTClassifier.load_from_checkpoint(path)``
    needs nothing else.

    Args:
        model: fields of :class:`~vit_lightning.config.ModelConfig`, with ``num_classes`` and ``channels`` set.
        optim: fields of :class:`~vit_lightning.config.OptimConfig`.
        class_names: names of the classes, in the order of the logits.
        mean: mean of each channel of the training images, in [0, 1], used for normalisation.
        std: standard deviation of each channel, likewise.
        data: fields of :class:`~vit_lightning.config.DataConfig`: the training data, if known.
        augment: fields of :class:`~vit_lightning.config.AugmentConfig`; ``None`` for no augmentation.
        seed: seed of the random numbers of the training steps.

    Attributes:
        log_curves: whether metrics are passed to the Trainer's logger; turned off by a callback that does so itself.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: dict[str, Any],
        optim: dict[str, Any],
        class_names: list[str],
        mean: list[float],
        std: list[float],
        data: dict[str, Any] | None = None,
        augment: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.net = ViT(ModelConfig(**model))
        self.augment = AugmentConfig(**(augment or {"rotation": 0.0, "flip": 0.0}))
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)
        side = self.net.image_size
        # The model summary computes sizes and FLOPs from it.
        self.example_input_array = torch.zeros(1, self.net.channels, side, side, dtype=torch.uint8)
        metrics = build_metrics(len(class_names))
        self.train_metrics = metrics.clone(prefix="train/")
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")
        self.log_curves = True

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits of stored images.

        Args:
            images: (B, C, h, w), uint8, of any height and width, on any device; the central square is used.

        Returns:
            (B, num_classes), on the classifier's device.
        """
        return self.net(self.normalise(images))

    def normalise(self, images: Tensor) -> Tensor:
        """Convert stored images (B, C, h, w), uint8, to the network's input (B, C, S, S), float32."""
        return eval_transform(images.to(self.mean.device), self.net.image_size, self.mean, self.std)

    @torch.inference_mode()
    def classify(self, images: Tensor, tta: bool = False) -> Tensor:
        """Compute the class probabilities of stored images.

        Args:
            images: (B, C, h, w), uint8, as :meth:`forward` takes them.
            tta: whether the probabilities of an image and its mirror image are averaged.

        Returns:
            (B, num_classes), float32, on the classifier's device.

        Raises:
            ValueError: if the classifier is in training mode.
        """
        if self.training:
            raise ValueError("classify() requires evaluation mode: call eval() first")
        x = self.normalise(images)
        probabilities = self.net(x).softmax(dim=-1)
        return (probabilities + self.net(x.flip(-1)).softmax(dim=-1)) / 2 if tta else probabilities

    def augmented(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Transform a training batch for the current step; repeated calls return the same result.

        The step's random numbers (augmentation, then dropout) are seeded here by its number alone, so that a resumed
        run repeats them.

        Args:
            images: (B, C, h, w), uint8, on the classifier's device.
            labels: (B,), int64.

        Returns:
            The network's input (B, C, S, S), float32, where S is ``optim.small_size`` in the first
            ``optim.small_share`` of the run if it is set; and the labels, or if images are mixed the class
            probabilities (B, num_classes).
        """
        use = f"step {self.global_rank}" if self.global_rank else "step"
        torch.manual_seed(derived_seed(self.hparams["seed"], self.global_step, use))
        config, optim = self.augment, self.hparams["optim"]
        if config.until < 1 and self.progress() >= config.until:
            config = replace(config, policy="none", erase=0.0, mixup=0.0, cutmix=0.0)
        with torch.autocast(images.device.type, enabled=False):  # coordinates need float32
            x = train_transform(images, self.net.image_size, self.mean, self.std, config)
            if config.mixup or config.cutmix:
                x, labels = mix(x, labels, len(self.hparams["class_names"]), config)
            if optim["small_size"] is not None and self.progress() < optim["small_share"]:
                x = resize(x, optim["small_size"])
        return x, labels

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy of an augmented batch, with dropout."""
        x, targets = self.augmented(*batch)
        logits = self.net(x)
        loss = F.cross_entropy(logits, targets, label_smoothing=self.hparams["optim"]["label_smoothing"])
        labels = targets.argmax(dim=1) if targets.ndim == 2 else targets  # of a mixed image, the larger share
        self._measure("train", logits, labels, loss)
        self.log("loss", loss, on_step=True, on_epoch=False, prog_bar=True, logger=False)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Update the ``val/…`` metrics with a batch, and return its logits."""
        return self._evaluate("val", *batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Update the ``test/…`` metrics with a batch."""
        self._evaluate("test", *batch)

    def _evaluate(self, stage: str, images: Tensor, labels: Tensor) -> Tensor:
        logits = self(images)
        self._measure(stage, logits, labels, F.cross_entropy(logits, labels))
        return logits

    def _measure(self, stage: str, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        metrics: MetricCollection = getattr(self, f"{stage}_metrics")
        metrics.update(preds=logits, target=labels, value=loss.detach(), weight=len(labels))
        for name, metric in metrics.items():
            shown = not name.endswith("/images")
            self.log(
                name,
                metric,
                on_step=False,
                on_epoch=True,
                prog_bar=shown and stage == "val",
                logger=None if shown and self.log_curves else False,
                batch_size=len(labels),
            )

    def on_validation_epoch_start(self) -> None:
        """Validate the first process's network in all processes: batch norms have different statistics in each."""
        if self.trainer.world_size > 1:
            for buffer in self.net.buffers():
                dist.broadcast(buffer, 0)

    def on_train_epoch_start(self) -> None:
        """Reset the metrics: a checkpoint written at the end of an epoch still holds that epoch's."""
        self.train_metrics.reset()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the metric states of the current epoch, summed over all processes."""
        states = {}
        for name, metric in self.train_metrics.items():
            with metric.sync_context():
                states[name] = {key: cast(Tensor, value).clone() for key, value in metric.metric_state.items()}
        checkpoint["metrics"] = states

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the metric states, in the first process only."""
        if self._trainer is None or not self.trainer.is_global_zero:
            return
        states = checkpoint.get("metrics", {})
        for name, metric in self.train_metrics.items():
            if name in states:
                metric.merge_state({key: value.to(metric.device) for key, value in states[name].items()})

    def progress(self) -> float:
        """Return the completed fraction of the training, by ``optim.clock``, in [0, 1]."""
        if self.hparams["optim"]["clock"] == "steps":
            return self.trainer.global_step / self.trainer.estimated_stepping_batches
        timer = timer_of(self.trainer)
        assert timer is not None
        left = timer.time_remaining()
        assert left is not None
        return timer.time_elapsed() / (timer.time_elapsed() + left)

    def configure_model(self) -> None:
        """With ``trainer.strategy=fsdp``, shard every block, and the rest of the network, over the processes."""
        if self._trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh = self.device_mesh["data_parallel"] if self.device_mesh is not None else None
            for block in self.net.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer, and a schedule that advances with every step."""
        config = OptimConfig(**self.hparams["optim"])
        optimizer = build_optimizer(self.net, config)
        elapsed = self.progress if config.clock == "time" else None
        schedule = build_schedule(optimizer, config, int(self.trainer.estimated_stepping_batches), elapsed)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def timer_of(trainer: L.Trainer) -> Timer | None:
    """Return the callback that enforces ``trainer.max_time``, or ``None`` if it is not set."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, Timer)), None)
