"""The checkpoints of a run: when they are written, whole or not at all, and how they are verified when they are read.

``last.ckpt`` is where a run goes on, ``last-previous.ckpt`` the one before it, ``best.ckpt`` that of the best
``val/acc``. Each ends with the SHA-256 of what comes before, which :func:`torch.load` leaves unread.
"""

import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch.distributed.tensor import DTensor

from vit_lightning.files import read_checkpoint, write_whole
from vit_lightning.keys import InputError
from vit_lightning.runs.callbacks import EpochRecorder
from vit_lightning.terminal import is_first


def newest_sound(folder: Path) -> tuple[Path | None, int, list[str]]:
    """The newest checkpoint from which a run can go on.

    Returns:
        Its path, the optimizer steps that lie before it, and what is wrong with newer ones.
    """
    wrong: list[str] = []
    for path in (folder / "last.ckpt", folder / "last-previous.ckpt"):
        try:
            return path, read_checkpoint(path)["global_step"], wrong
        except FileNotFoundError:
            continue
        except InputError as error:
            wrong.append(str(error))
        except OSError as error:
            wrong.append(f"{path} cannot be read ({error.strerror or error})")
        except (KeyError, TypeError, IndexError):  # a file of torch's with something else
            wrong.append(f"{path} is no checkpoint of a run")
    return None, 0, wrong


class Saver(Checkpoint):
    """Saves a run after every epoch, within one every few minutes, and when it is asked to stop.

    SIGINT and SIGTERM are asked once: the run is saved after the step, or the epoch in whose last step or validation
    it is, and ends with the exit code 130 or 143. Another one stops it at once.

    Args:
        folder: of the checkpoints.
        minutes: from one checkpoint to the next within an epoch; ``None`` for none there.
        recorder: knows the best epoch.
    """

    def __init__(self, folder: Path, minutes: float | None, recorder: EpochRecorder) -> None:
        self.folder = folder
        self.minutes = minutes
        self.recorder = recorder
        self._signal = 0  # that has come
        heeded = (signal.SIG_DFL, signal.default_int_handler)  # a launcher's own, or none in the background, are kept
        self._signals = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) in heeded]
        if threading.current_thread() is not threading.main_thread():
            self._signals = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved = time.monotonic()
        for number in self._signals:  # after Lightning has set its own, which it takes back when training ends
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        self._signal = number
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        if is_first():
            again = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
            print(f"stopping as soon as the run can be saved; {again} again: at once", file=sys.stderr, flush=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        due = self.minutes is not None and time.monotonic() - self._saved >= 60 * self.minutes
        number, wanted = self._agreed(trainer, self._signal, due)
        if (number or wanted) and not trainer.is_last_batch:  # after which the epoch's end follows
            self._save(trainer, pl_module)
            self._stop(number)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        row = self.recorder.rows[-1]
        self._save(trainer, pl_module, best="val/acc" in row and row is self.recorder.best)
        [number] = self._agreed(trainer, self._signal)
        self._stop(number)

    @staticmethod
    def _agreed(trainer: L.Trainer, *wishes: int) -> list[int]:
        """The largest of all processes' wishes, which save and stop together."""
        if trainer.world_size == 1:
            return list(wishes)
        wanted = torch.tensor([float(wish) for wish in wishes], device=trainer.strategy.root_device)
        return [int(wish) for wish in trainer.strategy.reduce(wanted, reduce_op="max")]

    def _save(self, trainer: L.Trainer, pl_module: L.LightningModule, best: bool = False) -> None:
        # With fsdp, each process looks at its part.
        parts = (p.to_local() if isinstance(p, DTensor) else p for p in pl_module.parameters())
        [broken] = self._agreed(trainer, not all(part.isfinite().all() for part in parts))
        if broken:
            raise InputError(f"after step {trainer.global_step} the weights are no numbers any more")
        for logger in trainer.loggers:
            logger.save()  # a run that goes on from here misses no point
        new, last = self.folder / ".new.ckpt", self.folder / "last.ckpt"
        trainer.save_checkpoint(new)
        if trainer.is_global_zero:
            if best:
                write_whole(self.folder / "best.ckpt", new.read_bytes())
            if last.exists():
                last.replace(self.folder / "last-previous.ckpt")
            new.replace(last)
        self._saved = time.monotonic()

    @staticmethod
    def _stop(number: int) -> None:
        if number:
            sys.exit(128 + number)
