"""Callbacks that record, report and stop training."""

import csv
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, WeightAveraging
from torch import Tensor

from vit_lightning.analysis.figures import draw_curves, name_run
from vit_lightning.devices import memory, now
from vit_lightning.files import RunFiles, save_figure, write_atomic
from vit_lightning.keys import InputError
from vit_lightning.recipe.classifier import timer_of
from vit_lightning.recipe.metrics import quality
from vit_lightning.recipe.optim import total_norm
from vit_lightning.runs.progress import SPEED, describe_epoch, epoch_header, log_metrics
from vit_lightning.terminal import relative, warn_instead


class EpochRecorder(Callback):
    """Prints a line and writes a row of ``metrics.csv`` after each epoch, and draws ``curves.png`` at the end.

    Every ``train/…`` and ``val/…`` metric that the module logs is recorded, except the numbers of images.

    Attributes:
        rows: the rows written so far; an epoch without validation has no ``val/…`` keys.
        samples_seen: number of training images that went through the network, including repeats.
        images: number of images that the latest metrics of each split (``train``, ``val``, ``test``) are computed from.
        starts: the provenance of the run's start and of each time it was resumed, as in ``record``.

    Args:
        run_dir: directory of the files.
        record: the provenance of this start.
        name: name of the run, in the title of the curves.
        training: label of the training curves.
        monitor: the metric that decides which epoch is the best.
    """

    def __init__(
        self,
        run_dir: Path,
        record: dict[str, Any],
        name: str = "",
        training: str = "training",
        monitor: str = "val/acc",
    ) -> None:
        self.files = RunFiles(run_dir)
        self.starts = [record]
        self.name = name
        self.training = training
        self.monitor = monitor
        self.rows: list[dict[str, float]] = []
        self.samples_seen = 0
        self.images = dict.fromkeys(("train", "val", "test"), 0)
        self._validated = False
        self._header_printed = False
        self._train_end: float | None = None  # the time when the epoch's validation began
        self._before = 0.0, 0.0  # seconds spent on the run and on its current epoch before it was resumed

    @property
    def images_per_second(self) -> float:
        """Training speed in the steady state: the median over epochs, without the first if there are more."""
        rates = [row[SPEED] for row in self.rows]
        return statistics.median(rates[1:] or rates)

    @property
    def best(self) -> dict[str, float]:
        """The row with the best value of ``monitor``, and among equals the lowest ``val/loss``.

        Without any validation (``trainer.limit_val_batches=0``), this is the last row.
        """
        if not any("val/acc" in row for row in self.rows):
            return self.rows[-1]
        return max(self.rows, key=lambda row: quality(row, self.monitor))

    @property
    def columns(self) -> list[str]:
        """The columns of ``metrics.csv``, fixed by the first epoch, which may have had no validation."""
        first = metrics_of(self.rows[0])
        train = [name for name in first if name.startswith("train/")]
        names = dict.fromkeys([*train, *(name.replace("train/", "val/", 1) for name in train), *first])
        return ["epoch", "step", "seconds", "lr", *names, SPEED]

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run continues from."""
        return {
            "rows": self.rows,
            "samples_seen": self.samples_seen,
            "images": self.images,
            "starts": self.starts,
            "seconds": now() - self._start,
            "epoch_seconds": now() - self._epoch_start,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.rows = state_dict["rows"]
        self.samples_seen = state_dict["samples_seen"]
        self.images = state_dict["images"]
        self.starts = state_dict["starts"] + self.starts
        self._before = state_dict["seconds"], state_dict["epoch_seconds"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # The curves are written here, because Lightning writes them after the checkpoint: a run killed in between would
        # lose them.
        pl_module.log_curves = False  # type: ignore[assignment]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        seconds, epoch_seconds = self._before
        self._start, self._epoch_start = now() - seconds, now() - epoch_seconds  # earlier if an epoch is resumed
        if trainer.is_global_zero:
            self.files.metrics.unlink(missing_ok=True)  # rewritten, because a killed run may have written more rows
            self._write(self.rows)

    def _write(self, rows: list[dict[str, float]]) -> None:
        """Append rows to ``metrics.csv``."""
        if rows:
            new = not self.files.metrics.exists()
            with self.files.metrics.open("a", newline="") as file:
                writer = csv.DictWriter(file, self.columns, restval="", extrasaction="ignore")
                if new:
                    writer.writeheader()
                writer.writerows(rows)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validated = False
        self._epoch_start = now()
        self._train_end = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]  # after the step, it is the next step's rate

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if 0 <= trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True  # the Trainer then validates before it stops

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validated = not trainer.sanity_checking
        self._train_end = now()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        stages = ("train/", "val/") if self._validated else ("train/",)  # else val/… are from an earlier epoch
        values = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith(stages)}
        for stage in stages:
            self.images[stage[:-1]] = int(values.pop(f"{stage}images"))
        self.samples_seen += self.images["train"]
        row = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "seconds": now() - self._start,
            "lr": self._lr,
            **dict(sorted(values.items(), key=lambda item: (item[0].startswith("val/"), "/loss" not in item[0]))),
            SPEED: self.images["train"] / ((self._train_end or now()) - self._epoch_start),
        }
        self.rows.append(row)
        if not trainer.is_global_zero:
            return
        speed = {"speed/images_per_second": row[SPEED], "speed/memory_gb": memory(trainer.strategy.root_device) / 1e9}
        measured = ("val/acc", self.monitor) if self._validated else ()
        best = {name.replace("val/", "best/", 1): self.best[name] for name in measured}
        log_metrics(trainer, {**metrics_of(row), **best, **speed}, trainer.global_step - 1)
        self._write([row])
        timer = timer_of(trainer)
        limit = timer.time_remaining() if timer else None
        if not self._header_printed:
            print(epoch_header(trainer.max_epochs or 0, self._extra))
            self._header_printed = True
        limit = math.inf if limit is None else limit
        print(describe_epoch(row, trainer.max_epochs or 0, limit, self._extra), flush=True)

    @property
    def _extra(self) -> str | None:
        """The metric that an epoch's line shows besides loss and top-1, if there is one."""
        names = [self.monitor.removeprefix("val/"), "acc5", "balanced_acc"]
        return next((name for name in names if f"train/{name}" in self.rows[0] and name not in ("loss", "acc")), None)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.images["test"] = int(trainer.callback_metrics["test/images"])

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if trainer.is_global_zero:
            self.draw()

    def draw(self) -> None:
        """Draw the epochs so far; also called for a run resumed after its last epoch, which has no end of training."""
        if self.rows:
            with warn_instead("curves"):
                figure = draw_curves(self.rows, training=self.training)
                save_figure(name_run(figure, self.name), self.files.curves)


