"""The machine and its use: accelerator, precision, memory, compiler, random seeds, and warnings about them."""

import contextlib
import ctypes
import logging
import math
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import nn

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

from vit_lightning.config import TrainerConfig
from vit_lightning.guard import out_of_memory
from vit_lightning.keys import InputError


def accelerators() -> dict[str, bool]:
    """Which of ``gpu`` and ``mps`` are available."""
    return {"gpu": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}


def check_accelerator(trainer: TrainerConfig) -> None:
    """Check that the accelerator is available and supports the precision.

    Raises:
        InputError: if not.
    """
    available = accelerators()
    if not available.get(trainer.accelerator, True):
        instead = "trainer.accelerator=mps" if available["mps"] else "trainer=cpu"
        raise InputError(f"trainer.accelerator={trainer.accelerator} is not available; use {instead}")
    if trainer.precision == "16-mixed" and (trainer.accelerator == "cpu" or not any(available.values())):
        raise InputError("trainer.precision=16-mixed needs a GPU; on the CPU use trainer.precision=bf16-mixed")


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether a device is faster in bfloat16 than in float32; a CPU needs special instructions for that."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def resolve_precision(trainer: TrainerConfig) -> TrainerConfig:
    """Replace ``trainer.precision=auto`` with a precision that suits this machine.

    Raises:
        InputError: if the accelerator is not available.
    """
    check_accelerator(trainer)
    if trainer.precision != "auto":
        return trainer
    device = torch.device("cpu") if trainer.accelerator == "cpu" else evaluation_device(trainer.accelerator)
    if has_fast_bfloat16(device):
        return replace(trainer, precision="bf16-mixed")
    return replace(trainer, precision="16-mixed" if device.type == "cuda" else "32-true")


def evaluation_device(accelerator: str) -> torch.device:
    """The device for ``auto``, ``cpu``, ``gpu`` or ``mps``.

    Raises:
        InputError: if it is not available.
    """
    if accelerator == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if not accelerators().get(accelerator, True):
        raise InputError(f"accelerator={accelerator} is not available; remove it")
    return torch.device({"gpu": "cuda"}.get(accelerator, accelerator))


def tune_malloc() -> None:
    """Avoid two memory costs of every training step, without changing any result.

    glibc returns hundreds of megabytes to the kernel after every step and gets them back page by page, zeroed; here it
    keeps them. Other C libraries are unaffected. With deterministic kernels, torch fills all uninitialised memory;
    here this does not improve reproducibility, because the kernels do not read such memory.
    """
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        mallopt(mmap_threshold, 32 * 2**20)  # the largest possible value
        mallopt(trim_threshold, -1)  # never trim


@contextlib.contextmanager
def out_of_memory_hint(reduce: str) -> Iterator[None]:
    """If the memory of the machine or its accelerator is exhausted, report it in one line.

    Args:
        reduce: what to reduce, such as ``data.batch_size``.

    Raises:
        InputError: if memory is exhausted.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not out_of_memory(error):
            raise
        raise InputError(f"out of memory; reduce {reduce}") from error


def compile_network(net: nn.Module, device: torch.device) -> None:
    """Compile ``net`` in place on first use, keeping its parameters' names, or report why that fails."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # hides a warning about missing CUDA
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # a missing or broken compiler raises many types
        [reason, *_] = str(error).strip().splitlines() or [repr(error)]
        print(f"warning: compile=true fails ({reason}); continuing without torch.compile", file=sys.stderr)
    else:
        net.compile()


def quiet_lightning() -> None:
    """Silence messages of Lightning that appear in every run or do not apply here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers",  # loading in the training process is fastest here
        ".*smaller than the logging interval",  # curves continue across epochs
        ".*model that overrides the configure_model callback",  # applies to averaging with fsdp, which is refused
        ".*It is recommended to use `self.log.'speed/",  # speed and memory are those of the first process
        ".*in eval mode at the start of training",  # frozen parts are in eval mode
        ".*Encountered `nan` values in tensor",  # StopAtNaN reports them
        ".*`isinstance.treespec, LeafSpec.` is deprecated",  # raised by Lightning 2.6 with a newer torch
    ):
        warnings.filterwarnings("ignore", message=message)


def memory(device: torch.device) -> float:
    """Peak memory use in bytes, of the GPU or else of the process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    if resource is None:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def now() -> float:
    """Read a clock, in seconds, after the accelerator, if any, has finished its queued work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def derived_seed(seed: int, number: int, use: str) -> int:
    """Derive the seed of one use of one epoch or step of a run, independent of all others."""
    return int(np.random.SeedSequence([seed, number, *use.encode()]).generate_state(1, np.uint64)[0]) >> 1
