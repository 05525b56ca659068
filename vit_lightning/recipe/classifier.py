"""The LightningModule: transforms, network, loss, metrics and optimizer."""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
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
from torchmetrics import MetricCollection

from vit_lightning import register
from vit_lightning.config import AugmentConfig, ModelConfig, OptimConfig
from vit_lightning.devices import derived_seed
from vit_lightning.keys import InputError
from vit_lightning.model.vit import ViT
from vit_lightning.recipe.augment import eval_transform, mix, resize, train_transform
from vit_lightning.recipe.metrics import build_metrics
from vit_lightning.recipe.optim import build_optimizer, build_schedule, freeze


class ViTClassifier(L.LightningModule):
    """A Vision Transformer from uint8 images to logits, trained with a registered loss.

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
        metrics: names of registered metrics besides the loss, top-1 and top-5.
        imports: modules that register its parts, to be named in the error if the checkpoint is opened without them.
        class_weights: weights of the classes in the training loss, in the order of the logits; ``None`` for equal ones.

    Attributes:
        log_curves: whether metrics are passed to the Trainer's logger; turned off by a callback that does so itself.
    """

    mean: Tensor
    std: Tensor
    class_weights: Tensor | None

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
        metrics: Sequence[str] = (),
        imports: Sequence[str] = (),
        class_weights: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.net = ViT(ModelConfig(**model))
        self.optim = OptimConfig(**optim)
        self.frozen = freeze(self.net, self.optim.freeze)
        self.augment = AugmentConfig(**(augment or {"rotation": 0.0, "flip": 0.0}))
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", weights, persistent=False)
        loss = register.loss[self.optim.loss]
        takes = inspect.signature(loss).parameters.keys() - register.loss.settings(self.optim.loss).keys()
        if weights is not None and "weight" not in takes:
            raise InputError(
                f"optim.class_weights={self.optim.class_weights}: optim.loss={self.optim.loss} takes no class weights; "
                "give it a fourth argument, weight"
            )
        side = self.net.image_size
        # The model summary computes sizes and FLOPs from this input.
        self.example_input_array = torch.zeros(1, self.net.channels, side, side, dtype=torch.uint8)
        measured = build_metrics(len(class_names), list(metrics))
        self.train_metrics = measured.clone(prefix="train/")
        self.val_metrics = measured.clone(prefix="val/")
        self.test_metrics = measured.clone(prefix="test/")
        self.log_curves = True

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits of stored images.

        Args:
            images: (B, C, h, w), uint8, of any height and width, on any device; only the central square is used.

        Returns:
            (B, num_classes), on the classifier's device.
        """
        return self.net(self.normalise(images))

    def normalise(self, images: Tensor) -> Tensor:
        """Convert stored images (B, C, h, w), uint8, to the network's input (B, C, S, S), float32."""
        with float32():
            return eval_transform(images.to(self.device), self.net.image_size, *self.statistics()).to(self.dtype)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (C,) used for normalisation, float32 even if the weights are not."""
        if self.mean.dtype == torch.float32:
            return self.mean, self.std
        mean, std = (torch.tensor(self.hparams[name], device=self.device) for name in ("mean", "std"))
        return mean, std

    @torch.inference_mode()
    def classify(self, images: Tensor, tta: bool = False) -> Tensor:
        """Compute the class probabilities of stored images.

        Args:
            images: (B, C, h, w), uint8, as for :meth:`forward`.
            tta: whether to average the probabilities of an image and its mirror image.

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

        The batch's random numbers (augmentation, then dropout) are seeded here by its number alone, so that a resumed
        run repeats them.

        Args:
            images: (B, C, h, w), uint8, on the classifier's device.
            labels: (B,), int64.

        Returns:
            The network's input (B, C, S, S), float32, where S is ``optim.small_size``, if set, in the first
            ``optim.small_share`` of the run; and the labels, or the class probabilities (B, num_classes) if images are
            mixed.
        """
        use = f"step {self.global_rank}" if self.global_rank else "step"
        # With accumulated gradients, several batches share a step.
        several = self._trainer is not None and self.trainer.accumulate_grad_batches > 1
        number = self.trainer.fit_loop.total_batch_idx if several else self.global_step
        torch.manual_seed(derived_seed(self.hparams["seed"], number, use))
        config, optim = self.augment, self.optim
        if config.until < 1 and self.progress() >= config.until:
            config = replace(config, policy="none", jitter=0.0, erase=0.0, mixup=0.0, cutmix=0.0)
        with torch.autocast(images.device.type, enabled=False), float32():  # coordinates need float32
            x = train_transform(images, self.net.image_size, *self.statistics(), config)
            for name in config.batch:
                x = register.augmentation.build(name, config.options, x)
            if config.mixup or config.cutmix:
                x, labels = mix(x, labels, len(self.hparams["class_names"]), config)
            if optim.small_size is not None and self.progress() < optim.small_share:
                x = resize(x, optim.small_size)
        return x.to(self.dtype), labels

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of an augmented batch, with dropout."""
        x, targets = self.augmented(*batch)
        logits = self.net(x)
        config = self.optim
        weights = [] if self.class_weights is None else [self.class_weights]
        loss = register.loss.build(config.loss, config.options, logits, targets, config.label_smoothing, *weights)
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
        """Copy the first process's buffers to all processes, whose batch norms have different statistics."""
        if self.trainer.world_size > 1:
            for buffer in self.net.buffers():
                dist.broadcast(buffer, 0)

    def train(self, mode: bool = True) -> "ViTClassifier":
        """Set the training mode; frozen parts stay in evaluation mode, so that their batch norms do not change."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

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
        if self.optim.clock == "steps":
            return self.trainer.global_step / self.trainer.estimated_stepping_batches
        timer = timer_of(self.trainer)
        assert timer is not None
        left = timer.time_remaining()
        assert left is not None
        return timer.time_elapsed() / (timer.time_elapsed() + left)

    def configure_model(self) -> None:
        """With ``trainer.strategy=fsdp``, shard every block, and the rest of the network, across the processes."""
        if self._trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh = self.device_mesh["data_parallel"] if self.device_mesh is not None else None
            for block in self.net.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer, and a schedule that advances with every step."""
        config = self.optim
        optimizer = build_optimizer(self.net, config)
        elapsed = self.progress if config.clock == "time" else None
        schedule = build_schedule(optimizer, config, int(self.trainer.estimated_stepping_batches), elapsed)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@contextlib.contextmanager
def float32() -> Iterator[None]:
    """Create tensors in float32 inside Lightning's ``bf16-true`` and the like, which change the default dtype."""
    default = torch.get_default_dtype()
    if default == torch.float32:
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def timer_of(trainer: L.Trainer) -> Timer | None:
    """Return the callback that enforces ``trainer.max_time``, or ``None`` if it is not set."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, Timer)), None)
