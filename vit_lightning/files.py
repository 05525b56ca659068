"""Files that are complete or absent, and checkpoints that are verified when they are read."""

import contextlib
import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from vit_lightning.keys import InputError
from vit_lightning.terminal import relative

MARK = b"\nvit_lightning sha256 "  # then 64 hexadecimal digits


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
