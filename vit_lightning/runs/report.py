"""What a run prints at its start and end, and its record."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import lightning as L
from lightning.pytorch.utilities.model_summary import ModelSummary
from torch import Tensor

from vit_lightning.config import Config
from vit_lightning.data.module import ImageData
from vit_lightning.files import RunFiles
from vit_lightning.provenance import hardware
from vit_lightning.recipe.classifier import ViTClassifier
from vit_lightning.recipe.metrics import mode_of
from vit_lightning.runs.callbacks import EpochRecorder, metrics_of
from vit_lightning.terminal import format_metric, label_of, print_table, relative

UNEQUAL = 3  # ratio of the largest class to the smallest from which a run mentions it


def summarise(
    config: Config, recorder: EpochRecorder, trainer: L.Trainer, classifier: ViTClassifier, test: Mapping[str, float]
) -> dict[str, Any]:
    """The content of ``summary.json``.

    The metrics are those of the best checkpoint; its training metrics were measured during its epoch, with dropout and
    augmentation.
    """
    best = recorder.best
    return {
        **recorder.starts[0],
        "resumed": recorder.starts[1:],
        "device": str(trainer.strategy.root_device),
        "processes": trainer.world_size,
        "step": describe_step(config, trainer.world_size),
        "seed": config.seed,
        "parameters": sum(p.numel() for p in classifier.net.parameters()),
        "images": recorder.images,
        "epochs": len(recorder.rows),
        "best_epoch": best["epoch"],
        "mode": mode_of(config.monitor),
        "samples_seen": recorder.samples_seen,
        "seconds": recorder.rows[-1]["seconds"],
        "seconds_to_val_acc": seconds_to_marks(recorder.rows),
        "train/images_per_second": recorder.images_per_second,
        "metrics": {**metrics_of(best), **test},
        "config": asdict(config),
    }


def describe_step(config: Config, processes: int) -> str:
    """Describe how the images of a step are shared among processes."""
    batch = config.data.batch_size
    if processes == 1:
        return f"one process, {batch} images per step"
    return (
        f"{processes} processes, {batch // processes} of the {batch} images per step in each; gradients are averaged, "
        "so learning rates do not depend on the number of processes"
    )


def describe_training(config: Config) -> str:
    """The label of the training curves: with some settings, their loss is not that of the unmodified images."""
    reasons = {
        "mixed images": config.augment.mixup or config.augment.cutmix,
        "smoothed labels": config.optim.label_smoothing,
        config.optim.loss: config.optim.loss != "cross_entropy",
        "weighted classes": config.optim.class_weights != "none",
        "balanced classes": config.data.sampler == "balanced",
    }
    return f"training ({', '.join(name for name, holds in reasons.items() if holds) or 'augmented'})"


def seconds_to_marks(rows: list[dict[str, float]]) -> dict[str, float]:
    """Seconds of training, including validation, until ``val/acc`` first reached 5%, 10%, and so on."""
    best = max(row.get("val/acc", 0.0) for row in rows)
    marks = [mark for mark in range(5, 101, 5) if mark <= 100 * best]
    return {f"{mark}%": next(row["seconds"] for row in rows if 100 * row.get("val/acc", 0.0) >= mark) for mark in marks}


def unequal(counts: Tensor) -> bool:
    """Whether the largest class has at least three times as many training images as the smallest."""
    return bool(counts.max() >= UNEQUAL * counts.min())


def show_start(config: Config, data: ImageData, classifier: ViTClassifier, trainer: L.Trainer) -> str:
    """Print the data, the device and the layers of the network.

    Returns:
        The network's layers in detail.
    """
    counts = ", ".join(
        f"{len(data.indices[split]):,} {name}"
        for split, name in (("train", "training"), ("val", "validation"), ("test", "test"))
    )
    machine, device = hardware(), trainer.strategy.root_device
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    name = {"cpu": f"{machine['cpu']}, {threads}", "cuda": machine["gpu"]}.get(device.type, device)
    print(f"{config.data.source}: {counts} images of {len(data.class_names)} classes\ndevice: {name}")
    if trainer.world_size > 1:
        print(describe_step(config, trainer.world_size))
    images = data.class_counts()
    if unequal(images) and config.optim.class_weights == "none" and config.data.sampler == "shuffle":
        few, many = (f"{data.class_names[place]} {images[place]:,}" for place in (images.argmin(), images.argmax()))
        print(f"imbalanced classes ({few}, {many} images): try optim.class_weights=balanced or data.sampler=balanced")

    model = ModelSummary(classifier, max_depth=3)
    sizes = dict(zip(model.layer_names, model.out_sizes, strict=True))
    rows: list[tuple[str, ...]] = []  # single parameters first, then layers
    for name, parameter in classifier.net.named_parameters(recurse=False):
        rows.append((name, " × ".join(map(str, parameter.shape[1:])), f"{parameter.numel():,}"))
    for name, parameters in zip(model.layer_names, model.param_nums, strict=True):
        if name.count(".") == 1 and name.startswith("net."):
            size = sizes[f"{name}.0" if name == "net.blocks" else name]  # a list has no output of its own
            rows.append((name.removeprefix("net."), " × ".join(map(str, size[1:])), f"{parameters:,}"))
    rows += [(), ("total", "", f"{model.total_parameters:,}")]
    title = f"ViT, {model.total_flops / 1e6:,.1f} MFLOP per image"
    print_table(title, ("layer", "output for one image", "parameters"), rows, left=2)
    return str(model)


def show_results(summary: dict[str, Any], files: RunFiles) -> None:
    """Print the final metrics, the paths of the run's files, and how to open its dashboard."""
    metrics, monitor, rows = summary["metrics"], summary["config"]["monitor"], []
    names = [name.removeprefix("train/") for name in metrics if name.startswith("train/")]
    for split, name in (("train", "training"), ("val", "validation"), ("test", "test")):
        if f"{split}/acc" in metrics:  # test=false leaves out the test metrics
            values = (format_metric(key, metrics[f"{split}/{key}"]) for key in names)
            rows.append((name, f"{summary['images'][split]:,}", *values))
    by = "" if monitor == "val/acc" else f" by {monitor}"
    title = f"best of {summary['epochs']} epochs{by}: epoch {summary['best_epoch']}"
    print_table(title, ("", "images", *map(label_of, names)), rows)
    print(
        f"{summary['parameters']:,} parameters, {summary['samples_seen']:,} training images seen "
        f"in {summary['seconds']:.0f} s ({summary['train/images_per_second']:,.0f} images/s)"
    )
    paths = {"checkpoint": files.best, "curves": files.curves, "patches": files.patches, "record": files.summary}
    for name, path in paths.items():
        print(f"{name:<12}{relative(path)}")
    print(f"{'dashboard':<12}tensorboard --logdir {relative(files.folder.parent)}")
