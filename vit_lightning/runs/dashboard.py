"""What TensorBoard shows next to the curves: the configuration, training images, and figures of the best network."""

import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.plugins.hparams.summary_v2 import hparams_pb  # type: ignore[import-untyped]
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter, summary

from vit_lightning.analysis.attention import attention_maps, attention_rollout, on_patches, position_similarity
from vit_lightning.analysis.figures import draw_attention, draw_images, draw_position_similarity, name_run, shorten
from vit_lightning.analysis.predictions import FIGURES, Predictions, predict_split
from vit_lightning.config import MAY_CHANGE, Config
from vit_lightning.data.folder import as_text
from vit_lightning.data.images import decode_image
from vit_lightning.data.module import ImageData
from vit_lightning.keys import InputError, flatten
from vit_lightning.recipe.augment import denormalise
from vit_lightning.recipe.classifier import ViTClassifier
from vit_lightning.recipe.metrics import measures_top5, quality
from vit_lightning.recipe.optim import total_norm
from vit_lightning.runs.progress import log_metrics
from vit_lightning.terminal import relative, warn_instead

# One chart for training and validation, in the custom-scalars tab.
LAYOUT = {  # tags are regular expressions
    "loss": ["Multiline", ["^loss/train$", "^loss/val$"]],
    "top-1": ["Multiline", ["^accuracy/top1_train$", "^accuracy/top1_val$"]],
    "top-5": ["Multiline", ["^accuracy/top5_train$", "^accuracy/top5_val$"]],
}
IMAGES = 12  # number of training images drawn
EXPLAINED = 6  # number of validation images whose attention is drawn
HEADS = 6  # number of heads of the last block drawn
SIDE = 256  # side of those images in pixels, if they are read from files


class Dashboard(Callback):
    """Shows text and a training batch at the start of a run, and the best checkpoint's predictions at its end.

    Args:
        config: the run's configuration; ``config.dashboard`` switches each part on or off.
        data: the images, after ``setup()``.
        name: name of the run in TensorBoard's table of runs and in figures.
        text: additional text to show, by title.
        patches: picture of an image next to its patches.
    """

    def __init__(self, config: Config, data: ImageData, name: str, text: dict[str, str], patches: Figure) -> None:
        self.config = config
        self.data = data
        self.name = name
        self.text = {**text, "config": yaml.safe_dump(asdict(config), sort_keys=False)}
        self.patches = patches
        self._probabilities: list[Tensor] = []  # the validation images so far in this epoch
        self._step: dict[str, float] = {}  # values of the current step, for the curves by step
        self._best: tuple[tuple[float, float], int, Tensor] | None = None  # quality, epoch, probabilities

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        if self.config.dashboard.patches:
            with warn_instead("patches"):
                show(trainer, "patches", self.patches, trainer.global_step)
        writer = writer_of(trainer)
        if writer is None:
            return
        top5 = measures_top5(len(self.data.class_names))
        charts = {name: chart for name, chart in LAYOUT.items() if name != "top-5" or top5}
        writer.add_custom_scalars({"training and validation": charts})
        # The run is a row of the HParams tab. Lightning would also write the tab's columns, so those of the first run
        # found would apply; without them, TensorBoard gathers columns from all runs, those that differ first.
        writer._get_file_writer().add_summary(hparams_pb(hyper_parameters(self.config), trial_id=self.name))
        if self.config.dashboard.text:
            for title, text in self.text.items():
                lines = as_text(text).splitlines()
                writer.add_text(title, "\n".join(f"    {line}" for line in lines))  # indented text is shown literally

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 0 and self.config.dashboard.batch and trainer.is_global_zero:
            assert isinstance(pl_module, ViTClassifier)
            images, labels = (part[:IMAGES].cpu() for part in pl_module.augmented(*batch))
            pictures = denormalise(images, pl_module.mean.cpu(), pl_module.std.cpu()).permute(0, 2, 3, 1).numpy()
            with warn_instead("batch"):
                titles = [self._title(label) for label in labels]
                figure = draw_images(pictures, titles, title="Training images, augmented")
                show(trainer, "batch", name_run(figure, self.name), 0)

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
            log_metrics(trainer, {"train/loss_step": outputs["loss"].item(), **self._step}, trainer.global_step - 1)
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
        measured = quality(
            {name: value.item() for name, value in trainer.callback_metrics.items()}, self.config.monitor
        )
        if trainer.world_size == 1 and (self._best is None or measured > self._best[0]):
            self._best = measured, trainer.current_epoch + 1, torch.cat(self._probabilities)

    def log_best(self, trainer: L.Trainer, record: dict[str, Any]) -> None:
        """Write the final metrics of the run.

        Args:
            trainer: its logger receives the metrics.
            record: the run's ``summary.json``.
        """
        metrics = record["metrics"]
        final = {f"best/{key}": record[key] for key in ("parameters", "seconds")}
        if "val/acc5" in metrics:
            final["best/acc5"] = metrics["val/acc5"]
        final |= {key: value for key, value in metrics.items() if key.startswith("test/")}
        log_metrics(trainer, final, trainer.global_step)
        for logger in trainer.loggers:
            logger.save()
        writer = writer_of(trainer)
        if writer is not None:
            _, _, end = summary.hparams({}, {})
            writer._get_file_writer().add_summary(end)
            writer.flush()

    def show_best(self, classifier: ViTClassifier, trainer: L.Trainer, record: dict[str, Any]) -> None:
        """Draw what the best checkpoint predicts for the validation images.

        A figure that cannot be drawn is reported on stderr and left out, so that the run still succeeds.

        Args:
            classifier: the classifier with that checkpoint's weights.
            trainer: its logger receives the figures.
            record: the run's ``summary.json``.
        """
        switches, step = self.config.dashboard, trainer.global_step
        if switches.positions and classifier.net.pos_embed is not None:
            with warn_instead("positions"):
                similarity = position_similarity(classifier.net).cpu().numpy()
                show(trainer, "positions", name_run(draw_position_similarity(similarity), self.name), step)
        if switches.attention:
            with warn_instead("attention"):
                show(trainer, "attention", name_run(draw_attention_of(classifier, self.data), self.name), step)
        names = [name for name in FIGURES if getattr(switches, name.removesuffix("_superclasses"))]
        if names:
            with warn_instead(", ".join(names)):
                predictions = self._best_predictions(classifier, record["best_epoch"])
                for name in names:
                    with warn_instead(name):
                        figure = predictions.draw(name)
                        if figure is not None:
                            show(trainer, name, name_run(figure, self.name), step)
        for logger in trainer.loggers:
            logger.save()

    def _best_predictions(self, classifier: ViTClassifier, best_epoch: int) -> Predictions:
        """The best checkpoint's predictions for the validation images, from its validation if they were kept."""
        if self._best is None or self._best[1] != best_epoch:  # the run was resumed or has several processes
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
        return "\n".join(f"{shorten(names[i], 13)} {share:.0%}" for share, i in pairs if share > 0)


