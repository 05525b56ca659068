"""The implementations that are compared, and the measurements of each, in a process of its own."""

import multiprocessing
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle, repeat
from multiprocessing.connection import Connection
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from vit_lightning.benchmarks.baselines import TutorialImages, TutorialViT, installed, library
from vit_lightning.config import ModelConfig
from vit_lightning.data.module import ImageData
from vit_lightning.devices import compile_network, now, quiet_lightning, tune_malloc
from vit_lightning.keys import InputError
from vit_lightning.model.vit import ViT
from vit_lightning.recipe.augment import train_transform
from vit_lightning.recipe.classifier import ViTClassifier
from vit_lightning.schemas import BenchmarkRun

OURS, TUTORIAL, PIL = "vit_lightning", "the tutorial's script", "PIL and torchvision, one worker"
GROUPS = ("training", "input pipeline", "inference")

Batches = Iterator[tuple[Tensor, Tensor]]
Step = Callable[[Tensor, Tensor], object]
Network = Callable[[ModelConfig], nn.Module]
Measurement = Callable[[BenchmarkRun, ImageData, torch.device], Any]
Source = Callable[[BenchmarkRun, ImageData, torch.device], Batches]


@dataclass(frozen=True)
class Contestant:
    """An implementation to measure.

    Attributes:
        name: its name in tables and figures.
        speeds: for some of ``GROUPS``, a function that returns images per second; sent to the process by module path.
        tuned: whether its process has the memory settings of the train command.
    """

    name: str
    speeds: dict[str, Measurement]
    tuned: bool = False


def contestants(channels: int) -> list[Contestant]:
    """List this project, the tutorial's script, and the installed libraries that support this number of channels."""

    def speeds(network: Network, training: Measurement) -> dict[str, Measurement]:
        return {"training": training, "inference": partial(inference_speed, network)}

    networks = {name: partial(library, name) for name in installed(channels)}
    ours: dict[str, Measurement] = {**speeds(ViT, trainer_speed), "input pipeline": partial(input_speed, our_batches)}
    return [
        Contestant(OURS, ours, tuned=True),
        Contestant(TUTORIAL, speeds(TutorialViT, partial(step_speed, TutorialViT, tutorial_batches))),
        Contestant(PIL, {"input pipeline": partial(input_speed, partial(tutorial_batches, workers=1))}),
        *(Contestant(name, speeds(net, partial(step_speed, net, ready_batches))) for name, net in networks.items()),
    ]


@contextmanager
def process_of(
    contestant: Contestant, config: BenchmarkRun, device: torch.device
) -> Iterator[Callable[[Measurement, BenchmarkRun], Any]]:
    """Start a contestant's process, and yield a function that measures in it.

    Raises:
        InputError: if the process fails; it has then printed the error.
    """
    context = multiprocessing.get_context("spawn")
    connection, other_end = context.Pipe()
    process = context.Process(target=serve, args=(other_end, contestant, config, device))
    process.start()
    other_end.close()  # the process has its own copy: if it dies, recv raises EOFError

    def measure(measurement: Measurement, config: BenchmarkRun) -> Any:
        try:
            connection.send((measurement, config))
            return connection.recv()
        except (EOFError, OSError) as error:
            raise InputError(f"{contestant.name} cannot be measured (see above)") from error

    try:
        yield measure
    finally:
        process.terminate()
        process.join()


def serve(connection: Connection, contestant: Contestant, config: BenchmarkRun, device: torch.device) -> None:
    """Carry out the measurements requested over a connection, on data that is set up once."""
    quiet_lightning()
    # The tutorial has four loader workers, whatever the number of cores.
    warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes")
    if contestant.tuned:
        tune_malloc()
    L.seed_everything(config.seed, verbose=False)
    data = ImageData(config.data, config.model.image_size, config.seed)
    data.setup()
    while True:
        measurement, config = connection.recv()
        connection.send(measurement(config, data, device))


