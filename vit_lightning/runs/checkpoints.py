"""The checkpoints of a run: when and how they are written, which of them it resumes from, and how it ends early.

A run resumes from ``last.ckpt``; ``last-previous.ckpt`` is the checkpoint before it, and ``best.ckpt`` that of the
best epoch.
"""

import contextlib
import errno
import io
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from torch.distributed.tensor import DTensor

from vit_lightning.files import RunFiles, cannot_write, write_atomic, write_synced
from vit_lightning.guard import DEFAULTS
from vit_lightning.keys import InputError, MachineError
from vit_lightning.recipe.weights import read_checkpoint
from vit_lightning.runs.callbacks import EpochRecorder
from vit_lightning.runs.processes import lost_process
from vit_lightning.terminal import is_first, relative

# Lightning's exit codes after Ctrl-C and SIGTERM outside of training, and the corresponding codes of a shell.
EXIT_CODES: dict[Any, int] = {1: 128 + signal.SIGINT, None: 128 + signal.SIGTERM}


def latest_valid(files: RunFiles) -> tuple[Path | None, dict[str, Any], list[str]]:
    """Find the latest checkpoint that a run can continue from.

    Returns:
        Its path, its content, and what is wrong with newer ones.
    """
    problems: list[str] = []
    for path in (files.last, files.previous):
        try:
            content = read_checkpoint(path)
            if isinstance(content.get("global_step"), int):
                return path, content, problems
            problems.append(f"{path} is not a checkpoint of a run")
        except FileNotFoundError:
            continue
        except InputError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{path} cannot be read ({error.strerror or error})")
    return None, {}, problems


@contextlib.contextmanager
def resume_hint(files: RunFiles) -> Iterator[None]:
    """Report in one line what ended a run early, with the command that continues it.

    Raises:
        InputError: for a mistake of the user.
        MachineError: if a file cannot be written, or a process of the run or of its data loader dies.
    """
    try:
        yield
    except SystemExit as end:
        if is_first():
            checkpoint, content, _ = latest_valid(files)
            at = f"at step {content['global_step']}" if checkpoint else "before the first checkpoint"
            hint = f"; continue with resume={relative(files.folder)}" if checkpoint else ""
            print(f"interrupted {at}{hint}", file=sys.stderr)
        sys.exit(EXIT_CODES.get(end.code, end.code))
    except (InputError, OSError, RuntimeError) as error:
        lines = str(error).splitlines() or [""]
        if not is_first() and (isinstance(error, InputError) or lost_process(error)):
            sys.exit(1)  # the first process reports an error that all of them see
        if isinstance(error, InputError):
            reason = str(error)
        elif lines[0].startswith("Caught ") and "DataLoader worker" in lines[0]:  # the worker's traceback follows
            reason = f"a data loading worker failed ({lines[-1]})"
        elif "DataLoader worker" in lines[0]:  # torch raises it in a signal handler, so nothing else can catch it
            reason = f"{lines[0].rstrip('. ')}; data.workers=0 needs no workers"
        elif isinstance(error, OSError) and error.errno != errno.ENOMEM:
            reason = cannot_write(error, files.folder)
        elif lost_process(error):
            reason = "another process of this run ended; see its message, if there is one"
        else:
            raise
        checkpoint, content, _ = latest_valid(files)
        at = f"; continue from step {content['global_step']} with resume={relative(files.folder)}" if checkpoint else ""
        kind = type(error) if isinstance(error, InputError) else MachineError
        raise kind(f"{reason}{at}") from error


class VerifiedCheckpointIO(TorchCheckpointIO):
    """Flushes checkpoints to disk before it returns, and verifies their checksums when they are read.

    Args:
        loaded: the content of the checkpoint that is requested first, if it has already been read.
    """

    def __init__(self, loaded: dict[str, Any] | None = None) -> None:
        self._loaded = loaded

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint and flush it to disk; if that fails, no file is left."""
        buffer = io.BytesIO()  # torch.save reports a full disk as a RuntimeError without a reason
        torch.save(checkpoint, buffer)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_synced(Path(path), buffer.getbuffer())

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint to the CPU, without executing code from it, whatever the other arguments say."""
        content, self._loaded = self._loaded, None
        return read_checkpoint(Path(path)) if content is None else content


