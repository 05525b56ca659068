"""The sections ``trainer`` and ``dashboard`` of :mod:`vit_lightning.config`."""

import re
from dataclasses import dataclass
from typing import ClassVar

from vit_lightning.keys import InputError, check_values, key

ACCELERATORS = ("auto", "cpu", "gpu", "mps")


@dataclass(slots=True)
class TrainerConfig:
    """Arguments of lightning.Trainer, under its own names."""

    prefix: ClassVar[str] = "trainer."

    accelerator: str = key("auto", "auto uses the best device there is.", choices=ACCELERATORS)
    strategy: str = key("auto", "One device; or several, each with a copy (ddp) or a part (fsdp) of the network.",
                        choices=("auto", "ddp", "fsdp"))  # fmt: skip
    devices: int = key(1, "Devices of this machine, one process each; -1 for all GPUs.")
    precision: str = key("32-true", "auto uses mixed precision where the device has instructions for it.",
                         choices=("auto", "32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true"),
                         )  # fmt: skip
    max_epochs: int = key(100, "Passes over the training images.", low=1)
    min_epochs: int | None = key(None, "Passes before a target or another callback may end the run.", low=1)
    max_steps: int | None = key(None, "Maximum number of optimizer steps, if reached before max_epochs.", low=1)
    min_steps: int | None = key(None, "Optimizer steps before a target or another callback may end the run.", low=1)
    max_time: str | None = key(None, "Maximum training time, as DD:HH:MM:SS.")
    accumulate_grad_batches: int = key(1, "Batches whose gradients are averaged for one optimizer step.", low=1)
    gradient_clip_val: float | None = key(None, "Maximum norm of all gradients together; null for no clipping.", low=0)
    gradient_clip_algorithm: str = key("norm", "Clip the norm, or each value.", choices=("norm", "value"))
    fast_dev_run: int = key(0, "Try everything a run does in one epoch of this many batches; 0 to train normally.",
                            low=0)  # fmt: skip
    overfit_batches: int = key(0, "Train on this many fixed batches and validate on as many; 0 for all.", low=0)
    limit_train_batches: int | float = key(1.0, "Batches per epoch: a number (int) or a share (float) of them.")
    limit_val_batches: int | float = key(1.0, "The same for validation; 0 for none, which keeps the last weights.")
    limit_test_batches: int | float = key(1.0, "The same for the test.")
    num_sanity_val_steps: int = key(0, "Batches of validation before training, to find mistakes in it early.", low=0)
    check_val_every_n_epoch: int = key(1, "Epochs from one validation to the next.", low=1)
    log_every_n_steps: int = key(50, "Steps between two points of a curve with one point per step.", low=1)
    deterministic: bool = key(True, "Use only kernels that repeat a run bit for bit.")
    benchmark: bool | None = key(None, "Let cuDNN choose the fastest kernels; null: unless deterministic.")
    inference_mode: bool = key(True, "Validate under torch.inference_mode; false uses torch.no_grad.")
    sync_batchnorm: bool = key(False, "Synchronise batch norms over the processes of a run.")
    detect_anomaly: bool = key(False, "Report the operation whose gradient is NaN; slow.")
    profiler: str | None = key(None, "Write the time of each part of a run to its directory.",
                               choices=("simple", "advanced", "pytorch"))  # fmt: skip
    enable_progress_bar: bool = key(True, "Show a progress bar on a terminal.")

    def __post_init__(self) -> None:
        check_values(self)
        if self.fast_dev_run:
            self.max_epochs = self.check_val_every_n_epoch = 1
            self.limit_train_batches = self.limit_val_batches = self.limit_test_batches = int(self.fast_dev_run)
        if self.overfit_batches:
            self.limit_val_batches = self.overfit_batches
        if self.devices < 1 and self.devices != -1:
            raise InputError(f"trainer.devices={self.devices} must be at least 1, or -1 for all GPUs")
        if self.strategy == "auto" and self.devices != 1:
            raise InputError(f"trainer.devices={self.devices} needs trainer=ddp or trainer=fsdp")
        if self.max_time is not None and not re.fullmatch(r"\d{1,6}(:\d\d){3}", self.max_time):
            raise InputError(f"trainer.max_time={self.max_time} must be days:hours:minutes:seconds, as in 00:01:00:00")
        if self.max_time is not None and not any(map(int, self.max_time.split(":"))):
            raise InputError(
                f"trainer.max_time={self.max_time} leaves no time to train; use 00:01:00:00 for an hour, or null for "
                "no limit"
            )
        if self.check_val_every_n_epoch > self.max_epochs:
            raise InputError(
                f"trainer.check_val_every_n_epoch={self.check_val_every_n_epoch} exceeds "
                f"trainer.max_epochs={self.max_epochs}: the run would never be validated"
            )
        for name in ("train", "val", "test"):
            limit = getattr(self, f"limit_{name}_batches")
            if limit == 0 and name == "val":
                continue
            if not limit > 0 or (isinstance(limit, float) and limit > 1):  # NaN fails the first comparison
                raise InputError(
                    f"trainer.limit_{name}_batches={limit} must be a number of batches (at least 1) or a share "
                    "(above 0, at most 1.0)"
                )


@dataclass(slots=True)
class DashboardConfig:
    """What TensorBoard shows besides curves."""

    prefix: ClassVar[str] = "dashboard."

    text: bool = key(True, "The configuration, the command and the network's layers.")
    batch: bool = key(True, "A training batch as the network sees it.")
    patches: bool = key(True, "An image next to its patches.")
    positions: bool = key(True, "Similarity of the learned positions.")
    attention: bool = key(True, "Where the network looks in some validation images.")
    mistakes: bool = key(True, "The most confident mistakes on validation images.")
    confusion: bool = key(True, "Confusion matrix; for CIFAR-100 also by superclass.")
    per_class: bool = key(True, "Accuracy of each class.")
    reliability: bool = key(True, "Accuracy against confidence.")
