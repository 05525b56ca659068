"""Measure this project next to the tutorial's script and other libraries: ``python -m vit_lightning.benchmark``.

Contestants take turns, round by round, so that a slow phase of the machine affects all of them alike.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vit_lightning.analysis.figures import TRAIN, VAL, TitledFigure
from vit_lightning.benchmarks.contestants import (
    GROUPS,
    OURS,
    TUTORIAL,
    Measurement,
    contestants,
    matmul_rate,
    operator_shares,
    process_of,
    sizes,
    step_seconds,
)
from vit_lightning.config import ModelConfig
from vit_lightning.data.module import ImageData, follow_data
from vit_lightning.devices import check_accelerator, quiet_lightning
from vit_lightning.files import save_figure, write_atomic
from vit_lightning.keys import InputError, Invocation, from_python
from vit_lightning.model.vit import ViT
from vit_lightning.provenance import provenance
from vit_lightning.schemas import BenchmarkRun
from vit_lightning.terminal import print_files, print_table, warn_instead

COMMAND = [sys.executable, "-m", "vit_lightning.train"]


def benchmark(config: BenchmarkRun, run_dir: Path, invocation: Invocation | None = None) -> float:
    """Measure everything, print the tables, and write ``benchmark.json`` and ``benchmark.png``.

    Returns:
        Training speed of this project as a multiple of the tutorial's.

    Raises:
        InputError: if the data or the machine does not fit the configuration.
    """
    if config.model.block != "prenorm" or config.trainer.precision != "32-true":
        raise InputError("the benchmark compares model.block=prenorm at trainer.precision=32-true; remove both")
    memory = peak_memory(config)  # measured while this process is small: a child's peak starts at its parent's
    quiet_lightning()
    check_accelerator(config.trainer)
    record = provenance(invocation or from_python())
    data = ImageData(config.data, config.model.image_size, config.seed)
    data.setup()
    config = follow_data(config, data)
    trainer = L.Trainer(accelerator=config.trainer.accelerator, devices=1, logger=False, enable_checkpointing=False)
    device = trainer.strategy.root_device
    flops, measured = training_flops(config.model), measure_in_turn(config, device, data.channels)
    training, matmul = measured["speeds"]["training"], measured["matmul_flops_per_second"]
    report = {
        **record,
        "device": str(device),
        **measured,
        "training_flops_per_image": flops,
        "share_of_matmul_rate": flops * training[OURS]["median"] / matmul["median"],
        "peak_memory_bytes": memory,
        "start_up_seconds": {name: spread(times) for name, times in start_up(config.benchmark.rounds).items()},
        "config": asdict(config),
    }
    write_atomic(run_dir / "benchmark.json", json.dumps(report, indent=2) + "\n")
    show(report)
    print_files([run_dir / "benchmark.json"])
    with warn_instead("the speeds"):
        save_figure(draw_benchmark(report), run_dir / "benchmark.png")
        print_files([run_dir / "benchmark.png"])
    return training[OURS]["median"] / training[TUTORIAL]["median"]


def measure_in_turn(config: BenchmarkRun, device: torch.device, channels: int) -> dict[str, Any]:
    """Measure each contestant once per round, and this project's growth and operators as well.

    Returns:
        ``speeds`` (by group and contestant), ``step_seconds`` (by axis), ``step_shares`` (by operator) and
        ``matmul_flops_per_second``, as in ``benchmark.json``.
    """
    entrants, grown = contestants(channels), sizes(config)
    plan: list[tuple[str, Any, str, Measurement, BenchmarkRun]] = [
        *((group, one.name, one.name, one.speeds[group], config) for group in GROUPS for one in entrants
          if group in one.speeds),
        *((axis, size, OURS, step_seconds, run) for axis, runs in grown.items() for size, run in runs.items()),
        ("matrix products", "", OURS, matmul_rate, config),
    ]  # fmt: skip
    values: dict[str, dict[Any, list[float]]] = defaultdict(lambda: defaultdict(list))
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # silences the profiler's log; processes inherit this
    with ExitStack() as stack:
        measure = {one.name: stack.enter_context(process_of(one, config, device)) for one in entrants}
        for number in range(1, config.benchmark.rounds + 1):
            print(f"round {number}/{config.benchmark.rounds}", flush=True)
            for group, key, name, measurement, run in plan:
                values[group][key].append(measure[name](measurement, run))
        shares = measure[OURS](operator_shares, config)
    spreads = {group: {key: spread(each) for key, each in keys.items()} for group, keys in values.items()}
    return {
        "speeds": {group: spreads[group] for group in GROUPS},
        "step_seconds": {axis: [{axis: size, **each} for size, each in spreads[axis].items()] for axis in grown},
        "step_shares": shares,
        "matmul_flops_per_second": spreads["matrix products"][""],
    }


def training_flops(model: ModelConfig) -> int:
    """Floating-point operations of a forward and backward pass for one image, from torch's counter."""
    assert model.channels is not None
    images = torch.zeros(2, model.channels, model.image_size, model.image_size)
    # The counter knows the cost of the plain kernel on every device; the fused kernel does the same mathematics.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        ViT(model)(images).sum().backward()
    return counter.get_total_flops() // len(images)


