"""What is measured, kept and printed during training."""

import csv
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging

from vit_lightning.analysis.figures import draw_curves
from vit_lightning.config import InputError
from vit_lightning.devices import memory, now
from vit_lightning.recipe.classifier import timer_of
from vit_lightning.recipe.optim import total_norm
from vit_lightning.terminal import relative

METRICS = ("train/loss", "train/acc", "train/acc5", "val/loss", "val/acc", "val/acc5")
COLUMNS = ("epoch", "step", "seconds", "lr", *METRICS, "train/images_per_second")


class EpochRecorder(Callback):
    """Prints a line and writes a row of ``metrics.csv`` each epoch; draws ``curves.png`` in the end.

    Attributes:
        rows: the rows written so far; an epoch without validation has no ``val/…`` keys.
        samples_seen: training images that went through the network, repeats included.
        images: by split (``train``, ``val``, ``test``), the images that its latest metrics were counted over.
        starts: where the run comes from, as ``record`` says it, and then each time that it was resumed.

    Args:
        run_dir: directory of the files.
        record: where this start of the run comes from.
    """

    def __init__(self, run_dir: Path, record: dict[str, Any]) -> None:
        self.run_dir = run_dir
        self.starts = [record]
        self.rows: list[dict[str, float]] = []
        self.samples_seen = 0
        self.images = dict.fromkeys(("train", "val", "test"), 0)
        self._validated = False
        self._epoch_end: float | None = None  # before validation takes its time
        self._before = 0.0, 0.0  # seconds of the run, and of its present epoch, before it was resumed

    @property
    def images_per_second(self) -> float:
        """Training speed in the steady state: the median over epochs, without the first where there are more."""
        rates = [row["train/images_per_second"] for row in self.rows]
        return statistics.median(rates[1:] or rates)

    @property
    def best(self) -> dict[str, float]:
        """The row of the best ``val/acc``."""
        return max(self.rows, key=lambda row: row.get("val/acc", -1.0))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        return {
            "rows": self.rows,
            "samples_seen": self.samples_seen,
            "images": self.images,
            "starts": self.starts,
            "seconds": now() - self._start,
            "epoch_seconds": now() - self._epoch_start,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self.rows = state_dict["rows"]
        self.samples_seen = state_dict["samples_seen"]
        self.images = state_dict["images"]
        self.starts = state_dict["starts"] + self.starts
        self._before = state_dict["seconds"], state_dict["epoch_seconds"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        seconds, epoch_seconds = self._before
        self._start, self._epoch_start = now() - seconds, now() - epoch_seconds  # the latter of an epoch begun earlier
        if not trainer.is_global_zero:
            return
        with (self.run_dir / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.images["train"] = 0
        self._validated = False
        self._epoch_start = now()
        self._epoch_end = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]  # after the step it is already the next one's

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.images["train"] += len(batch[1]) * trainer.world_size  # all have as many

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.images["val"] = 0
        self._validated = True
        self._epoch_end = now()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.images["val"] += len(batch[1])

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.images["test"] += len(batch[1])

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._validated:
            self._add_up(trainer, "val")
        self.samples_seen += self.images["train"]
        train_seconds = (self._epoch_end or now()) - self._epoch_start
        row = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "seconds": now() - self._start,
            "lr": self._lr,
            "train/images_per_second": self.images["train"] / train_seconds,
        }
        for name in METRICS:
            if self._validated or not name.startswith("val/"):  # else a value of an earlier epoch
                row[name] = trainer.callback_metrics[name].item()
        self.rows.append(row)
        if not trainer.is_global_zero:
            return
        held = memory(trainer.strategy.root_device)
        speed = {"speed/images_per_second": row["train/images_per_second"], "speed/memory_gb": held / 1e9}
        # Written here and not by Lightning, which would do so after the checkpoint: a run killed in between lost them.
        for logger in trainer.loggers:
            logger.log_metrics(
                {**{name: row[name] for name in METRICS if name in row}, **speed}, trainer.global_step - 1
            )
        with (self.run_dir / "metrics.csv").open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS, restval="").writerow(row)
        timer = timer_of(trainer)
        limit = timer.time_remaining() if timer else None
        print(describe_epoch(row, trainer.max_epochs or 0, math.inf if limit is None else limit), flush=True)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._add_up(trainer, "test")

    def _add_up(self, trainer: L.Trainer, *splits: str) -> None:
        """Make the numbers of images those of all processes."""
        counts = torch.tensor([float(self.images[split]) for split in splits], device=trainer.strategy.root_device)
        total = trainer.strategy.reduce(counts, reduce_op="sum")
        self.images.update(zip(splits, (int(count) for count in total), strict=True))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if trainer.is_global_zero:
            self.draw()

    def draw(self) -> None:
        """Draw the epochs so far, in a run that is resumed after its last one too: for that one no training ends."""
        if self.rows:
            draw_curves(self.rows).savefig(self.run_dir / "curves.png")


