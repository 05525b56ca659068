"""What a contestant of the benchmark measures, in a process of its own, with memory and settings of its own."""

import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from itertools import cycle, repeat
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from vit_lightning.benchmarks.baselines import TutorialImages, TutorialViT, library, tutorial_loader
from vit_lightning.data.module import ImageData
from vit_lightning.devices import compile_network, now, quiet_lightning, tune_malloc
from vit_lightning.model.vit import ViT
from vit_lightning.recipe.augment import train_transform
from vit_lightning.recipe.classifier import ViTClassifier
from vit_lightning.schemas import BenchmarkConfig, BenchmarkRun

OURS, TUTORIAL, PIL = "vit_lightning", "the tutorial's script", "PIL and torchvision, one worker"

Batches = Iterator[tuple[Tensor, Tensor]]
Step = Callable[[Tensor, Tensor], object]
Measure = Callable[[], float]  # measures once

MEASURES: dict[str, Measure] = {}  # of this process


def prepare(name: str, config: BenchmarkRun, device: torch.device) -> list[str]:
    """Make this process a contestant.

    Args:
        name: ``OURS``, ``TUTORIAL``, ``PIL`` or one of :func:`vit_lightning.benchmarks.baselines.installed`.
        config: the classes and channels of its model are set.
        device: where all run.

    Returns:
        What :func:`measure` can then measure.
    """
    L.seed_everything(config.seed, verbose=False)
    if name == OURS:
        quiet_lightning()
        tune_malloc()
    data = ImageData(config.data, config.model.image_size, config.seed)
    data.setup()
    if name == OURS:
        MEASURES["training"] = lambda: trainer_speed(config, data)
        MEASURES["input pipeline"] = speed(lambda *_: None, our_batches(config, data, device), longer(config.benchmark))
        MEASURES["inference"] = inference(ViT(config.model), config, data, device)
        MEASURES["matrix products"] = lambda: matmul_rate(device)
        for axis, runs in sizes(config).items():
            for value, run in runs.items():
                MEASURES[f"{axis}={value}"] = step_seconds(run, data, device)
    elif name == TUTORIAL:
        # The tutorial has four loader workers, on any number of cores.
        warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes")
        step = plain_step(TutorialViT(config.model).to(device))
        MEASURES["training"] = lambda: loader_speed(step, config, data, device)
        MEASURES["inference"] = inference(TutorialViT(config.model), config, data, device)
    elif name == PIL:
        more = replace(config, benchmark=longer(config.benchmark))
        MEASURES["input pipeline"] = lambda: loader_speed(lambda *_: None, more, data, device, workers=1)
    else:  # batches are transformed already, and the loop is a plain one, without Lightning and metrics
        step = plain_step(library(name, config.model).to(device))
        MEASURES["training"] = speed(step, ready_batches(config, data, device), config.benchmark)
        MEASURES["inference"] = inference(library(name, config.model), config, data, device)
    return list(MEASURES)


def measure(what: str) -> float:
    """Images a second; of a size (``layers=8``) the seconds of a step, of matrix products the operations a second."""
    return MEASURES[what]()


