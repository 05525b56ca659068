"""The context of every command: from the first import on, a signal, full disk or closed pipe ends it with one line.

Nothing here imports a library, so that little time passes before signals are handled.
"""

import contextlib
import errno
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from vit_lightning.keys import InputError

# Words in errors for which libraries have no class of their own.
MEMORY_WORDS = (
    *("out of memory", "can't allocate memory", "DefaultCPUAllocator", "Unable to allocate"),
    "Storage size calculation overflowed",
)
DISK_WORDS = (
    *("No space left on device", "disk is full", "File too large", "Read-only file system", "readonly database"),
    *("disk I/O error", "file write failed", "unexpected pos", "write failed"),
)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
PROCESS_WORDS = ("terminated abruptly",)


class Terminated(SystemExit):
    """Raised when SIGTERM arrives, unless a launcher or the training loop handles it."""


def terminate(number: int, frame: Any) -> NoReturn:
    """Handle SIGTERM."""
    raise Terminated(128 + number)


def quit_now(number: int, frame: Any) -> NoReturn:
    """Handle a signal while libraries load; an exception during the import of a C++ library would abort the process."""
    os.write(2, b"interrupted\n" if number == signal.SIGINT else b"terminated\n")
    os._exit(128 + number)


DEFAULTS = (signal.SIG_DFL, signal.default_int_handler, terminate)  # others are a launcher's or ignore the signal


@contextlib.contextmanager
def handling(handlers: dict[signal.Signals, Callable[[int, Any], Any]]) -> Iterator[None]:
    """Handle signals that nothing else handles; only the main thread can."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in handlers if main}
    before = {number: handler for number, handler in before.items() if handler in DEFAULTS}
    for number in before:
        signal.signal(number, handlers[number])
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def load(task: str) -> Callable[..., Any]:
    """Import a function given as ``module:function``."""
    module, _, function = task.partition(":")
    with handling({signal.SIGINT: quit_now, signal.SIGTERM: quit_now}):
        return getattr(importlib.import_module(module), function)


def run(task: str, *arguments: Any) -> None:
    """Import a command and call it; an interruption ends it with one line on standard error and an exit code."""
    prepare_streams()
    with handling({signal.SIGTERM: terminate}):
        try:
            check_directory()
            load(task)(*arguments)
            sys.stdout.flush()
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        except Terminated as end:
            print("terminated", file=sys.stderr)
            sys.exit(end.code)
        except Exception as error:
            line = str(error) if isinstance(error, InputError) else fault_of(error)
            if line is None or "traceback=true" in sys.argv:
                raise
            sys.exit(f"error: {line}")
        finally:
            try:
                sys.stdout.flush()
            except OSError:  # Python would try to write the rest again at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def prepare_streams() -> None:
    """Make any name printable, and keep files from taking the numbers of closed streams and so receiving the output."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
        elif number:
            stream.reconfigure(errors="backslashreplace")


def check_directory() -> None:
    """End the command if its working directory was deleted."""
    try:
        Path.cwd()
    except OSError as error:
        sys.exit(f"error: the working directory is gone ({error.strerror}); change to another one (cd)")


def stdout_fails() -> bool:
    """Whether writing an empty line to standard output fails: its reader has exited, or its disk is full."""
    try:
        print(flush=True)
    except OSError:
        return True
    return False


def out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the machine or its accelerator is exhausted."""
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and any(word in str(error) for word in MEMORY_WORDS))
    )


def fault_of(error: BaseException) -> str | None:
    """Describe an operating system error, raised directly or by a library; ``None`` for any other error."""
    [reason, *_] = str(error).strip().splitlines() or [type(error).__name__]
    if out_of_memory(error):
        return f"out of memory ({reason}); use a smaller network, fewer or smaller images, or close other programs"
    if isinstance(error, OSError):
        reason = error.strerror or reason
        if error.errno == errno.EMFILE:
            return f"{reason}; raise the limit with ulimit -n"
        if not error.filename:
            return f"standard output cannot be written ({reason})" if stdout_fails() else reason
        if error.errno in FULL:
            return f"{error.filename} cannot be written ({reason}); free disk space or name another directory"
        return f"{error.filename} cannot be opened ({reason}); fix its permissions or name another file"
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":  # a library's file name
        name = error.object[error.start : error.end]
        return f"a name with {name} cannot be written as UTF-8; rename it or set LC_ALL=C.UTF-8"
    if any(word in str(error) for word in DISK_WORDS):
        return f"a file cannot be written ({reason}); free disk space or fix the permissions"
    if any(word in str(error) for word in PROCESS_WORDS):
        return f"a process of this command was killed ({reason}); it may have been out of memory"
    return fault_of(error.__cause__) if error.__cause__ else None
