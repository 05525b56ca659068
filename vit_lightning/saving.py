"""The checkpoints of a run: when they are written, whole or not at all, and how they are verified when they are read.

``last.ckpt`` is where a run goes on, ``last-previous.ckpt`` the one before it, ``best.ckpt`` that of the best
``val/acc``. Each ends with the SHA-256 of what comes before, which :func:`torch.load` leaves unread.
"""

import contextlib
import hashlib
import io
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from torch.distributed.tensor import DTensor

from vit_lightning.callbacks import EpochRecorder
from vit_lightning.config import InputError
from vit_lightning.processes import is_first
from vit_lightning.terminal import relative

MARK = b"\nvit_lightning sha256 "  # then 64 hexadecimal digits


class MachineError(InputError):
    """A fault of the machine, which any other configuration would meet too: a full disk, a process that died."""


def unwritable(error: OSError, run_dir: Path) -> str:
    """What could not be written, and why."""
    return f"{error.filename or relative(run_dir)} cannot be written ({error.strerror or error}); make room, or mend it"


def write_down(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file down to the disk; what there is of one that cannot be finished leaves its room to others."""
    try:
        with path.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside ``path``, down to the disk, and only then put it there: at no moment is a part there."""
    new = path.with_name(f".new.{path.name}")
    write_down(new, content)
    new.replace(path)


class SealedCheckpoints(TorchCheckpointIO):
    """Writes checkpoints with their checksum, and verifies it; :class:`Saver` puts them in their place."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        content = buffer.getbuffer()
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_down(Path(path), content, MARK + hashlib.sha256(content).hexdigest().encode())

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Whatever is asked for, to the CPU and weights alone: what Lightning's strategies ask for here."""
        return read_checkpoint(Path(path))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Verify a checkpoint and load it, to the CPU; nothing in it is run.

    Raises:
        InputError: if it is damaged, or holds more than weights and plain values.
    """
    data = path.read_bytes()
    body, mark, digest = data.rpartition(MARK)
    if mark and hashlib.sha256(body).hexdigest().encode() != digest:
        raise InputError(f"{path} is damaged: it is not what was written")
    try:
        return torch.load(io.BytesIO(body if mark else data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch makes of any bytes
        [reason, *_] = str(error).splitlines() or [type(error).__name__]
        raise InputError(f"{path} is damaged, or no checkpoint ({reason})") from error


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
