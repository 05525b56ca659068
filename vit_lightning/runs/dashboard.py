"""What TensorBoard shows next to the curves: the configuration, training images, and figures of the best network."""

import io
from dataclasses import asdict
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter, summary

from vit_lightning.analysis.attention import attention_maps, attention_rollout, on_patches, position_similarity
from vit_lightning.analysis.figures import draw_attention, draw_images, draw_position_similarity, shorten
from vit_lightning.analysis.predictions import FIGURES, Predictions, predict_split
from vit_lightning.config import Config
from vit_lightning.data.module import ImageData
from vit_lightning.keys import flatten
from vit_lightning.recipe.augment import denormalise
from vit_lightning.recipe.classifier import ViTClassifier
from vit_lightning.recipe.optim import total_norm
from vit_lightning.terminal import warn_instead

# One chart for training and validation, in the custom-scalars tab.
LAYOUT = {  # tags are regular expressions
    "training and validation": {
        "loss": ["Multiline", ["^train/loss$", "^val/loss$"]],
        "top-1": ["Multiline", ["^train/acc$", "^val/acc$"]],
        "top-5": ["Multiline", ["^train/acc5$", "^val/acc5$"]],
    }
}
IMAGES = 12  # of a training batch
EXPLAINED = 6  # validation images whose attention is drawn


class Dashboard(Callback):
    """Writes text at the start of a run, a training batch, and at its end what the best checkpoint does.

    Args:
        config: of the run; ``config.dashboard`` switches each part.
        data: set up.
        text: what else is shown as text, by title.
        patches: picture of an image next to its patches.
    """

    def __init__(self, config: Config, data: ImageData, text: dict[str, str], patches: Figure) -> None:
        self.config = config
        self.data = data
        self.text = {**text, "config": yaml.safe_dump(asdict(config), sort_keys=False)}
        self.patches = patches
        self._probabilities: list[Tensor] = []  # of the validation images so far in this epoch
        self._step: dict[str, float] = {}  # what the curves with a point a step show of the present one
        self._best: tuple[tuple[float, float], int, Tensor] | None = None  # val/acc and -val/loss, epoch, probabilities

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        if self.config.dashboard.patches:
            with warn_instead("patches"):
                show(trainer, "patches", self.patches, trainer.global_step)
        writer = writer_of(trainer)
        if writer is None:
            return
        writer.add_custom_scalars(LAYOUT)
        # The run as a row of the HParams tab. Lightning's way writes the tab's columns too: those of the first run that
        # TensorBoard finds; without, it gathers them from all runs, the ones that differ first.
        _, start, _ = summary.hparams(hyper_parameters(self.config), {})
        writer._get_file_writer().add_summary(start)
        if self.config.dashboard.text:
            for title, text in self.text.items():
                writer.add_text(title, "\n".join(f"    {line}" for line in text.splitlines()))  # as it is: a code block

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 0 and self.config.dashboard.batch and trainer.is_global_zero:
            assert isinstance(pl_module, ViTClassifier)
            images, labels = (part[:IMAGES].cpu() for part in pl_module.augmented(*batch))
            pictures = denormalise(images, self.data.mean, self.data.std).permute(0, 2, 3, 1).numpy()
            with warn_instead("batch"):
                titles = [self._title(label) for label in labels]
                show(trainer, "batch", draw_images(pictures, titles, title="Training images, augmented"), 0)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._step = {}
        if (trainer.global_step + 1) % self.config.trainer.log_every_n_steps == 0:
            self._step["optim/gradient_norm"] = total_norm(p.grad for p in pl_module.parameters() if p.grad is not None)
            self._step["optim/lr"] = optimizer.param_groups[0]["lr"]
            if self.config.optim.name == "muon":
                self._step["optim/muon_lr"] = optimizer.param_groups[-1]["lr"]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._step and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics({"train/loss_step": outputs["loss"].item(), **self._step}, trainer.global_step - 1)
            self._step = {}

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._probabilities = []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._probabilities.append(outputs.float().softmax(dim=1).cpu())

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        quality = trainer.callback_metrics["val/acc"].item(), -trainer.callback_metrics["val/loss"].item()
        if trainer.world_size == 1 and (self._best is None or quality > self._best[0]):
            self._best = quality, trainer.current_epoch + 1, torch.cat(self._probabilities)

    def log_best(self, trainer: L.Trainer, record: dict[str, Any]) -> None:
        """Write the final metrics of the run.

        Args:
            trainer: its logger receives the metrics.
            record: the run's ``summary.json``.
        """
        metrics = record["metrics"]
        # The HParams tab sorts by name, so these come before all other tags, the best val/acc first.
        final = {"acc": metrics.get("val/acc"), "acc5": metrics.get("val/acc5"), "test_acc": metrics.get("test/acc")}
        final |= {"parameters": record["parameters"], "seconds": record["seconds"]}
        known = {f"best/{key}": value for key, value in final.items() if value is not None}  # without test=false's
        for logger in trainer.loggers:
            logger.log_metrics(known, trainer.global_step)
            logger.save()
        writer = writer_of(trainer)
        if writer is not None:
            _, _, end = summary.hparams({}, {})
            writer._get_file_writer().add_summary(end)
            writer.flush()

    def show_best(self, classifier: ViTClassifier, trainer: L.Trainer, record: dict[str, Any]) -> None:
        """Draw what the best checkpoint predicts for the validation images.

        A figure that cannot be drawn is reported on stderr and left out: the run has its result.

        Args:
            classifier: with that checkpoint's weights.
            trainer: its logger receives the figures.
            record: the run's ``summary.json``.
        """
        switches, step = self.config.dashboard, trainer.global_step
        if switches.positions and classifier.net.pos_embed is not None:
            with warn_instead("positions"):
                similarity = position_similarity(classifier.net).cpu().numpy()
                show(trainer, "positions", draw_position_similarity(similarity), step)
        if switches.attention:
            with warn_instead("attention"):
                show(trainer, "attention", draw_attention_of(classifier, self.data), step)
        names = [name for name in FIGURES if getattr(switches, name.removesuffix("_superclasses"))]
        if names:
            with warn_instead(", ".join(names)):
                predictions = self._best_predictions(classifier, record["best_epoch"])
                for name in names:
                    with warn_instead(name):
                        figure = predictions.draw(name)
                        if figure is not None:
                            show(trainer, name, figure, step)
        for logger in trainer.loggers:
            logger.save()

    def _best_predictions(self, classifier: ViTClassifier, best_epoch: int) -> Predictions:
        """The best checkpoint's predictions for the validation images, from its validation where they were kept."""
        if self._best is None or self._best[1] != best_epoch:  # resumed after the best epoch, or several processes
            return predict_split(classifier, self.data, "val")
        probabilities = self._best[2]
        _, labels = self.data.stored("val", torch.arange(len(probabilities)))
        return Predictions(probabilities, labels, self.data.class_names, "val", self.data)

    def _title(self, label: Tensor) -> str:
        """The class; for a mixed image, both classes with their shares."""
        names = self.data.class_names
        if label.ndim == 0:
            return names[label]
        shares, classes = label.topk(2)
        pairs = zip(shares, classes, strict=True)
        return "\n".join(f"{shorten(names[i], 17)} {share:.0%}" for share, i in pairs if share > 0)


