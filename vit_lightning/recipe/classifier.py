"""The LightningModule: a network with its loss, metrics and optimizer."""

from typing import Any, cast

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from vit_lightning.config import ModelConfig, OptimConfig
from vit_lightning.model.vit import ViT
from vit_lightning.recipe.augment import eval_transform, resize
from vit_lightning.recipe.optim import build_optimizer, build_schedule


class ViTClassifier(L.LightningModule):
    """A Vision Transformer trained with cross-entropy, its top-1 and top-5 accuracy.

    Every argument is a plain container, kept in the checkpoint: ``ViTClassifier.load_from_checkpoint(path)`` needs
    nothing else.

    Args:
        model: fields of :class:`~vit_lightning.config.ModelConfig`, ``num_classes`` and ``channels`` set.
        optim: fields of :class:`~vit_lightning.config.OptimConfig`.
        class_names: names of the classes, in the order of the logits.
        mean: of each channel of the training images, on [0, 1]: what images are normalised by.
        std: the standard deviation of each channel, likewise.
        data: fields of :class:`~vit_lightning.config.DataConfig`: what it is trained on, where that is known.
    """

    def __init__(
        self,
        model: dict[str, Any],
        optim: dict[str, Any],
        class_names: list[str],
        mean: list[float],
        std: list[float],
        data: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.net = ViT(ModelConfig(**model))
        side = self.net.image_size
        self.example_input_array = torch.zeros(1, self.net.channels, side, side)  # the model summary's sizes and FLOPs
        classes = len(class_names)
        self.metrics = nn.ModuleDict()
        for stage in ("train", "val", "test"):
            self.metrics[f"{stage}/loss"] = MeanMetric()
            self.metrics[f"{stage}/acc"] = MulticlassAccuracy(classes, average="micro", validate_args=False)
            # With fewer than five classes any five guesses hold the right one.
            self.metrics[f"{stage}/acc5"] = MulticlassAccuracy(
                classes, top_k=min(5, classes), average="micro", validate_args=False
            )

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, S, S) to logits (B, num_classes)."""
        return self.net(images)

    def normalise(self, images: Tensor) -> Tensor:
        """Images as they are stored, (B, C, h, w) of uint8, to what the network takes, (B, C, S, S) of float32."""
        mean, std = (torch.tensor(self.hparams[name], device=self.device) for name in ("mean", "std"))
        return eval_transform(images.to(self.device), self.net.image_size, mean, std)

    @torch.inference_mode()
    def classify(self, images: Tensor, tta: bool = False) -> Tensor:
        """Probabilities of the classes, for images as they are stored.

        Args:
            images: (B, C, h, w), uint8, of any size, on any device.
            tta: whether the probabilities of an image and its mirror image are averaged.

        Returns:
            (B, classes), float32, on the classifier's device.

        Raises:
            ValueError: if the classifier is in training mode.
        """
        if self.training:
            raise ValueError("classify() is for evaluation mode: call eval()")
        x = self.normalise(images)
        probabilities = self(x).softmax(dim=-1)
        return (probabilities + self(x.flip(-1)).softmax(dim=-1)) / 2 if tta else probabilities

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of a batch, with metrics in training mode (dropout and augmentation on)."""
        images, labels = batch
        loss, _ = self._step((self.sized(images), labels), "train")
        self.log("train/loss_step", loss, on_step=True, on_epoch=False, prog_bar=True, logger=False)
        return loss

    def sized(self, images: Tensor) -> Tensor:
        """Training images (B, C, S, S), at ``optim.small_size`` in the part of a run that has small ones."""
        config = self.hparams["optim"]
        small = config["small_size"] is not None and self.progress() < config["small_share"]
        return resize(images, config["small_size"]) if small else images

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Count a batch into ``val/…``; its logits."""
        return self._step(batch, "val")[1]

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count a batch into ``test/…``."""
        self._step(batch, "test")

    def _step(self, batch: tuple[Tensor, Tensor], stage: str) -> tuple[Tensor, Tensor]:
        images, labels = batch
        logits = self(images)
        smoothing = self.hparams["optim"]["label_smoothing"] if stage == "train" else 0.0
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        if labels.ndim == 2:  # probabilities, of mixed images: the greater part counts
            labels = labels.argmax(dim=1)
        metrics = {name: cast(Metric, metric) for name, metric in self.metrics.items() if name.startswith(stage)}
        metrics[f"{stage}/loss"].update(loss.detach(), weight=len(labels))  # a mean over samples, not over batches
        metrics[f"{stage}/acc"].update(logits, labels)
        metrics[f"{stage}/acc5"].update(logits, labels)
        logger = False if self.trainer.state.fn == TrainerFn.FITTING else None  # there EpochRecorder writes the curves
        show = stage == "val"
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=show, logger=logger, batch_size=len(labels))
        return loss, logits

    def on_validation_epoch_start(self) -> None:
        """Let all processes validate the first one's network: each has its own images' statistics in batch norms."""
        if self.trainer.world_size > 1:
            for buffer in self.net.buffers():
                dist.broadcast(buffer, 0)

    def on_train_epoch_start(self) -> None:
        """Count anew: a checkpoint that was written at an epoch's end still holds that epoch's metrics."""
        for metric in self._training_metrics().values():
            metric.reset()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the metrics have counted in the present epoch, in all processes together."""
        counted = {}
        for name, metric in self._training_metrics().items():
            with metric.sync_context():
                counted[name] = {key: cast(Tensor, value).clone() for key, value in metric.metric_state.items()}
        checkpoint["metrics"] = counted

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting from there, in the first process alone."""
        for name, metric in self._training_metrics().items():
            if name in checkpoint.get("metrics", {}) and self._trainer is not None and self.trainer.is_global_zero:
                metric.merge_state({key: value.to(metric.device) for key, value in checkpoint["metrics"][name].items()})

    def _training_metrics(self) -> dict[str, Metric]:
        return {name: cast(Metric, metric) for name, metric in self.metrics.items() if name.startswith("train")}

    def progress(self) -> float:
        """How much of the training is over, by ``optim.clock``: 0 at its start, 1 at its end."""
        if self.hparams["optim"]["clock"] == "steps":
            return self.trainer.global_step / self.trainer.estimated_stepping_batches
        timer = timer_of(self.trainer)
        assert timer is not None
        left = timer.time_remaining()
        assert left is not None
        return timer.time_elapsed() / (timer.time_elapsed() + left)

    def configure_model(self) -> None:
        """With ``trainer.strategy=fsdp``, have each process hold a part of every block, and of the rest."""
        if self._trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh = self.device_mesh["data_parallel"] if self.device_mesh is not None else None
            for block in self.net.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer, and a schedule that moves with every step."""
        config = OptimConfig(**self.hparams["optim"])
        optimizer = build_optimizer(self.net, config)
        elapsed = self.progress if config.clock == "time" else None
        schedule = build_schedule(optimizer, config, int(self.trainer.estimated_stepping_batches), elapsed)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def timer_of(trainer: L.Trainer) -> Timer | None:
    """The callback that keeps ``trainer.max_time``, where it is set."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, Timer)), None)
