"""Measure this project beside the tutorial's script and other libraries: ``python -m vit_lightning.benchmark``.

Contestants take turns, round by round in one process, so that a slow machine slows all alike; what is compared comes
from one run.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_lightning.cli import run_command
from vit_lightning.config import BenchmarkConfig, BenchmarkRun, InputError, ModelConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from vit_lightning.data import ImageData

OURS, TUTORIAL = "vit_lightning", "the tutorial's script"
TRAIN = [sys.executable, "-m", "vit_lightning.train"]
Measure = Callable[[], float]  # measures once; images a second


def benchmark(config: BenchmarkRun, run_dir: Path) -> float:
    """Measure everything, print the tables, and write ``benchmark.json`` and ``benchmark.png``.

    Returns:
        Training speed of this project as a multiple of the tutorial's.

    Raises:
        InputError: if the data or the machine does not fit the configuration.
    """
    if config.model.block != "prenorm" or config.trainer.precision != "32-true":
        raise InputError("the benchmark compares model.block=prenorm at trainer.precision=32-true; leave both out")
    memory = peak_memory(config)  # while this process is small: a child's peak begins at its parent's

    import lightning as L

    from vit_lightning.data import ImageData
    from vit_lightning.figures import draw_benchmark
    from vit_lightning.record import provenance
    from vit_lightning.train import check_accelerator, follow_data, quiet_lightning, spare_memory_work

    quiet_lightning()
    spare_memory_work()  # as in training; the others have it too
    check_accelerator(config.trainer)
    L.seed_everything(config.seed, verbose=False)
    record = provenance()
    data = ImageData(config.data, config.augment, config.model.image_size, config.seed)
    data.setup()
    config = follow_data(config, data)
    device = L.Trainer(**quiet_trainer(config), max_steps=1).strategy.root_device

    timing = config.benchmark
    groups: dict[str, dict[str, Measure]] = {
        "training": training(config, data, device),
        "input pipeline": input_pipeline(config, data, device),
        "inference": inference(config, data, device),
    }
    scaling = step_costs(config, data, device)
    speeds: dict[str, dict[str, list[float]]] = {
        group: {name: [] for name in measures} for group, measures in groups.items()
    }
    matmul: list[float] = []
    costs: dict[str, list[tuple[int, list[float]]]] = {
        axis: [(value, []) for value, _ in points] for axis, points in scaling.items()
    }
    for number in range(1, timing.rounds + 1):
        print(f"round {number}/{timing.rounds}", flush=True)
        for group, measures in groups.items():
            for name, measure in measures.items():
                speeds[group][name].append(measure())
        for axis, points in scaling.items():
            for (_, seconds), (_, cost) in zip(costs[axis], points, strict=True):
                seconds.append(cost())
        matmul.append(matmul_rate(device))

    flops = training_flops(config.model)
    used = flops * statistics.median(speeds["training"][OURS]) / statistics.median(matmul)
    report = {
        **record,
        "device": str(device),
        "speeds": {
            group: {name: spread(values) for name, values in contestants.items()}
            for group, contestants in speeds.items()
        },
        "step_seconds": {
            axis: [{axis: value, **spread(seconds)} for value, seconds in points] for axis, points in costs.items()
        },
        "training_flops_per_image": flops,
        "matmul_flops_per_second": spread(matmul),
        "share_of_matmul_rate": used,
        "peak_memory_bytes": memory,
        "start_up_seconds": {name: spread(times) for name, times in start_up(timing.rounds).items()},
        "config": asdict(config),
    }
    (run_dir / "benchmark.json").write_text(json.dumps(report, indent=2) + "\n")
    draw_benchmark(report, run_dir / "benchmark.png")
    show(report, run_dir)
    training_speeds = report["speeds"]["training"]
    return training_speeds[OURS]["median"] / training_speeds[TUTORIAL]["median"]


# --- what is measured ------------------------------------------------------------------------------------------------


def training(config: BenchmarkRun, data: "ImageData", device: "torch.device") -> dict[str, Measure]:
    """Training images a second: ours through the Trainer, the tutorial's with its loader, both from images in memory.

    The other libraries get batches that are transformed already, and a plain loop, without Lightning or metrics.
    """
    from vit_lightning.baselines import TutorialViT, libraries

    tutorial = plain_step(TutorialViT(config.model).to(device))
    measures = {
        OURS: lambda: trainer_speed(config, data),
        TUTORIAL: lambda: loader_speed(tutorial, config, data, device),
    }
    batches = ready_batches(config, data, device)
    for name, net in libraries(config.model).items():
        measures[name] = timed(plain_step(net.to(device)), batches, config.benchmark)
    return measures


def trainer_speed(config: BenchmarkRun, data: "ImageData") -> float:
    """Images a second of ``Trainer.fit``, as in the train command: metrics, logger, schedule and all."""
    import lightning as L
    import torch
    from lightning.pytorch.callbacks import LearningRateMonitor
    from lightning.pytorch.loggers import TensorBoardLogger

    from vit_lightning.classifier import ViTClassifier
    from vit_lightning.train import compile_network

    timing = config.benchmark
    classifier = ViTClassifier(
        asdict(config.model), asdict(config.optim), data.class_names, data.mean.tolist(), data.std.tolist()
    )

    class Clock(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
            if trainer.global_step == timing.warmup:
                self.start = now()
            elif trainer.global_step == timing.warmup + timing.steps:
                self.seconds = now() - self.start

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            **{**quiet_trainer(config), "logger": TensorBoardLogger(folder, name="", version="")},
            max_steps=timing.warmup + timing.steps,
            limit_val_batches=0,
            callbacks=[clock, LearningRateMonitor("step")],
        )
        if config.compile:
            compile_network(classifier.net, trainer.strategy.root_device)
        trainer.fit(classifier, data)
    torch.use_deterministic_algorithms(False)  # the Trainer's wish; the others get torch's defaults
    return timing.steps * config.data.batch_size / clock.seconds


def loader_speed(
    step: Callable[["Tensor", "Tensor"], None], config: BenchmarkRun, data: "ImageData", device: "torch.device"
) -> float:
    """Images a second of a step fed by the tutorial's loader, whose workers stop when the round is over."""
    batches = iter(tutorial_batches(config, data))
    return timed(step, ((images.to(device), labels.to(device)) for images, labels in batches), config.benchmark)()