def hyper_parameters(config: Config) -> dict[str, Any]:
    """The keys and values that TensorBoard's HParams tab compares runs by, as they are typed."""
    groups = ("model", "data", "augment", "optim", "trainer")
    flat = flatten({name: value for name, value in asdict(config).items() if name in (*groups, "seed", "checkpoint")})
    plain = {key: str(value) if isinstance(value, list | dict) else value for key, value in flat.items()}
    return {key: value for key, value in plain.items() if value is not None and value != "{}"}


def draw_attention_of(classifier: ViTClassifier, data: ImageData) -> Figure:
    """The attention to each patch in what the head reads: the rollout, then each head of the last block."""
    spread = torch.linspace(0, len(data.indices["val"]) - 1, EXPLAINED).long()  # images may be sorted by class
    images, labels = data.stored("val", spread)
    maps = attention_maps(classifier.net, classifier.normalise(images))
    rollout, heads = attention_rollout(maps)[:, None], maps[:, -1]
    overlays = on_patches(classifier.net, torch.cat([rollout, heads], dim=1)).cpu().numpy()
    pictures = images.permute(0, 2, 3, 1).numpy() / 255
    names = ["rollout", *(f"head {number}" for number in range(1, heads.shape[1] + 1))]
    titles = [data.class_names[label] for label in labels]
    return draw_attention(pictures, overlays, names, titles, "Attention to each patch, validation images")


def writer_of(trainer: L.Trainer) -> SummaryWriter | None:
    """TensorBoard's writer of the run, if TensorBoard is one of its loggers."""
    return next((logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)


def show(trainer: L.Trainer, name: str, figure: Figure, step: int) -> None:
    """Pass a figure to the loggers that take pictures."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            # Only figures of pyplot need closing.
            logger.experiment.add_figure(f"pictures/{name}", figure, step, close=False)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_figure(logger.run_id, figure, f"pictures/{name}.png")
        elif hasattr(logger, "log_image"):  # Weights & Biases
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
            logger.log_image(f"pictures/{name}", [Image.open(buffer)])
