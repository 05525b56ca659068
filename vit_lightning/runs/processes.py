"""One run in several processes, a device each: which of them this one is, and what they must agree on.

Lightning starts the others of this machine itself; with ``torchrun``, on one machine or many, they are there already.
"""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from vit_lightning.config import Config
from vit_lightning.keys import InputError


def agree_on(run_dir: Path) -> Path:
    """The first process's directory, for all of them: under ``torchrun`` each has been given one of its own."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return run_dir
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    names = [str(run_dir.resolve())]
    dist.broadcast_object_list(names)
    agreed = Path(names[0])
    if agreed != run_dir.resolve():
        run_dir.rmdir()
    return agreed


def placement(config: Config) -> dict[str, Any]:
    """Lightning's ``strategy``, ``devices`` and ``num_nodes``.

    Raises:
        InputError: if the batches cannot be divided among so many processes, or these do not know of each other.
    """
    trainer = config.trainer
    devices, nodes = trainer.devices, 1
    if "TORCHELASTIC_RUN_ID" in os.environ:
        if trainer.strategy == "auto":
            raise InputError("torchrun starts several processes of one run, which needs trainer=ddp or trainer=fsdp")
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    elif trainer.strategy != "auto" and "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        raise InputError(
            f"srun has started {os.environ['SLURM_NTASKS']} tasks that do not know of each other; start torchrun "
            "in one for each node: srun --ntasks-per-node=1 torchrun … -m vit_lightning.train trainer=ddp"
        )
    elif devices == -1:
        devices = max(1, torch.cuda.device_count())
    config.check_processes(devices * nodes)
    strategy: str | Strategy = "auto"
    if trainer.strategy == "ddp":
        strategy = DDPStrategy(forward_sync_buffers=False)  # before each validation is enough
    elif trainer.strategy == "fsdp":
        strategy = ModelParallelStrategy(
            data_parallel_size=devices * nodes, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    return {"strategy": strategy, "devices": devices, "num_nodes": nodes, "use_distributed_sampler": False}
