"""Measure this project beside the tutorial's script and other libraries: ``python -m vit_lightning.benchmark``.

Contestants take turns, round by round, so that a slow machine slows all alike; what is compared comes from one run.
"""

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vit_lightning.analysis.figures import draw_benchmark
from vit_lightning.benchmarks.baselines import installed
from vit_lightning.benchmarks.contestants import OURS, PIL, TUTORIAL, measure, operator_shares, prepare, sizes
from vit_lightning.config import ModelConfig
from vit_lightning.data.module import ImageData, follow_data
from vit_lightning.devices import check_accelerator, quiet_lightning
from vit_lightning.keys import InputError, Invocation, from_python
from vit_lightning.model.vit import ViT
from vit_lightning.provenance import provenance
from vit_lightning.schemas import BenchmarkRun
from vit_lightning.terminal import print_files, print_table

TRAIN = [sys.executable, "-m", "vit_lightning.train"]


def benchmark(config: BenchmarkRun, run_dir: Path, invocation: Invocation | None = None) -> float:
    """Measure everything, print the tables, and write ``benchmark.json`` and ``benchmark.png``.

    Returns:
        Training speed of this project as a multiple of the tutorial's.

    Raises:
        InputError: if the data or the machine does not fit the configuration.
    """
    if config.model.block != "prenorm" or config.trainer.precision != "32-true":
        raise InputError("the benchmark compares model.block=prenorm at trainer.precision=32-true; leave both out")
    memory = peak_memory(config)  # while this process is small: a child's peak begins at its parent's

    quiet_lightning()
    check_accelerator(config.trainer)
    record = provenance(invocation or from_python())
    data = ImageData(config.data, config.model.image_size, config.seed)
    data.setup()
    config = follow_data(config, data)
    trainer = L.Trainer(accelerator=config.trainer.accelerator, devices=1, logger=False, enable_checkpointing=False)
    device = trainer.strategy.root_device

    speeds: dict[str, dict[str, list[float]]] = {"training": {}, "input pipeline": {}, "inference": {}}
    steps: dict[str, dict[int, list[float]]] = {
        axis: {value: [] for value in runs} for axis, runs in sizes(config).items()
    }
    matmul: list[float] = []
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # nothing: the profiler logs to the terminal; processes inherit this
    with ExitStack() as stack:
        processes = {
            name: stack.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
            for name in (OURS, TUTORIAL, PIL, *installed(data.channels))
        }
        offers = {name: process.submit(prepare, name, config, device) for name, process in processes.items()}
        for name, offer in offers.items():
            for group in speeds.keys() & offer.result():
                speeds[group][name] = []
        for number in range(1, config.benchmark.rounds + 1):
            print(f"round {number}/{config.benchmark.rounds}", flush=True)
            for group, contestants in speeds.items():
                for name, values in contestants.items():
                    values.append(processes[name].submit(measure, group).result())
            for axis, points in steps.items():
                for value, seconds in points.items():
                    seconds.append(processes[OURS].submit(measure, f"{axis}={value}").result())
            matmul.append(processes[OURS].submit(measure, "matrix products").result())
        shares = processes[OURS].submit(operator_shares, config, device).result()

    flops = training_flops(config.model)
    report = {
        **record,
        "device": str(device),
        "speeds": {
            group: {name: spread(values) for name, values in contestants.items()}
            for group, contestants in speeds.items()
        },
        "step_seconds": {
            axis: [{axis: value, **spread(seconds)} for value, seconds in points.items()]
            for axis, points in steps.items()
        },
        "step_shares": shares,
        "training_flops_per_image": flops,
        "matmul_flops_per_second": spread(matmul),
        "share_of_matmul_rate": flops * statistics.median(speeds["training"][OURS]) / statistics.median(matmul),
        "peak_memory_bytes": memory,
        "start_up_seconds": {name: spread(times) for name, times in start_up(config.benchmark.rounds).items()},
        "config": asdict(config),
    }
    (run_dir / "benchmark.json").write_text(json.dumps(report, indent=2) + "\n")
    draw_benchmark(report).savefig(run_dir / "benchmark.png")
    show(report, run_dir)
    return report["speeds"]["training"][OURS]["median"] / report["speeds"]["training"][TUTORIAL]["median"]