def sizes(config: BenchmarkRun) -> dict[str, dict[int, BenchmarkRun]]:
    """Runs in which one size grows: ``tokens``, ``embed_dim`` (``mlp_dim`` with it), ``layers`` or ``batch``."""
    model, batch, factors = config.model, config.data.batch_size, (1, 2, 3, 4)
    sides = [model.image_size // model.patch_size * n // 3 for n in factors]  # patches along an image's side
    widths = [(model.embed_dim * n, model.mlp_dim * n) for n in factors]
    layers = [model.layers * n // 2 for n in factors]
    networks = {
        "tokens": {n * n + 1: replace(model, image_size=n * model.patch_size) for n in sides if n},
        "embed_dim": {width: replace(model, embed_dim=width, mlp_dim=hidden) for width, hidden in widths},
        "layers": {n: replace(model, layers=n) for n in layers if n},
    }
    batches = [batch * n // 4 for n in (1, 2, 4, 8) if batch * n >= 4]
    return {
        **{axis: {n: replace(config, model=net) for n, net in grown.items()} for axis, grown in networks.items()},
        "batch": {n: replace(config, data=replace(config.data, batch_size=n)) for n in batches},
    }


def trainer_speed(config: BenchmarkRun, data: ImageData, device: torch.device) -> float:
    """Images per second of ``Trainer.fit``, as in the train command: with metrics, logger and schedule."""
    sections = asdict(config)
    mean, std = data.mean.tolist(), data.std.tolist()
    classifier = ViTClassifier(
        sections["model"], sections["optim"], data.class_names, mean, std, augment=sections["augment"], seed=config.seed
    )
    first, last = config.benchmark.warmup, config.benchmark.warmup + config.benchmark.steps
    times: list[float] = []

    def read_clock(trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step in (first, last):
            times.append(now())

    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator=config.trainer.accelerator,
            deterministic=config.trainer.deterministic,
            devices=1,
            logger=TensorBoardLogger(folder, name="", version=""),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_steps=last,
            limit_val_batches=0,
            callbacks=[LambdaCallback(on_train_batch_end=read_clock)],
        )
        if config.compile:
            compile_network(classifier.net, device)
        trainer.fit(classifier, data)
    return config.benchmark.steps * config.data.batch_size / (times[1] - times[0])


def step_speed(
    network: Network, source: Source, config: BenchmarkRun, data: ImageData, device: torch.device, fused: bool = False
) -> float:
    """Images per second of a plain training loop, without Lightning and metrics."""
    return speed(plain_step(network(config.model).to(device), fused), source(config, data, device), config)


def input_speed(source: Source, config: BenchmarkRun, data: ImageData, device: torch.device) -> float:
    """Images per second of an input pipeline alone, over more steps, because they are short."""
    return speed(lambda *_: None, source(config, data, device), with_steps(config, 20))


def inference_speed(network: Network, config: BenchmarkRun, data: ImageData, device: torch.device) -> float:
    """Images per second of the forward pass in evaluation, on transformed batches of ``data.eval_batch_size``."""
    net = network(config.model).to(device).eval()
    config = replace(with_steps(config, 1 / 8), data=replace(config.data, batch_size=config.data.eval_batch_size))
    step = torch.inference_mode()(lambda images, labels: net(images))
    return speed(step, ready_batches(config, data, device), config)


def step_seconds(config: BenchmarkRun, data: ImageData, device: torch.device) -> float:
    """Seconds per training step of this project's network, without Lightning and metrics."""
    run = with_steps(config, 1 / 4)
    return config.data.batch_size / step_speed(ViT, ready_batches, run, data, device, fused=True)


def matmul_rate(config: BenchmarkRun, data: ImageData, device: torch.device) -> float:
    """Operations per second of square float32 matrix products: the practical limit of the machine."""
    side = 2048
    matrices = torch.randn(2, side, side, device=device)
    rows = speed(torch.matmul, repeat((matrices[0], matrices[1])), with_steps(config, 1 / 4))  # matrix rows per second
    return rows * 2 * side**2


def operator_shares(config: BenchmarkRun, data: ImageData, device: torch.device) -> dict[str, float]:
    """:func:`shares` of torch's operators in the training step of :func:`step_seconds`."""
    step, batches = plain_step(ViT(config.model).to(device), fused=True), ready_batches(config, data, device)
    speed(step, batches, config)  # the first steps are not profiled
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        speed(step, batches, config)
    return shares(profiler.key_averages(), "device" if device.type == "cuda" else "cpu")


def shares(events: Iterable[Any], clock: str) -> dict[str, float]:
    """Share of each operator in the total time, in decreasing order; those below 1% are summed as ``rest``.

    Args:
        events: the profiler's averages.
        clock: whose time is counted, ``cpu`` or ``device``.
    """
    # A GPU's kernels are rows too, but the operators that launched them already include their time.
    operators = [event for event in events if event.device_type == DeviceType.CPU]
    times = {event.key: getattr(event, f"self_{clock}_time_total") for event in operators}
    total = sum(times.values())
    ordered = {name: time / total for name, time in sorted(times.items(), key=lambda item: -item[1])}
    large = {name: share for name, share in ordered.items() if share >= 0.01}
    return {**large, "rest": 1 - sum(large.values())}


def with_steps(config: BenchmarkRun, factor: float) -> BenchmarkRun:
    """Multiply the number of timed steps; fewer steps need at most one warm-up step."""
    timing = config.benchmark
    steps, warmup = max(1, int(timing.steps * factor)), timing.warmup if factor > 1 else 1
    return replace(config, benchmark=replace(timing, steps=steps, warmup=warmup))


def speed(step: Step, batches: Batches, config: BenchmarkRun) -> float:
    """Images per second of ``step(images, labels)``, after a warm-up."""
    for _ in range(config.benchmark.warmup):
        step(*next(batches))
    count = 0
    start = now()
    for _ in range(config.benchmark.steps):
        images, labels = next(batches)
        step(images, labels)
        count += len(labels)
    return count / (now() - start)


def plain_step(net: nn.Module, fused: bool = False) -> Step:
    """A training step as in a typical script: AdamW, cross-entropy, the loss read after every step."""
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
    """Endless training batches, as the Trainer gets them."""
    loader, mean, std = data.train_dataloader(), data.mean.to(device), data.std.to(device)
    while True:
        for images, labels in loader:
            x = train_transform(images.to(device), config.model.image_size, mean, std, config.augment)
            yield x, labels.to(device)


def tutorial_batches(config: BenchmarkRun, data: ImageData, device: torch.device, workers: int = 4) -> Batches:
    """Endless batches of the tutorial's loader, whose workers stop when the iterator is deleted."""
    assert data.arrays is not None
    images, labels = data.arrays.images["train"], data.arrays.labels["train"]
    dataset = TutorialImages(images, labels, config.model.image_size, data.mean.tolist(), data.std.tolist())
    loader = DataLoader(dataset, config.data.batch_size, shuffle=True, drop_last=True, num_workers=workers)
    return ((images.to(device), labels.to(device)) for _ in repeat(None) for images, labels in loader)


def ready_batches(config: BenchmarkRun, data: ImageData, device: torch.device) -> Batches:
    """Four transformed batches of real images on the device, repeated endlessly."""
    assert data.arrays is not None
    size, batch_size = config.model.image_size, config.data.batch_size
    images, labels = data.arrays.images["train"], data.arrays.labels["train"]
    batches = []
    for start in range(4):
        pick = torch.arange(start, len(images), max(4, len(images) // batch_size))[:batch_size]
        x = train_transform(images[pick], size, data.mean, data.std, config.augment)
        batches.append((x.to(device), labels[pick].to(device)))
    return cycle(batches)