class Saver(Checkpoint):
    """Saves a run after every epoch, every few minutes within one, and when it is asked to stop.

    After a first SIGINT or SIGTERM, the run is saved at the end of the step, or of the epoch during its last step or
    validation, and exits with code 130 or 143. A second signal ends it immediately.

    Args:
        files: the files of the run.
        minutes: time between checkpoints within an epoch; ``None`` for no such checkpoints.
        recorder: the recorder of the run, which knows the best epoch.
        digest: identifies the images, to recognise them when the run is resumed; ``None`` if unknown.
    """

    def __init__(
        self, files: RunFiles, minutes: float | None, recorder: EpochRecorder, digest: dict[str, str] | None = None
    ) -> None:
        self.files = files
        self.minutes = minutes
        self.recorder = recorder
        self.digest = digest
        self._signal = 0  # the last signal received, 0 if none
        # A launcher's handlers stay in place, and signals ignored by a background process stay ignored.
        self._signals = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) in DEFAULTS]
        if threading.current_thread() is not threading.main_thread():
            self._signals = []  # only the main thread can set handlers

    def state_dict(self) -> dict[str, Any]:
        """Return the digest that identifies the run's images."""
        return {} if self.digest is None else {"digest": self.digest}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved = time.monotonic()
        for number in self._signals:  # replaces the handlers of Lightning, which restores the original ones at the end
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        self._signal = number
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        if is_first():
            again = "press Ctrl-C" if number == signal.SIGINT else "send SIGTERM"
            print(f"saving and stopping; {again} again to quit immediately", file=sys.stderr, flush=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return  # a checkpoint would lose the gradients so far
        due = self.minutes is not None and time.monotonic() - self._saved >= 60 * self.minutes
        number, wanted = self._maximum(trainer, self._signal, due)
        if (number or wanted) and not trainer.is_last_batch:  # after the last batch, the epoch's end saves it
            self._save(trainer, pl_module)
            self._exit(number)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        row = self.recorder.rows[-1]
        known = "val/acc" in row or trainer.limit_val_batches == 0  # without validation, the last epoch is the best
        self._save(trainer, pl_module, best=known and row is self.recorder.best)
        [number] = self._maximum(trainer, self._signal)
        self._exit(number)

    @staticmethod
    def _maximum(trainer: L.Trainer, *values: int) -> list[int]:
        """The maximum of each value over all processes, which save and stop together."""
        if trainer.world_size == 1:
            return list(values)
        own = torch.tensor([float(value) for value in values], device=trainer.strategy.root_device)
        return [int(value) for value in trainer.strategy.reduce(own, reduce_op="max")]

    def _save(self, trainer: L.Trainer, pl_module: L.LightningModule, best: bool = False) -> None:
        # With fsdp, each process checks its own shards.
        shards = (p.to_local() if isinstance(p, DTensor) else p for p in pl_module.parameters())
        [broken] = self._maximum(trainer, not all(shard.isfinite().all() for shard in shards))
        if broken:
            raise InputError(f"weights became NaN or infinite in step {trainer.global_step}; try a lower learning rate")
        for logger in trainer.loggers:
            logger.save()  # curves are written to disk before the step's checkpoint
        files = self.files
        trainer.save_checkpoint(files.unfinished)
        if trainer.is_global_zero:
            if best:
                write_atomic(files.best, files.unfinished.read_bytes())
            if files.last.exists():
                files.last.replace(files.previous)
            files.unfinished.replace(files.last)
        self._saved = time.monotonic()

    @staticmethod
    def _exit(number: int) -> None:
        if number:
            sys.exit(128 + number)