def input_pipeline(config: BenchmarkRun, data: "ImageData", device: "torch.device") -> dict[str, Measure]:
    """Images a second that arrive on the device, transformed: this project's beside PIL's in one loader worker."""

    def keep(images: "Tensor", labels: "Tensor") -> None:
        pass

    def one_worker() -> float:
        return timed(keep, iter(tutorial_batches(config, data, workers=1)), config.benchmark)()

    return {
        OURS: lambda: timed(keep, our_batches(config, data, device), config.benchmark)(),
        "PIL and torchvision, one worker": one_worker,
    }


def inference(config: BenchmarkRun, data: "ImageData", device: "torch.device") -> dict[str, Measure]:
    """Images a second of the forward pass in evaluation, on transformed batches of ``data.eval_batch_size``."""
    import torch

    from vit_lightning.baselines import TutorialViT, libraries
    from vit_lightning.model import ViT

    batches = ready_batches(
        replace(config, data=replace(config.data, batch_size=config.data.eval_batch_size)), data, device
    )

    def predict(net: "nn.Module") -> Measure:
        net = net.to(device).eval()

        def step(images: "Tensor", labels: "Tensor") -> None:
            with torch.inference_mode():
                net(images)

        return timed(step, batches, replace(config.benchmark, steps=max(1, config.benchmark.steps // 8), warmup=1))

    nets = {OURS: ViT(config.model), TUTORIAL: TutorialViT(config.model), **libraries(config.model)}
    return {name: predict(net) for name, net in nets.items()}


def step_costs(config: BenchmarkRun, data: "ImageData", device: "torch.device") -> dict[str, list[tuple[int, Measure]]]:
    """Seconds of a training step of this project's network as one size grows and the others stay.

    Returns:
        ``tokens``, ``embed_dim`` (feed-forward width grows with it) and ``layers``: values and measures.
    """
    from vit_lightning.model import ViT

    model = config.model

    def cost(changed: ModelConfig) -> Measure:
        batches = ready_batches(replace(config, model=changed), data, device)
        short = replace(config.benchmark, steps=max(2, config.benchmark.steps // 4), warmup=1)
        speed = timed(plain_step(ViT(changed).to(device), fused=True), batches, short)
        return lambda: config.data.batch_size / speed()

    sides = [model.image_size // model.patch_size * n // 3 for n in (1, 2, 3, 4)]  # patches along an image's side
    return {
        "tokens": [(n * n + 1, cost(replace(model, image_size=n * model.patch_size))) for n in sides if n],
        "embed_dim": [
            (model.embed_dim * n, cost(replace(model, embed_dim=model.embed_dim * n, mlp_dim=model.mlp_dim * n)))
            for n in (1, 2, 3, 4)
        ],
        "layers": [
            (model.layers * n // 2, cost(replace(model, layers=model.layers * n // 2)))
            for n in (1, 2, 3, 4)
            if model.layers * n // 2
        ],
    }


def training_flops(model: ModelConfig) -> int:
    """Floating-point operations of a forward and backward pass for one image, by torch's counter."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from vit_lightning.model import ViT

    assert model.channels is not None
    images = torch.zeros(2, model.channels, model.image_size, model.image_size)
    # Of the plain kernel the counter knows the cost on every device; the fused one's mathematics is the same.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        ViT(model)(images).sum().backward()
    return counter.get_total_flops() // len(images)


def matmul_rate(device: "torch.device") -> float:
    """Operations a second of square float32 matrix products: what the machine could do at best."""
    import torch

    side, repeats = 2048, 5
    a, b = torch.randn(2, side, side, device=device)
    a @ b
    start = now()
    for _ in range(repeats):
        a @ b
    return repeats * 2 * side**3 / (now() - start)


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


# --- how it is measured ----------------------------------------------------------------------------------------------


def timed(step: Callable[["Tensor", "Tensor"], None], batches: Iterator[Any], timing: BenchmarkConfig) -> Measure:
    """Images a second of ``step(images, labels)``, after a warm-up."""

    def measure() -> float:
        for _ in range(timing.warmup):
            step(*next(batches))
        count = 0
        start = now()
        for _ in range(timing.steps):
            images, labels = next(batches)
            step(images, labels)
            count += len(labels)
        return count / (now() - start)

    return measure


def now() -> float:
    """A clock that waits for the work that an accelerator has queued."""
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def plain_step(net: "nn.Module", fused: bool = False) -> Callable[["Tensor", "Tensor"], None]:
    """A training step as scripts have it: AdamW, cross-entropy, the loss read after every step."""
    import torch
    import torch.nn.functional as F

    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-4, fused=fused or None)
    net.train()

    def step(images: "Tensor", labels: "Tensor") -> None:
        optimizer.zero_grad()
        out = net(images)
        loss = F.cross_entropy(getattr(out, "logits", out), labels)
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def our_batches(config: BenchmarkRun, data: "ImageData", device: "torch.device") -> Iterator[tuple["Tensor", "Tensor"]]:
    """Training batches as the Trainer gets them, without end."""
    from vit_lightning.augment import train_transform

    loader = data.train_dataloader()
    mean, std = data.mean.to(device), data.std.to(device)
    while True:
        for images, labels in loader:
            x = train_transform(images.to(device), config.model.image_size, mean, std, config.augment)
            yield x, labels.to(device)


def tutorial_batches(config: BenchmarkRun, data: "ImageData", **workers: int) -> Iterator[tuple["Tensor", "Tensor"]]:
    """The same from the tutorial's loader."""
    from vit_lightning.baselines import TutorialImages, tutorial_loader

    assert data.arrays is not None
    images, labels = data.arrays.images["train"], data.arrays.labels["train"]
    mean, std = data.mean.tolist(), data.std.tolist()
    loader = tutorial_loader(
        TutorialImages(images, labels, config.model.image_size, mean, std), config.data.batch_size, **workers
    )
    while True:
        yield from loader


def ready_batches(
    config: BenchmarkRun, data: "ImageData", device: "torch.device"
) -> Iterator[tuple["Tensor", "Tensor"]]:
    """Four batches of real images on the device, transformed, over and over."""
    from vit_lightning.augment import train_transform

    assert data.arrays is not None
    images, labels = data.arrays.images["train"], data.arrays.labels["train"]
    batches = []
    for start in range(4):
        pick = slice(start, None, max(4, len(images) // config.data.batch_size))
        x = train_transform(
            images[pick][: config.data.batch_size], config.model.image_size, data.mean, data.std, config.augment
        )
        batches.append((x.to(device), labels[pick][: config.data.batch_size].to(device)))
    return cycle(batches)


def quiet_trainer(config: BenchmarkRun) -> dict[str, Any]:
    """Arguments of a Trainer that measures: on the chosen accelerator, without files, bars and summaries."""
    return {
        "accelerator": config.trainer.accelerator,
        "deterministic": config.trainer.deterministic,
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }


# --- what is told ----------------------------------------------------------------------------------------------------


def spread(values: list[float]) -> dict[str, Any]:
    """Median, least, greatest and all of some measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": values}


def show(report: dict[str, Any], run_dir: Path) -> None:
    """Print the tables."""
    from rich.console import Console
    from rich.table import Table

    from vit_lightning.train import relative

    console = Console()
    for group, contestants in report["speeds"].items():
        table = Table(title=group, title_justify="left")
        for column in ("", "images/s", "least to greatest", "ours is faster by"):
            table.add_column(column, justify="right" if column else "left")
        ours = contestants[OURS]["median"]
        for name, speed in sorted(contestants.items(), key=lambda item: -item[1]["median"]):
            ratio = "" if name == OURS else f"{ours / speed['median']:.2f} ×"
            table.add_row(name, f"{speed['median']:,.0f}", f"{speed['min']:,.0f} – {speed['max']:,.0f}", ratio)
        console.print(table)
    table = Table(title="cost of a training step", title_justify="left")
    for column in ("", "value", "ms", "per image (µs)"):
        table.add_column(column, justify="right" if column else "left")
    for axis, points in report["step_seconds"].items():
        for point in points:
            milliseconds = 1000 * point["median"]
            per_image = 1000 * milliseconds / report["config"]["data"]["batch_size"]
            table.add_row(axis, str(point[axis]), f"{milliseconds:,.1f}", f"{per_image:,.0f}")
        table.add_section()
    console.print(table)
    flops, rate = report["training_flops_per_image"], report["matmul_flops_per_second"]["median"]
    console.print(
        f"{flops / 1e9:.3f} GFLOP a training image; matrix products run at {rate / 1e9:,.0f} GFLOP/s; "
        f"{report['share_of_matmul_rate']:.0%} of that is used"
    )
    console.print(f"peak memory of the train command {report['peak_memory_bytes'] / 1e9:.2f} GB")
    for name, seconds in report["start_up_seconds"].items():
        console.print(f"{name} takes {seconds['median']:.2f} s")
    for name in ("benchmark.json", "benchmark.png"):
        print(relative(run_dir / name))


def main() -> None:
    """Run the command."""
    run_command(benchmark, BenchmarkRun)


if __name__ == "__main__":
    main()