def training_flops(model: ModelConfig) -> int:
    """Floating-point operations of a forward and backward pass for one image, by torch's counter."""
    assert model.channels is not None
    images = torch.zeros(2, model.channels, model.image_size, model.image_size)
    # Of the plain kernel the counter knows the cost on every device; the fused one's mathematics is the same.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        ViT(model)(images).sum().backward()
    return counter.get_total_flops() // len(images)


def peak_memory(config: BenchmarkRun) -> int:
    """The largest resident memory, in bytes, of a process that trains the same network on the same data."""
    keys = ("root", "cache_dir", "split", "batch_size")
    data = [f"data={config.data.source}", *(f"data.{key}='{getattr(config.data, key)}'" for key in keys)]
    model = [f"model.{key}={value}" for key, value in asdict(config.model).items() if value is not None]
    limits = ["trainer.max_epochs=1", *(f"trainer.limit_{split}_batches=30" for split in ("train", "val", "test"))]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [*TRAIN, *data, *model, *limits, f"hydra.run.dir='{folder}/run'"], stdout=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise InputError("the train command failed on this configuration, as said above")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # Linux counts in KiB


def start_up(rounds: int) -> dict[str, list[float]]:
    """Seconds from a command to its end, for commands that train nothing."""
    commands = {"--help": ["--help"], "--cfg job": ["--cfg", "job"], "a mistake": ["model.layers=0"]}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, arguments in commands.items():
            start = time.perf_counter()
            subprocess.run([*TRAIN, *arguments], capture_output=True)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values: list[float]) -> dict[str, Any]:
    """Median, least, greatest and all of some measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": values}


def show(report: dict[str, Any], run_dir: Path) -> None:
    """Print the tables."""
    for group, contestants in report["speeds"].items():
        rows: list[tuple[str, ...]] = []
        ours = contestants[OURS]["median"]
        for name, speed in sorted(contestants.items(), key=lambda item: -item[1]["median"]):
            ratio = "" if name == OURS else f"{ours / speed['median']:.2f} ×"
            rows.append((name, f"{speed['median']:,.0f}", f"{speed['min']:,.0f} – {speed['max']:,.0f}", ratio))
        print_table(group, ("", "images/s", "least to greatest", "ours is faster by"), rows)
    rows = []
    for axis, points in report["step_seconds"].items():
        for point in points:
            milliseconds = 1000 * point["median"]
            per_image = 1000 * milliseconds / point.get("batch", report["config"]["data"]["batch_size"])
            rows.append((axis, str(point[axis]), f"{milliseconds:,.1f}", f"{per_image:,.0f}"))
        rows.append(())
    print_table("cost of a training step", ("", "value", "ms", "per image (µs)"), rows)
    shares = [(name, f"{share:.1%}") for name, share in report["step_shares"].items()]
    print_table("where the time of a training step goes", ("operator", "share"), shares)
    flops, rate = report["training_flops_per_image"], report["matmul_flops_per_second"]["median"]
    print(
        f"{flops / 1e9:.3f} GFLOP a training image; matrix products run at {rate / 1e9:,.0f} GFLOP/s; "
        f"{report['share_of_matmul_rate']:.0%} of that is used"
    )
    print(f"peak memory of the train command {report['peak_memory_bytes'] / 1e9:.2f} GB")
    for name, seconds in report["start_up_seconds"].items():
        print(f"{name} takes {seconds['median']:.2f} s")
    print_files(run_dir / name for name in ("benchmark.json", "benchmark.png"))