def sizes(config: BenchmarkRun) -> dict[str, dict[int, BenchmarkRun]]:
    """Runs in which one size grows: ``tokens``, ``embed_dim`` (``mlp_dim`` with it), ``layers`` or ``batch``."""
    model, batch = config.model, config.data.batch_size
    sides = [model.image_size // model.patch_size * n // 3 for n in (1, 2, 3, 4)]  # patches along an image's side
    layers = [model.layers * n // 2 for n in (1, 2, 3, 4)]
    networks = {
        "tokens": {n * n + 1: replace(model, image_size=n * model.patch_size) for n in sides if n},
        "embed_dim": {
            model.embed_dim * n: replace(model, embed_dim=model.embed_dim * n, mlp_dim=model.mlp_dim * n)
            for n in (1, 2, 3, 4)
        },
        "layers": {n: replace(model, layers=n) for n in layers if n},
    }
    runs = {
        axis: {value: replace(config, model=network) for value, network in grown.items()}
        for axis, grown in networks.items()
    }
    batches = [batch * n // 4 for n in (1, 2, 4, 8) if batch * n >= 4]
    return {**runs, "batch": {n: replace(config, data=replace(config.data, batch_size=n)) for n in batches}}


def trainer_speed(config: BenchmarkRun, data: ImageData) -> float:
    """Images a second of ``Trainer.fit``, as in the train command: metrics, logger, schedule and all."""
    timing = config.benchmark
    classifier = ViTClassifier(
        asdict(config.model),
        asdict(config.optim),
        data.class_names,
        data.mean.tolist(),
        data.std.tolist(),
        augment=asdict(config.augment),
        seed=config.seed,
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
            accelerator=config.trainer.accelerator,
            deterministic=config.trainer.deterministic,
            devices=1,
            logger=TensorBoardLogger(folder, name="", version=""),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_steps=timing.warmup + timing.steps,
            limit_val_batches=0,
            callbacks=[clock],
        )
        if config.compile:
            compile_network(classifier.net, trainer.strategy.root_device)
        trainer.fit(classifier, data)
    return timing.steps * config.data.batch_size / clock.seconds


def loader_speed(
    step: Step, config: BenchmarkRun, data: ImageData, device: torch.device, **loader_options: int
) -> float:
    """Images a second of a step fed by the tutorial's loader, whose workers stop when it is measured."""
    assert data.arrays is not None
    dataset = TutorialImages(
        data.arrays.images["train"],
        data.arrays.labels["train"],
        config.model.image_size,
        data.mean.tolist(),
        data.std.tolist(),
    )
    loader = tutorial_loader(dataset, config.data.batch_size, **loader_options)
    batches = ((images.to(device), labels.to(device)) for _ in repeat(None) for images, labels in loader)
    return speed(step, batches, config.benchmark)()


def inference(net: nn.Module, config: BenchmarkRun, data: ImageData, device: torch.device) -> Measure:
    """Images a second of the forward pass in evaluation, on transformed batches of ``data.eval_batch_size``."""
    net = net.to(device).eval()
    batches = ready_batches(
        replace(config, data=replace(config.data, batch_size=config.data.eval_batch_size)), data, device
    )
    short = replace(config.benchmark, steps=max(1, config.benchmark.steps // 8), warmup=1)
    return speed(torch.inference_mode()(lambda images, labels: net(images)), batches, short)


def step_seconds(config: BenchmarkRun, data: ImageData, device: torch.device) -> Measure:
    """Seconds of a training step of this project's network, without Lightning and metrics."""
    short = replace(config.benchmark, steps=max(2, config.benchmark.steps // 4), warmup=1)
    step = plain_step(ViT(config.model).to(device), fused=True)
    images_per_second = speed(step, ready_batches(config, data, device), short)
    return lambda: config.data.batch_size / images_per_second()


def operator_shares(config: BenchmarkRun, device: torch.device) -> dict[str, float]:
    """:func:`shares` of torch's operators in a training step, that of :func:`step_seconds` at the configured size."""
    data = ImageData(config.data, config.model.image_size, config.seed)
    data.setup()
    step, batches = plain_step(ViT(config.model).to(device), fused=True), ready_batches(config, data, device)
    for _ in range(config.benchmark.warmup):
        step(*next(batches))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        for _ in range(config.benchmark.steps):
            step(*next(batches))
    return shares(profiler.key_averages(), "device" if device.type == "cuda" else "cpu")


def shares(events: Iterable[Any], clock: str) -> dict[str, float]:
    """Share of each operator in the time of all, the greatest first, and below 1 % together as ``rest``.

    Args:
        events: the profiler's averages.
        clock: ``cpu`` or ``device``: whose time is counted.
    """
    # A GPU's kernels are rows too, besides the operators that started them, which have their time already.
    operators = [event for event in events if event.device_type == DeviceType.CPU]
    times = {event.key: getattr(event, f"self_{clock}_time_total") for event in operators}
    total = sum(times.values())
    ordered = {name: time / total for name, time in sorted(times.items(), key=lambda item: -item[1])}
    large = {name: share for name, share in ordered.items() if share >= 0.01}
    return {**large, "rest": 1 - sum(large.values())}


def longer(timing: BenchmarkConfig) -> BenchmarkConfig:
    """For steps without a network, so short that any pause of the machine would drown them."""
    return replace(timing, steps=20 * timing.steps)


def speed(step: Step, batches: Batches, timing: BenchmarkConfig) -> Measure:
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


def matmul_rate(device: torch.device) -> float:
    """Operations a second of square float32 matrix products: what the machine could do at best."""
    side, repeats = 2048, 5
    a, b = torch.randn(2, side, side, device=device)
    a @ b
    start = now()
    for _ in range(repeats):
        a @ b
    return repeats * 2 * side**3 / (now() - start)


def plain_step(net: nn.Module, fused: bool = False) -> Step:
    """A training step as scripts have it: AdamW, cross-entropy, the loss read after every step."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-4, fused=fused or None)
    net.train()

    def step(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        out = net(images)
        loss = F.cross_entropy(getattr(out, "logits", out), labels)
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def our_batches(config: BenchmarkRun, data: ImageData, device: torch.device) -> Batches:
    """Training batches as the Trainer gets them, without end."""
    loader = data.train_dataloader()
    mean, std = data.mean.to(device), data.std.to(device)
    while True:
        for images, labels in loader:
            x = train_transform(images.to(device), config.model.image_size, mean, std, config.augment)
            yield x, labels.to(device)


def ready_batches(config: BenchmarkRun, data: ImageData, device: torch.device) -> Batches:
    """Four batches of real images on the device, transformed, over and over."""
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