def hyper_parameters(config: Config) -> dict[str, Any]:
    """The keys and values by which TensorBoard's HParams tab compares runs, as they are typed.

    Keys that do not affect results, such as ``data.cache_dir``, are left out.
    """
    groups = ("model", "data", "augment", "optim", "trainer")
    flat = flatten({name: value for name, value in asdict(config).items() if name in (*groups, "seed", "checkpoint")})
    plain = {key: as_text(str(value)) if isinstance(value, list | dict | str) else value for key, value in flat.items()}
    without = {*MAY_CHANGE, "trainer.log_every_n_steps"}
    return {key: value for key, value in plain.items() if value not in (None, "{}") and key not in without}


def run_name(overrides: Sequence[str], folder: Path) -> str:
    """Name a run by its settings and its directory, which distinguishes it from others with the same settings.

    The experiment, which compared runs often share, comes last, because the table shows only the start of a name.
    """
    typed = [item for item in overrides if item.partition("=")[0] not in {*MAY_CHANGE, "resume"}]
    typed.sort(key=lambda item: item.startswith("experiment="))
    return as_text(" ".join([*typed, f"({relative(folder)})" if typed else relative(folder)]))


def draw_attention_of(classifier: ViTClassifier, data: ImageData) -> Figure:
    """Draw the attention of the head's input to each patch: the rollout, then some heads of the last block."""
    spread = torch.linspace(0, len(data.indices["val"]) - 1, EXPLAINED).long()  # images may be sorted by class
    images, labels = data.stored("val", spread)
    maps = attention_maps(classifier.net, classifier.normalise(images))
    rollout, heads = attention_rollout(maps)[:, None], maps[:, -1, :HEADS]
    overlays = on_patches(classifier.net, torch.cat([rollout, heads], dim=1)).cpu().numpy()
    names = ["rollout", "head 1", *map(str, range(2, heads.shape[1] + 1))]
    titles = [data.class_names[label] for label in labels]
    pictures = originals(data, "val", spread)
    return draw_attention(pictures, overlays, names, titles, "Attention to each patch, validation images")


def originals(data: ImageData, split: str, positions: Tensor) -> list[np.ndarray]:
    """Images of a split, (side, side, C), floats in [0, 1], read from their files if these still exist."""
    root, files = Path(data.config.root).expanduser(), data.files(split)
    base = root.parent if root.suffix.lower() == ".csv" else root
    try:
        images = [decode_image(base / files[position], SIDE) for position in positions.tolist()] if files else None
    except InputError:
        images = None
    return [np.moveaxis(np.asarray(image), 0, -1) / 255 for image in images or data.stored(split, positions)[0]]


def writer_of(trainer: L.Trainer) -> SummaryWriter | None:
    """TensorBoard's writer of the run, if TensorBoard is one of its loggers."""
    return next((logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)


def show(trainer: L.Trainer, name: str, figure: Figure, step: int) -> None:
    """Pass a figure to the loggers that accept images."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            # Only pyplot's figures need closing.
            logger.experiment.add_figure(f"pictures/{name}", figure, step, close=False)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_figure(logger.run_id, figure, f"pictures/{name}.png")
        elif hasattr(logger, "log_image"):  # such as Weights & Biases
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
            logger.log_image(f"pictures/{name}", [Image.open(buffer)])
