"""What is measured, kept and printed during training."""

import csv
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from vit_lightning.figures import draw_curves

METRICS = ("train/loss", "train/acc", "train/acc5", "val/loss", "val/acc", "val/acc5")
COLUMNS = ("epoch", "step", "seconds", "lr", *METRICS, "train/images_per_second")


class EpochRecorder(Callback):
    """Writes ``metrics.csv``, a row an epoch, and draws ``curves.png`` when training ends, however it ends.

    Attributes:
        rows: the rows written so far; an epoch without validation has no ``val/…`` keys.
        samples_seen: training images that went through the network, repeats included.

    Args:
        run_dir: directory of the files.
        print_epochs: whether to print a line for each epoch, where there is no progress bar.
    """

    def __init__(self, run_dir: Path, print_epochs: bool) -> None:
        self.run_dir = run_dir
        self.print_epochs = print_epochs
        self.rows: list[dict[str, float]] = []
        self.samples_seen = 0

    @property
    def images_per_second(self) -> float:
        """Training speed in the steady state: the median over epochs, without the first where there are more."""
        rates = [row["train/images_per_second"] for row in self.rows]
        return statistics.median(rates[1:] or rates)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.perf_counter()
        with (self.run_dir / "metrics.csv").open("w", newline="") as file:
            csv.writer(file).writerow(COLUMNS)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._samples = 0
        self._epoch_start = self._now(pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._samples += len(batch[1])
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:  # before validation takes its time
            self._train_seconds = self._now(pl_module) - self._epoch_start

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.samples_seen += self._samples
        validated = (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0
        row = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "seconds": time.perf_counter() - self._start,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "train/images_per_second": self._samples / self._train_seconds,
        }
        for name in METRICS:
            if validated or not name.startswith("val/"):  # else a value of an earlier epoch
                row[name] = trainer.callback_metrics[name].item()
        self.rows.append(row)
        with (self.run_dir / "metrics.csv").open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS, restval="").writerow(row)
        pl_module.log("train/images_per_second", row["train/images_per_second"])
        if self.print_epochs:
            print(describe_epoch(row, trainer.max_epochs or 0), flush=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.rows:
            draw_curves(self.rows, self.run_dir / "curves.png")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    @staticmethod
    def _now(pl_module: L.LightningModule) -> float:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()  # steps are queued: the clock must wait for them
        return time.perf_counter()


def describe_epoch(row: dict[str, float], epochs: int) -> str:
    """One line for a log: where training stands, how good, how fast and how long it will take."""
    left = row["seconds"] / row["epoch"] * (epochs - row["epoch"])
    parts = [f"epoch {row['epoch']}/{epochs}"]
    for stage in ("train", "val"):
        if f"{stage}/loss" in row:
            parts.append(
                f"{stage} loss {row[f'{stage}/loss']:.3f} "
                f"top-1 {row[f'{stage}/acc']:.1%} top-5 {row[f'{stage}/acc5']:.1%}"
            )
    parts.append(f"{row['train/images_per_second']:,.0f} images/s")
    parts.append(f"{left:,.0f} s left" if left < 120 else f"{left / 60:,.0f} min left")
    return "  ".join(parts)


def is_terminal() -> bool:
    """Whether standard output is a terminal, which can show a progress bar."""
    return sys.stdout.isatty()
