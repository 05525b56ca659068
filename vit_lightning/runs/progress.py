"""The output of a run in training: a line per epoch, at most 80 characters wide, a bar, and the loggers' curves."""

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vit_lightning.terminal import format_metric, label_of

SPEED = "train/images_per_second"


def epoch_header(epochs: int, extra: str | None = None) -> str:
    """The header of the lines of :func:`describe_epoch`."""
    more = f" {label_of(extra)[:10]:>7}" if extra else ""
    return f"{'epoch':>{_width(epochs)}}   train loss   top-1   val loss   top-1{more}  images/s  time left"


def describe_epoch(row: dict[str, float], epochs: int, limit: float, extra: str | None = None) -> str:
    """Summarise an epoch in one line.

    Args:
        row: a row of ``metrics.csv``.
        epochs: number of epochs of the run.
        limit: maximum number of seconds that may remain.
        extra: a metric to show besides loss and top-1, such as ``acc5``.
    """
    left = max(0, min(limit, row["seconds"] / row["epoch"] * (epochs - row["epoch"])))
    time = f"{left:,.0f} s" if left < 120 else f"{left / 60:,.0f} min" if left < 36_000 else f"{left / 3600:,.0f} h"
    cells = [f"{row['train/loss']:12.3f}", f"{row['train/acc']:7.1%}"]
    if "val/loss" in row:
        cells += [f"{row['val/loss']:10.3f}", f"{row['val/acc']:7.1%}"]
    else:
        cells += [" " * 10, " " * 7]
    if extra:
        value = row.get(f"val/{extra}")
        cells.append(f"{'' if value is None else format_metric(extra, value):>{max(7, len(label_of(extra)[:10]))}}")
    number = f"{row['epoch']:.0f}/{epochs}"
    return f"{number:>{_width(epochs)}} {' '.join(cells)} {row[SPEED]:9,.0f} {time:>10}"


def _width(epochs: int) -> int:
    return max(5, 2 * len(str(epochs)) + 1)


class EpochBar(Callback):
    """A progress bar for the current epoch, erased before the epoch's line is printed.

    Lightning's own bars leave lines behind, count epochs from 0 and do not fit a terminal of 80 columns.
    """

    def __init__(self) -> None:
        self._bar: Progress | None = None

    def _show(self, text: str, total: int, completed: int = 0) -> None:
        """Start a new bar in place of the previous one."""
        self._erase()
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn())
        more = (TextColumn("{task.fields[loss]}"), TimeRemainingColumn(compact=True))
        self._bar = Progress(*columns, *more, transient=True, console=Console(), expand=True, refresh_per_second=5)
        self._task = self._bar.add_task(text, total=total, completed=completed, loss="")
        self._bar.start()

    def _erase(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = None

    def _advance(self, **changes: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, advance=1, **changes)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        done = trainer.fit_loop.epoch_loop.batch_progress.current.completed  # not zero in a resumed epoch
        self._show(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", int(trainer.num_training_batches), done)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = 1 if outputs["loss"].is_cpu else 20  # reading the loss waits for the device
        self._advance(**({"loss": f"loss {outputs['loss'].item():.3f}"} if batch_idx % every == 0 else {}))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._show("validation", int(sum(trainer.num_val_batches)))

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._advance()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._erase()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._erase()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._show("test", int(sum(trainer.num_test_batches)))

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._advance()

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._erase()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._erase()


def log_metrics(trainer: L.Trainer, metrics: Mapping[str, float], step: int) -> None:
    """Pass metrics to all loggers; TensorBoard gets the names by which it groups and sorts charts."""
    for logger in trainer.loggers:
        renamed = isinstance(logger, TensorBoardLogger)
        logger.log_metrics({chart_of(name) if renamed else name: value for name, value in metrics.items()}, step)


def chart_of(name: str) -> str:
    """The name of a metric in TensorBoard, which sorts charts by it and opens on the first two groups.

    These groups are ``accuracy`` and ``loss``, with training next to validation. The HParams tab shows the first five
    metrics, so the best accuracy so far comes first; other results, which that tab takes from charts, come last.
    """
    stage, _, metric = name.partition("/")
    if name == "best/acc":
        return "accuracy/best_val"
    if stage == "best":
        return f"summary/{metric}"
    if stage == "test":
        return f"summary/test_{metric}"
    if stage not in ("train", "val"):
        return name
    if metric in ("acc", "acc5"):
        return f"accuracy/top{metric[3:] or 1}_{stage}"
    return f"loss/{metric.replace('loss', stage, 1)}" if metric.startswith("loss") else f"metrics/{metric}_{stage}"
