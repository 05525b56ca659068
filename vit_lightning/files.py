"""The files of a run's directory, and writing files that are complete or absent. Nothing here imports torch."""

import contextlib
import csv
import errno
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vit_lightning.guard import stdout_fails
from vit_lightning.terminal import relative

SUMMARY = "summary.json"  # the record of a finished run
ERROR = "error.txt"  # the message of a failed job of a sweep


class RunFiles:
    """The paths of a run's files.

    Args:
        folder: the run's directory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "config.yaml"
        self.metrics = folder / "metrics.csv"
        self.summary = folder / SUMMARY
        self.curves = folder / "curves.png"
        self.patches = folder / "patches.png"
        self.nan = folder / "nan.json"
        self.error = folder / ERROR
        self.lock = folder / ".lock"
        self.checkpoints = folder / "checkpoints"
        self.best = self.checkpoints / "best.ckpt"
        self.last = self.checkpoints / "last.ckpt"
        self.previous = self.checkpoints / "last-previous.ckpt"
        self.damaged = self.checkpoints / "last-damaged.ckpt"
        self.unfinished = self.checkpoints / ".new.ckpt"


def cannot_write(error: OSError, path: Path) -> str:
    """Describe an error in writing the file that it names, or else ``path``."""
    reason = error.strerror or error
    if not error.filename and stdout_fails():
        return f"standard output cannot be written ({reason})"
    hint = "raise ulimit -n" if error.errno == errno.EMFILE else "free disk space or fix the permissions"
    return f"{error.filename or relative(path)} cannot be written ({reason}); {hint}"


def write_synced(path: Path, content: bytes | memoryview) -> None:
    """Write a file and flush it to the disk; if that fails, remove it.

    Raises:
        OSError: if the file cannot be written; it names ``path``.
    """
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise OSError(
            error.errno, error.strerror or str(error), str(path)
        ) from error  # a full disk is reported without a name


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replace a file atomically: at any moment, either the old or the new content is complete.

    Raises:
        OSError: if the file cannot be written; it names ``path``.
    """
    new = path.with_name(f".new.{path.name}")
    try:
        write_synced(new, content.encode() if isinstance(content, str) else content)
        new.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink()
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def write_csv(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    """Write rows with :func:`write_atomic`; a name that is not valid Unicode is escaped, as in JSON."""
    buffer = io.StringIO()
    csv.writer(buffer).writerows(rows)
    write_atomic(path, buffer.getvalue().encode(errors="backslashreplace"))


def save_figure(figure: Any, path: Path) -> None:
    """Write a Matplotlib figure with :func:`write_atomic`, in the format given by the file's extension."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:])
    write_atomic(path, buffer.getvalue())


def remove_empty(run_dir: Path) -> None:
    """Remove a run's directory and its parents below the working directory, as far as they are empty."""
    start = Path.cwd()
    with contextlib.suppress(OSError):  # rmdir fails on a directory that is not empty
        for folder in (run_dir, *run_dir.parents):
            if folder == run_dir or (folder.is_relative_to(start) and folder != start):
                folder.rmdir()