class Report(Callback):
    """Reports the progress of training.

    Args:
        report: called after every validation with the epoch, from 1, and the metric; an exception ends the run.
        monitor: the metric.
    """

    def __init__(self, report: Callable[[int, float], None], monitor: str) -> None:
        self.report = report
        self.monitor = monitor

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.report(trainer.current_epoch + 1, trainer.callback_metrics[self.monitor].item())


class WeightAverage(WeightAveraging):
    """Keeps the average on the training device; Lightning would copy all weights to the CPU at each step."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._device = trainer.strategy.root_device  # the network is only moved there later
        super().setup(trainer, pl_module, stage)


class StopAtTarget(Callback):
    """Ends training once validation has reached an accuracy, and immediately if such a run is resumed.

    Args:
        acc: ``val/acc`` to reach, in [0, 1].
        acc5: ``val/acc5`` to reach at the same time; 0 if it is not measured.
    """

    def __init__(self, acc: float, acc5: float) -> None:
        self.acc = acc
        self.acc5 = acc5
        self._latest = (0.0, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run, which may have a higher target, continues from."""
        return {"latest": self._latest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._latest = state_dict["latest"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        acc, acc5 = self._latest
        if acc >= self.acc and acc5 >= self.acc5:
            trainer.should_stop = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        measured = trainer.callback_metrics
        self._latest = measured["val/acc"].item(), float(measured.get("val/acc5", 0.0))
        self.on_train_start(trainer, pl_module)


class StopAtNaN(Callback):
    """Ends a run whose loss is NaN or infinite, before the next checkpoint, and reports where.

    The loss is checked after every step on a CPU. On an accelerator, where each check waits for the device, it is
    checked every few steps, so the first bad step may be an earlier one. With several processes, all of them report
    the first process with a bad loss.

    Args:
        run_dir: directory of ``nan.json``, which describes the step and its images.
        every: number of steps between checks on an accelerator.
    """

    def __init__(self, run_dir: Path, every: int) -> None:
        self.files = RunFiles(run_dir)
        self.every = every

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]  # after the step, it is the next step's rate

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"]
        if not (loss.is_cpu or trainer.global_step % self.every == 0 or trainer.is_last_batch):
            return
        finite = bool(loss.isfinite())
        if trainer.strategy.reduce_boolean_decision(finite, all=True):  # all processes decide alike
            return
        report = None if finite else self._report(trainer, pl_module, loss, batch_idx)
        reports = [report] * trainer.world_size
        if trainer.world_size > 1:
            dist.all_gather_object(reports, report)
        report = next(item for item in reports if item)
        if trainer.is_global_zero:
            write_atomic(self.files.nan, json.dumps(report, indent=2) + "\n")
        images = ", ".join(map(str, report["images"][:4]))
        raise InputError(
            f"train/loss is {report['loss']} at step {report['step']} "
            f"(epoch {report['epoch']}, batch {report['batch']}: training images {images}, …), "
            f"learning rate {report['learning_rate']:g}, gradient norm {float(report['gradient_norm']):g}; "
            f"see {relative(self.files.nan)}; "
            "try a lower learning rate or trainer.gradient_clip_val=1"
        )

    def _report(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor, batch_idx: int) -> dict[str, Any]:
        """Describe the step and its images, by their indices into the source's training images."""
        loader = trainer.train_dataloader
        assert loader is not None
        return {
            "loss": str(loss.item()),
            "step": trainer.global_step,
            "epoch": trainer.current_epoch + 1,
            "batch": batch_idx + 1,
            "learning_rate": self._lr,
            "gradient_norm": str(total_norm(p.grad for p in pl_module.parameters() if p.grad is not None)),
            "images": loader.sampler.batches()[batch_idx].tolist(),
        }


def metrics_of(row: dict[str, float]) -> dict[str, float]:
    """The training and validation metrics of a row of ``metrics.csv``, without the speed."""
    return {name: value for name, value in row.items() if name.startswith(("train/", "val/")) and name != SPEED}
