"""What this machine has, and how a run uses it: accelerator, memory, compiler, and what is said about them."""

import ctypes
import logging
import math
import sys
import time
import warnings
from dataclasses import replace

import torch
from torch import nn

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

from vit_lightning.config import TrainerConfig
from vit_lightning.keys import InputError


def accelerators() -> dict[str, bool]:
    """Which of ``gpu`` and ``mps`` torch finds here."""
    return {"gpu": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}


def check_accelerator(trainer: TrainerConfig) -> None:
    """Refuse an accelerator that is not there, and a precision it does not have.

    Raises:
        InputError: if so.
    """
    there = accelerators()
    if not there.get(trainer.accelerator, True):
        instead = "trainer.accelerator=mps" if there["mps"] else "trainer=cpu"
        raise InputError(f"trainer.accelerator={trainer.accelerator}: torch finds none here; use {instead}")
    if trainer.precision == "16-mixed" and (trainer.accelerator == "cpu" or not any(there.values())):
        raise InputError("trainer.precision=16-mixed needs a GPU; on the CPU use trainer.precision=bf16-mixed")


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 faster than in float32: a CPU does with instructions for it alone."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def settle_precision(trainer: TrainerConfig) -> TrainerConfig:
    """Say which precision ``trainer.precision=auto`` is here.

    Raises:
        InputError: if there is no such accelerator.
    """
    check_accelerator(trainer)
    if trainer.precision != "auto":
        return trainer
    device = torch.device("cpu") if trainer.accelerator == "cpu" else evaluation_device(trainer.accelerator)
    if has_fast_bfloat16(device):
        return replace(trainer, precision="bf16-mixed")
    return replace(trainer, precision="16-mixed" if device.type == "cuda" else "32-true")


def evaluation_device(accelerator: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``gpu`` or ``mps`` means here.

    Raises:
        InputError: if torch finds none.
    """
    if accelerator == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if not accelerators().get(accelerator, True):
        raise InputError(f"accelerator={accelerator}: torch finds none here; leave it out")
    return torch.device({"gpu": "cuda"}.get(accelerator, accelerator))


def spare_memory_work() -> None:
    """Spare a training step two kinds of work on memory that change no result.

    glibc hands hundreds of megabytes back to the kernel after every step and gets them again page by page, zeroed:
    here it keeps them. Other C libraries are left as they are. And torch, when asked for deterministic kernels, fills
    all fresh memory, which repeats nothing that these kernels do not repeat anyway.
    """
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        mallopt(mmap_threshold, 32 * 2**20)  # the largest that it takes
        mallopt(trim_threshold, -1)  # never


def compile_network(net: nn.Module, device: torch.device) -> None:
    """Have ``net`` compiled in place at its first use, so that its parameters keep their names; or say why not."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that a CPU has no CUDA is no news
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # whatever a compiler that is missing or broken makes of it
        [reason, *_] = str(error).strip().splitlines() or [repr(error)]
        print(f"compile=true: torch cannot compile here ({reason}); training goes on without", file=sys.stderr)
    else:
        net.compile()


def quiet_lightning() -> None:
    """Silence what Lightning says of every run here and what is not so here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers",  # one process that gathers from memory is the fastest reader here
        ".*smaller than the logging interval",  # the curves go on across epochs
        ".*model that overrides the configure_model callback",  # with fsdp alone, which takes no averages
        ".*It is recommended to use `self.log.'speed/",  # the first process's own speed and memory are meant
        ".*Encountered `nan` values in tensor",  # StopAtNaN says where
        ".*`isinstance.treespec, LeafSpec.` is deprecated",  # Lightning 2.6 on a newer torch
    ):
        warnings.filterwarnings("ignore", message=message)


def memory(device: torch.device) -> float:
    """Bytes that the run has held at most: of the GPU that trains, else of the process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    if resource is None:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def now() -> float:
    """A clock in seconds that first waits for the steps that an accelerator has queued."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()