class Report(Callback):
    """Tells someone how training goes.

    Args:
        report: is called after every validation with the epoch, from 1, and ``val/acc``; what it raises ends the run.
    """

    def __init__(self, report: Callable[[int, float], None]) -> None:
        self.report = report

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.report(trainer.current_epoch + 1, trainer.callback_metrics["val/acc"].item())


class WeightAverage(WeightAveraging):
    """Lightning's, with the average on the device that trains: its own would copy all weights to the CPU each step."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._device = trainer.strategy.root_device  # where the network is not yet
        super().setup(trainer, pl_module, stage)


class StopAtTarget(Callback):
    """Ends training once validation has reached an accuracy, also where the run is resumed after that.

    Args:
        acc: ``val/acc`` to reach, in [0, 1].
        acc5: ``val/acc5`` to reach at the same time.
    """

    def __init__(self, acc: float, acc5: float) -> None:
        self.acc = acc
        self.acc5 = acc5
        self._latest = (0.0, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run, which may have a higher target, goes on from."""
        return {"latest": self._latest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self._latest = state_dict["latest"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        acc, acc5 = self._latest
        if acc >= self.acc and acc5 >= self.acc5:
            trainer.should_stop = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._latest = trainer.callback_metrics["val/acc"].item(), trainer.callback_metrics["val/acc5"].item()
        self.on_train_start(trainer, pl_module)


class StopAtNaN(Callback):
    """Ends a run whose loss is no number any more, before the next checkpoint, and says where that was seen.

    The loss is looked at after every step on a CPU; elsewhere, where every look waits for the device, every few steps,
    so that it may have gone wrong some steps before. Of several processes those speak whose own loss is no number.

    Args:
        run_dir: where ``nan.json`` tells the step and its images.
        every: steps from one look to the next on an accelerator.
    """

    def __init__(self, run_dir: Path, every: int) -> None:
        self.run_dir = run_dir
        self.every = every

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]  # after the step it is already the next one's

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"]
        if not (loss.is_cpu or trainer.global_step % self.every == 0 or trainer.is_last_batch):
            return
        finite = bool(loss.isfinite())
        if trainer.strategy.reduce_boolean_decision(finite, all=True):  # in step with other processes
            return
        if finite:
            raise InputError("train/loss is no number in another process, which says where")
        norm = total_norm(p.grad for p in pl_module.parameters() if p.grad is not None)
        loader = trainer.train_dataloader
        assert loader is not None
        images = loader.sampler.batches()[batch_idx].tolist()
        report = {
            "loss": str(loss.item()),
            "step": trainer.global_step,
            "epoch": trainer.current_epoch + 1,
            "batch": batch_idx + 1,
            "learning_rate": self._lr,
            "gradient_norm": str(norm),
            "images": images,  # by their place among the source's training images
        }
        (self.run_dir / "nan.json").write_text(json.dumps(report, indent=2) + "\n")
        where = f"epoch {report['epoch']}, batch {batch_idx + 1}: training images {', '.join(map(str, images[:4]))}, …"
        raise InputError(
            f"train/loss is {report['loss']} at step {report['step']} ({where}), learning rate {self._lr:g}, "
            f"gradient norm {norm:g}; {relative(self.run_dir / 'nan.json')} has it all; "
            "a lower learning rate or trainer.gradient_clip_val=1 may help"
        )


def describe_epoch(row: dict[str, float], epochs: int, limit: float) -> str:
    """One line for a log: where training stands, how good, how fast and how long it will take, ``limit`` at most."""
    left = max(0, min(limit, row["seconds"] / row["epoch"] * (epochs - row["epoch"])))
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
