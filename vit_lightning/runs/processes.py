"""Several processes that train one run, each with its own device: what they share, and how Lightning starts them.

Lightning starts the other processes on this machine itself, except with ``torchrun``, which starts all of them, on one
machine or several.
"""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from vit_lightning.config import Config
from vit_lightning.keys import InputError


def share_run_dir(run_dir: Path) -> Path:
    """Return the first process's directory in every process; under ``torchrun`` each process has its own."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return run_dir
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    names = [str(run_dir.resolve())]
    dist.broadcast_object_list(names)
    shared = Path(names[0])
    if shared != run_dir.resolve():
        run_dir.rmdir()
    return shared


def placement(config: Config) -> dict[str, Any]:
    """Return Lightning's ``strategy``, ``devices`` and ``num_nodes``.

    Raises:
        InputError: if batches cannot be divided among the processes, or the processes cannot find each other.
    """
    devices, nodes = count_devices(config)
    strategy: str | Strategy = "auto"
    if config.trainer.strategy == "ddp":
        strategy = DDPStrategy(forward_sync_buffers=False)  # buffers are synchronised before each validation instead
    elif config.trainer.strategy == "fsdp":
        strategy = ModelParallelStrategy(
            data_parallel_size=devices * nodes, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    return {"strategy": strategy, "devices": devices, "num_nodes": nodes, "use_distributed_sampler": False}


def count_devices(config: Config) -> tuple[int, int]:
    """Return the number of devices per machine, and the number of machines.

    Raises:
        InputError: as :func:`placement`.
    """
    trainer = config.trainer
    devices, nodes = trainer.devices, 1
    if "TORCHELASTIC_RUN_ID" in os.environ:
        if trainer.strategy == "auto":
            raise InputError("torchrun starts several processes of one run; use trainer=ddp or trainer=fsdp")
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    elif trainer.strategy != "auto" and "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        raise InputError(
            f"srun has started {os.environ['SLURM_NTASKS']} tasks that cannot find each other; start torchrun once "
            "per node: srun --ntasks-per-node=1 torchrun … -m vit_lightning.train trainer=ddp"
        )
    elif devices == -1:
        devices = max(1, torch.cuda.device_count())
    config.check_processes(devices * nodes)
    return devices, nodes


def lost_process(error: Exception) -> bool:
    """Whether an error says that the connection to another process of the run was lost."""
    text = str(error)
    return isinstance(error, dist.DistError) or "Connection closed by peer" in text or "Connection reset" in text
