"""Train a Vision Transformer, test its best checkpoint, and leave a record: ``python -m vit_lightning.train``.

``--help`` lists the groups and keys. torch and its kin are imported only once the configuration has been checked, so
that a mistake in it is reported at once.
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.model_summary import ModelSummary
from matplotlib.figure import Figure

from vit_lightning.analysis.figures import draw_patches
from vit_lightning.config import Config, TrainerConfig
from vit_lightning.data.module import ImageData, follow_data
from vit_lightning.devices import (
    check_accelerator,
    compile_network,
    quiet_lightning,
    settle_precision,
    spare_memory_work,
)
from vit_lightning.files import SealedCheckpoints, read_checkpoint, unwritable, write_whole
from vit_lightning.keys import InputError, Invocation, MachineError, from_python
from vit_lightning.provenance import hardware, provenance
from vit_lightning.recipe.augment import denormalise, eval_transform
from vit_lightning.recipe.classifier import ViTClassifier
from vit_lightning.recipe.optim import ema_update
from vit_lightning.recipe.weights import load_classifier, start_from
from vit_lightning.runs.callbacks import EpochRecorder, Report, StopAtNaN, StopAtTarget, WeightAverage, metrics_of
from vit_lightning.runs.checkpoints import Saver, newest_sound
from vit_lightning.runs.dashboard import Dashboard, hyper_parameters
from vit_lightning.runs.processes import agree_on, placement
from vit_lightning.runs.run import Run, hold
from vit_lightning.terminal import is_first, print_table, relative


def train(
    config: Config,
    run_dir: Path,
    report: Callable[[int, float], None] | None = None,
    invocation: Invocation | None = None,
) -> float:
    """Train, test the best checkpoint, and write everything a run leaves into ``run_dir``.

    Args:
        config: of the run.
        run_dir: where nothing lies yet, or this very run, which then goes on where it stopped.
        report: is called after every validation with the epoch, from 1, and ``val/acc``; what it raises ends the run.
        invocation: the command that asked for the run; ``None`` if called from Python.

    Returns:
        The best ``val/acc``, in [0, 1], for a sweeper to maximise.

    Raises:
        InputError: if the data or the machine does not fit the configuration.
    """
    quiet_lightning()
    spare_memory_work()

    invocation = invocation or from_python()
    config = replace(config, trainer=settle_precision(config.trainer))
    with hold(config, agree_on(run_dir), invocation) as run:
        if run.result is not None:
            if is_first():
                print(f"{relative(run.folder)} holds this run, which came to its end: val/acc {run.result:.1%}")
            return run.result
        if run.checkpoint is not None and is_first():
            print(f"{relative(run.folder)} holds this run, which was interrupted; it goes on")
        check_accelerator(run.config.trainer)
        record = {**provenance(invocation), "overrides": invocation.overrides or []}
        L.seed_everything(run.config.seed, workers=True, verbose=False)
        data = ImageData(run.config.data, run.config.model.image_size, run.config.seed)
        data.setup()
        run.config = follow_data(run.config, data)
        check_limits(run.config.trainer, data)
        classifier = ViTClassifier(
            model=asdict(run.config.model),
            optim=asdict(run.config.optim),
            class_names=data.class_names,
            mean=data.mean.tolist(),
            std=data.std.tolist(),
            data=asdict(run.config.data),
            augment=asdict(run.config.augment),
            seed=run.config.seed,
        )
        if run.checkpoint is not None:
            check_same_data(classifier, run.checkpoint)
        elif run.config.checkpoint is not None:
            start_from(classifier, run.config.checkpoint)
        with in_one_line(run.folder):
            return carry_out(run, data, classifier, record, report)


def carry_out(
    run: Run,
    data: ImageData,
    classifier: ViTClassifier,
    record: dict[str, Any],
    report: Callable[[int, float], None] | None,
) -> float:
    """Train, test and write, in a directory that is this process's own.

    Args:
        run: as it stands.
        data: set up.
        classifier: new; what ``run`` goes on from is read into it.
        record: where this start of the run comes from.
        report: as in :func:`train`.

    Returns:
        The best ``val/acc``.
    """
    config, run_dir = run.config, run.folder
    patches = patches_of(data, config.model.patch_size)
    if is_first():
        (run_dir / "summary.json").unlink(missing_ok=True)  # of a run that goes on beyond its end
        write_whole(run_dir / "config.yaml", yaml.safe_dump(asdict(config), sort_keys=False).encode())
        patches.savefig(run_dir / "patches.png")

    bar = config.trainer.enable_progress_bar and sys.stdout.isatty()
    recorder = EpochRecorder(run_dir, record)
    best = run_dir / "checkpoints" / "best.ckpt"
    saver = Saver(best.parent, config.save_minutes, recorder)
    guard = StopAtNaN(run_dir, config.trainer.log_every_n_steps)
    dashboard = Dashboard(config, data, {"command": record["command"]}, patches)
    callbacks: list[L.Callback] = [guard, recorder, dashboard, saver]
    if config.optim.ema:
        callbacks.append(WeightAverage(multi_avg_fn=ema_update(config.optim.ema)))
    if config.target_acc or config.target_acc5:
        callbacks.append(StopAtTarget(config.target_acc or 0.0, config.target_acc5 or 0.0))
    if report is not None:
        callbacks.append(Report(report))
    if bar:
        callbacks.append(RichProgressBar())
    # What was logged after the checkpoint that a run goes on from is hidden: those steps come again.
    logger = TensorBoardLogger(run_dir, name="", version="", default_hp_metric=False, purge_step=run.step)
    logger.log_hyperparams(hyper_parameters(config))  # its hparams.yaml
    trainer = L.Trainer(
        **{**asdict(config.trainer), "enable_progress_bar": bar, **placement(config)},
        default_root_dir=run_dir,
        logger=logger,
        callbacks=callbacks,
        plugins=[SealedCheckpoints()],
        enable_model_summary=False,  # show_start gives one without the metrics' rows
        num_sanity_val_steps=0,
    )
    if is_first():
        dashboard.text["step"] = describe_step(config, trainer.world_size)
        dashboard.text["network"] = show_start(config, data, classifier, trainer)
    if config.compile:
        compile_network(classifier.net, trainer.strategy.root_device)

    trainer.fit(classifier, data, ckpt_path=run.checkpoint, weights_only=True)
    if is_first():
        recorder.draw()
    if not best.exists():
        raise InputError("the run ended before its first validation; set trainer.check_val_every_n_epoch=1")
    # A network of its own: Trainer.test(ckpt_path=…) would set the callbacks back to that epoch as well.
    tested = load_classifier(str(best))
    [test] = trainer.test(tested, datamodule=data, verbose=False) if config.test else [{}]
    if not is_first():
        return recorder.best["val/acc"]
    best_row = recorder.best
    summary = {
        **recorder.starts[0],
        "resumed": recorder.starts[1:],
        "device": str(trainer.strategy.root_device),
        "processes": trainer.world_size,
        "step": describe_step(config, trainer.world_size),
        "seed": config.seed,
        "parameters": sum(p.numel() for p in classifier.net.parameters()),
        "images": recorder.images,  # that each split's metrics are counted over
        "epochs": len(recorder.rows),
        "best_epoch": best_row["epoch"],
        "samples_seen": recorder.samples_seen,
        "seconds": recorder.rows[-1]["seconds"],
        "seconds_to_val_acc": seconds_to_marks(recorder.rows),
        "train/images_per_second": recorder.images_per_second,
        # Of one network, the best checkpoint's: training as counted during its epoch, with dropout and augmentation.
        "metrics": {**metrics_of(best_row), **test},
        "config": asdict(config),
    }
    whole = load_classifier(str(best)).to(trainer.strategy.root_device)  # with fsdp, tested is in parts
    start = time.perf_counter()
    dashboard.show_best(whole, trainer, summary)
    logger.save()
    summary["pictures_seconds"] = time.perf_counter() - start
    # The last of the files: where it is, the run came to its end.
    write_whole(run_dir / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    show_results(summary, run_dir, best)
    return summary["metrics"]["val/acc"]


@contextlib.contextmanager
def in_one_line(run_dir: Path) -> Iterator[None]:
    """Let what ends a run early say so in one line, with how to go on.

    Raises:
        InputError: for what the user can mend.
        MachineError: for what lies with the disk, or with the processes that read batches.
    """
    try:
        yield
    except SystemExit as end:
        if is_first():
            print(f"interrupted; what there is so far lies in {relative(run_dir)}{go_on(run_dir)}", file=sys.stderr)
        ours = {1: 130, None: 143}  # Lightning's answers to Ctrl-C and SIGTERM; others are a launcher's
        sys.exit(ours.get(end.code, end.code))  # type: ignore[arg-type]
    except (InputError, OSError, RuntimeError) as error:
        kind = type(error) if isinstance(error, InputError) else MachineError
        lines = str(error).splitlines() or [""]
        if lines[0].startswith("Caught ") and "DataLoader worker" in lines[0]:  # and then the traceback there
            reason = f"a process that reads batches ended with {lines[-1]}"
        elif isinstance(error, InputError):
            reason = str(error)
        elif isinstance(error, OSError):
            reason = unwritable(error, run_dir)
        elif "DataLoader worker" in lines[0]:
            reason = f"{lines[0]}; data.workers=0 needs none"
        else:
            raise
        raise kind(f"{reason}{go_on(run_dir)}") from error


def go_on(run_dir: Path) -> str:
    """How to go on with a run that has stopped, if it can."""
    checkpoint, step, _ = newest_sound(run_dir / "checkpoints")
    if checkpoint is None:
        return ""
    return f"; resume={relative(run_dir)} goes on after step {step} ({checkpoint.name} is sound)"


def describe_step(config: Config, processes: int) -> str:
    """How many images a step takes, and what that means for learning rates."""
    batch = config.data.batch_size
    if processes == 1:
        return f"one process, {batch} images a step"
    return (
        f"{processes} processes, {batch // processes} of the {batch} images of a step in each; "
        "their gradients are averaged, so that learning rates stay as they are"
    )


def check_same_data(classifier: ViTClassifier, checkpoint: Path) -> None:
    """Refuse to go on with other classes, or images whose mean and standard deviation are not what they were.

    Args:
        classifier: that knows those of the data as it is.
        checkpoint: that knows them as they were.

    Raises:
        InputError: if they differ.
    """
    were = read_checkpoint(checkpoint)["hyper_parameters"]
    same = {"class_names": were["class_names"] == classifier.hparams["class_names"]}
    for name in ("mean", "std"):  # which the last bit may tell apart on another machine
        pairs = list(zip(were[name], classifier.hparams[name], strict=False))
        same[name] = all(math.isclose(a, b, rel_tol=1e-6) for a, b in pairs)
    changed = [name for name in same if not same[name]]
    if changed:
        raise InputError(
            f"the images are not those that this run began with: {' and '.join(changed)} differ from what "
            f"{relative(checkpoint)} has; bring them back, or start the run anew in another directory"
        )


def check_limits(trainer: TrainerConfig, data: ImageData) -> None:
    """Refuse a share of the batches that comes to none.

    Raises:
        InputError: if so.
    """
    for split, loader in (
        ("train", data.train_dataloader()),
        ("val", data.val_dataloader()),
        ("test", data.test_dataloader()),
    ):
        limit = getattr(trainer, f"limit_{split}_batches")
        if isinstance(limit, float) and int(limit * len(loader)) == 0:
            raise InputError(
                f"trainer.limit_{split}_batches={limit} of {len(loader)} batches is none; "
                f"trainer.limit_{split}_batches=1 would be one"
            )


def patches_of(data: ImageData, patch_size: int) -> Figure:
    """The first validation image, as the network sees it, beside its patches."""
    images, labels = data.stored("val", torch.tensor([0]))
    image = denormalise(eval_transform(images, data.image_size, data.mean, data.std), data.mean, data.std)
    return draw_patches(image[0].permute(1, 2, 0).numpy(), patch_size, data.class_names[labels[0]])


def seconds_to_marks(rows: list[dict[str, float]]) -> dict[str, float]:
    """Seconds of training, validation included, after which ``val/acc`` first stood at 5 %, 10 %, … or above."""
    best = max(row.get("val/acc", 0.0) for row in rows)
    marks = [mark for mark in range(5, 101, 5) if mark <= 100 * best]
    return {f"{mark}%": next(row["seconds"] for row in rows if 100 * row.get("val/acc", 0.0) >= mark) for mark in marks}


def show_start(config: Config, data: ImageData, classifier: ViTClassifier, trainer: L.Trainer) -> str:
    """Say what is trained, on what, and where.

    Returns:
        The network's parts at length.
    """
    counts = ", ".join(
        f"{len(data.indices[split]):,} {name}"
        for split, name in (("train", "training"), ("val", "validation"), ("test", "test"))
    )
    machine, device = hardware(), trainer.strategy.root_device
    name = {"cpu": f"{machine['cpu']}, {machine['threads']} threads", "cuda": machine["gpu"]}.get(device.type, device)
    print(f"{config.data.source}: {counts} images of {len(data.class_names)} classes; on {name}")
    if trainer.world_size > 1:
        print(describe_step(config, trainer.world_size))

    model = ModelSummary(classifier, max_depth=3)
    sizes = dict(zip(model.layer_names, model.out_sizes, strict=True))
    rows: list[tuple[str, ...]] = []
    for name, parameter in classifier.net.named_parameters(recurse=False):  # that lie in no part
        rows.append((name, " × ".join(map(str, parameter.shape[1:])), f"{parameter.numel():,}"))
    for name, parameters in zip(model.layer_names, model.param_nums, strict=True):
        if name.count(".") == 1 and name.startswith("net."):
            size = sizes[f"{name}.0" if name == "net.blocks" else name]  # a list of blocks has no output of its own
            rows.append((name.removeprefix("net."), " × ".join(map(str, size[1:])), f"{parameters:,}"))
    rows += [(), ("in all", "", f"{model.total_parameters:,}")]
    title = f"ViT, {model.total_flops / 1e6:,.1f} MFLOP an image"
    print_table(title, ("part", "output for one image", "parameters"), rows, left=2)
    return str(model)


def show_results(summary: dict[str, Any], run_dir: Path, checkpoint: Path) -> None:
    """Print the final metrics, and where the run's files lie and how to open them."""
    rows = []
    names = [name.removeprefix("val/") for name in summary["metrics"] if name.startswith("val/")]
    more = [name for name in names if name not in ("loss", "acc", "acc5")]
    for split, name in (("train", "training"), ("val", "validation"), ("test", "test")):
        if f"{split}/acc" not in summary["metrics"]:
            continue  # test=false
        loss, acc, acc5 = (summary["metrics"][f"{split}/{key}"] for key in ("loss", "acc", "acc5"))
        others = (f"{summary['metrics'][f'{split}/{key}']:.3f}" for key in more)
        rows.append((name, f"{summary['images'][split]:,}", f"{loss:.3f}", f"{acc:.1%}", f"{acc5:.1%}", *others))
    title = f"best of {summary['epochs']} epochs: epoch {summary['best_epoch']}"
    print_table(title, ("", "images", "loss", "top-1", "top-5", *more), rows)
    print(
        f"{summary['parameters']:,} parameters, {summary['samples_seen']:,} training images seen "
        f"in {summary['seconds']:.0f} s ({summary['train/images_per_second']:,.0f} images/s)"
    )
    for name, file in (
        ("checkpoint", checkpoint),
        ("curves", run_dir / "curves.png"),
        ("patches", run_dir / "patches.png"),
        ("record", run_dir / "summary.json"),
    ):
        print(f"{name:<12}{relative(file)}")
    print(f"{'dashboard':<12}tensorboard --logdir {relative(run_dir.parent)}")
