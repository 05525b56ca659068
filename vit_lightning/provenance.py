"""Where a number comes from: command, commit, libraries, hardware and date, for the files that keep numbers."""

import datetime
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vit_lightning.keys import Invocation

LIBRARIES = ("torch", "torchvision", "lightning", "torchmetrics", "hydra-core", "numpy", "pillow", "scikit-learn")


def provenance(invocation: Invocation) -> dict[str, Any]:
    """Collect what someone else needs to know to reproduce the numbers.

    Returns:
        ``command`` as typed, ``date`` (UTC, ISO 8601), ``git_commit`` (with ``+changes`` if the package or
        ``conf/`` differed from it; ``None`` outside a repository), ``libraries`` (name to version), ``hardware``.
    """
    return {
        "command": invocation.command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "libraries": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "hardware": hardware(),
    }


def git_commit() -> str | None:
    """The commit of the checkout that this package runs from, with ``+changes`` if the package or ``conf/`` differs."""

    def git(*arguments: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", ".", "../conf") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def hardware() -> dict[str, Any]:
    """Processor, its vector instructions, cores, torch's threads, memory in GiB, and the GPU if there is one."""
    return {
        "cpu": _cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
        if hasattr(os, "sysconf")
        else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