def peak_memory(config: BenchmarkRun) -> int:
    """The largest resident memory, in bytes, of a process that trains the same network on the same data."""
    sections = {"data.": asdict(config.data), "model.": asdict(config.model), "": {"imports": config.imports or None}}
    keys = [
        f"{prefix}{key}='{value}'" if isinstance(value, str) else f"{prefix}{key}={value}"
        for prefix, section in sections.items()
        for key, value in section.items()
        if value is not None and key != "options"
    ]
    limits = ["trainer.max_epochs=1", *(f"trainer.limit_{split}_batches=30" for split in ("train", "val", "test"))]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [*COMMAND, *keys, *limits, f"hydra.run.dir='{folder}/run'"], stdout=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise InputError("the train command failed on this configuration (see above)")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # Linux counts in KiB


def start_up(rounds: int) -> dict[str, list[float]]:
    """Run time in seconds of commands that do not train."""
    commands = {"--help": ["--help"], "--cfg job": ["--cfg", "job"], "a mistake": ["model.layers=0"]}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, arguments in commands.items():
            start = time.perf_counter()
            subprocess.run([*COMMAND, *arguments], capture_output=True)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values: list[float]) -> dict[str, Any]:
    """The median, minimum and maximum of some measurements, and all of them."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": values}


def show(report: dict[str, Any]) -> None:
    """Print the tables."""
    for group, speeds in report["speeds"].items():
        rows: list[tuple[str, ...]] = []
        for name, speed in sorted(speeds.items(), key=lambda item: -item[1]["median"]):
            ratio = f"{speeds[OURS]['median'] / speed['median']:.2f} ×"
            rows.append((name, f"{speed['median']:,.0f}", f"{speed['min']:,.0f} – {speed['max']:,.0f}", ratio))
        print_table(group, ("", "images/s", "range", f"speed-up of {OURS}"), rows)
    rows = []
    for axis, points in report["step_seconds"].items():
        for point in points:
            milliseconds = 1000 * point["median"]
            per_image = 1000 * milliseconds / point.get("batch", report["config"]["data"]["batch_size"])
            rows.append((axis, str(point[axis]), f"{milliseconds:,.1f}", f"{per_image:,.0f}"))
        rows.append(())
    print_table("cost of a training step", ("", "value", "ms", "µs per image"), rows)
    shares = [(name, f"{share:.1%}") for name, share in report["step_shares"].items()]
    print_table("time of a training step by operator", ("operator", "share"), shares)
    flops, rate = report["training_flops_per_image"], report["matmul_flops_per_second"]["median"]
    print(
        f"{flops / 1e9:.3f} GFLOP per training image; training reaches {report['share_of_matmul_rate']:.0%} of the "
        f"{rate / 1e9:,.0f} GFLOP/s of matrix products"
    )
    print(f"peak memory of the train command: {report['peak_memory_bytes'] / 1e9:.2f} GB")
    for name, seconds in report["start_up_seconds"].items():
        print(f"time of {name}: {seconds['median']:.2f} s")


def draw_benchmark(report: Mapping[str, Any]) -> Figure:
    """Draw speeds as bars, the median with minimum and maximum, and the cost of a step against each size.

    Args:
        report: ``speeds`` (group to contestant to ``median``, ``min``, ``max`` in images/s; ours is first) and
            ``step_seconds`` (axis to points with the axis's value and ``median`` in seconds), as in ``benchmark.json``.
    """
    figure = TitledFigure(12, 7.6, "Speed by implementation, time per step by size", dpi=110)
    groups, axes_of_growth = report["speeds"], report["step_seconds"]
    rows = GridSpec(2, 1, height_ratios=[3, 2], figure=figure)
    above, below = figure.add_subfigure(rows[0]), figure.add_subfigure(rows[1])
    for axes, (group, entrants) in zip(above.subplots(1, len(groups)), groups.items(), strict=True):
        low, median, high = np.array(
            [[speed[key] for key in ("min", "median", "max")] for speed in entrants.values()]
        ).T
        names = [name.replace(", ", ",\n") for name in entrants]
        colors = [VAL, *[TRAIN] * (len(names) - 1)]
        bars = axes.barh(names, median, xerr=[median - low, high - median], color=colors, capsize=3)
        axes.bar_label(bars, [f"{speed:,.0f}" for speed in median], padding=6)
        axes.invert_yaxis()
        axes.margins(x=0.35)
        axes.locator_params(axis="x", nbins=4)
        axes.set(title=group, xlabel="images/s")
    for axes, (axis, points) in zip(below.subplots(1, len(axes_of_growth)), axes_of_growth.items(), strict=True):
        axes.plot([point[axis] for point in points], [1000 * point["median"] for point in points], "o-", color=VAL)
        axes.margins(0.1)  # room for the last marker
        axes.set(xlabel=axis, ylabel="ms per training step", xlim=(0, None), ylim=(0, None))
        axes.get_xaxis().get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    return figure
