"""Train a Vision Transformer, test its best checkpoint, and write a record."""

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from matplotlib.figure import Figure

from vit_lightning.analysis.figures import draw_patches, name_run
from vit_lightning.config import TOP5_ABOVE, Config, TrainerConfig
from vit_lightning.data.module import ImageData, follow_data
from vit_lightning.devices import (
    check_accelerator,
    compile_network,
    out_of_memory_hint,
    quiet_lightning,
    resolve_precision,
    tune_malloc,
)
from vit_lightning.files import save_figure, write_atomic
from vit_lightning.keys import InputError, Invocation, from_python
from vit_lightning.provenance import provenance
from vit_lightning.recipe.augment import denormalise, eval_transform
from vit_lightning.recipe.classifier import ViTClassifier
from vit_lightning.recipe.metrics import measures_top5, mode_of
from vit_lightning.recipe.optim import class_weights, ema_update
from vit_lightning.recipe.weights import follow_weights, load_classifier, start_from
from vit_lightning.runs.callbacks import EpochRecorder, Report, StopAtNaN, StopAtTarget, WeightAverage
from vit_lightning.runs.checkpoints import Saver, VerifiedCheckpointIO, resume_hint
from vit_lightning.runs.dashboard import Dashboard, hyper_parameters, run_name
from vit_lightning.runs.processes import count_devices, placement, share_run_dir
from vit_lightning.runs.progress import EpochBar
from vit_lightning.runs.report import describe_step, describe_training, show_results, show_start, summarise, unequal
from vit_lightning.runs.run import Run, check_same_data, lock_run
from vit_lightning.terminal import format_metric, is_first, relative, warn_instead

PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}


def train(
    config: Config,
    run_dir: Path,
    report: Callable[[int, float], None] | None = None,
    invocation: Invocation | None = None,
    callbacks: Sequence[L.Callback] = (),
    loggers: Sequence[Logger] | None = None,
) -> float:
    """Train, test the best checkpoint, and write the run's files to ``run_dir``.

    Args:
        config: configuration of the run.
        run_dir: a new directory, or that of the same run, which is continued if it was interrupted.
        report: called after every validation with the epoch, from 1, and ``config.monitor``; an exception ends the run.
        invocation: the command that started the run; ``None`` if called from Python.
        callbacks: additional callbacks besides those of ``config.callbacks``.
        loggers: replace those of ``config.logger``; ``None`` for those, or for TensorBoard if called from Python.

    Returns:
        The best value of ``config.monitor``, for a sweeper to optimise; NaN without validation.

    Raises:
        InputError: if the configuration does not fit the data or the machine.
        MachineError: if a file cannot be written or a process dies.
    """
    quiet_lightning()
    tune_malloc()
    invocation = invocation or from_python()
    config = replace(follow_weights(config, invocation), trainer=resolve_precision(config.trainer))
    with (
        out_of_memory_hint("data.batch_size, model.image_size, or the number and width of the model's layers"),
        lock_run(config, share_run_dir(run_dir), invocation) as run,
    ):
        if run.result is not None:
            if is_first():
                result = format_metric(run.config.monitor, run.result)
                print(f"{relative(run.folder)} is already finished: {run.config.monitor} {result}")
            return run.result
        if run.checkpoint is not None and is_first():
            print(f"continuing {relative(run.folder)} from step {run.step}")
        check_accelerator(run.config.trainer)
        record = {**provenance(invocation), "overrides": invocation.overrides or []}
        L.seed_everything(run.config.seed, workers=True, verbose=False)
        data = open_data(run)
        classifier = build_classifier(run, data)
        # Built only from what was typed this time: a resumed run's file names parts too, but must not run code.
        own = [
            *callbacks,
            *(
                invocation.build(follow(each, config), run.folder)
                for each in config.callbacks.values()
                if invocation.build
            ),
        ]
        loggers = build_loggers(config, run, invocation) if loggers is None else loggers
        with resume_hint(run.files):
            return fit_and_test(run, data, classifier, record, report, own, loggers)


def follow(callback: dict[str, Any], config: Config) -> dict[str, Any]:
    """Return a callback's settings; if it watches ``config.monitor``, its mode is set to that metric's."""
    watches = "mode" in callback and callback.get("monitor") == config.monitor
    return {**callback, "mode": mode_of(config.monitor)} if watches else callback


def open_data(run: Run) -> ImageData:
    """Open the images of a run, and set the channels and classes of its configuration accordingly.

    Raises:
        InputError: if they do not fit the configuration, or have changed since the run started.
    """
    data = ImageData(run.config.data, run.config.model.image_size, run.config.seed)
    data.setup()
    for split, name in (("train", "training"), ("val", "validation")):
        if not len(data.indices[split]):
            raise InputError(f"data.root={run.config.data.root} has no {name} images; train/ and val/ would have them")
    run.config = follow_data(run.config, data)
    if not measures_top5(len(data.class_names)):
        few = f"is not measured for {len(data.class_names)} classes, only for more than {TOP5_ABOVE}"
        if run.config.target_acc5:
            raise InputError(f"target_acc5={run.config.target_acc5}: top-5 {few}; set target_acc5=null")
        if run.config.monitor == "val/acc5":
            raise InputError(f"monitor=val/acc5: top-5 {few}; choose another metric")
    if run.config.trainer.overfit_batches:
        data.indices["train"] = data.indices["train"][: run.config.trainer.overfit_batches * data.config.batch_size]
    check_limits(run.config.trainer, data)
    check_splits(run.config, data)
    if run.content is not None:
        check_same_data(run, data)
    return data


def build_classifier(run: Run, data: ImageData) -> ViTClassifier:
    """Build a classifier; in a new run, with the weights of ``config.checkpoint`` if it is set."""
    config = run.config
    counts = data.class_counts()
    # Accuracy would not show that small classes are always mistaken for large ones.
    more = ["balanced_acc"] if unequal(counts) and "balanced_acc" not in config.metrics else []
    own: Any = run.content["hyper_parameters"] if run.content is not None else {}  # start_from may have changed them
    classifier = ViTClassifier(
        model=asdict(config.model),
        optim=asdict(config.optim),
        class_names=data.class_names,
        mean=own.get("mean", data.mean.tolist()),
        std=own.get("std", data.std.tolist()),
        data=asdict(config.data),
        augment=asdict(config.augment),
        seed=config.seed,
        metrics=[*config.metrics, *more],
        class_weights=class_weights(counts, config.optim.class_weights),
        imports=config.imports,
    )
    if run.checkpoint is None and config.checkpoint is not None:
        start_from(classifier, config.checkpoint)
    return classifier


def fit_and_test(
    run: Run,
    data: ImageData,
    classifier: ViTClassifier,
    record: dict[str, Any],
    report: Callable[[int, float], None] | None,
    callbacks: Sequence[L.Callback],
    loggers: Sequence[Logger],
) -> float:
    """Train, test and write the record, in a directory that no other process writes to.

    Args:
        run: the run, whose checkpoint is loaded into ``classifier``.
        data: the images, after ``setup()``.
        classifier: a new classifier.
        record: the provenance of this start.
        report: as in :func:`train`.
        callbacks: additional callbacks.
        loggers: all loggers.

    Returns:
        The best value of ``config.monitor``.
    """
    config, files = run.config, run.files
    name = run_name(record["overrides"], run.folder)
    recorder = EpochRecorder(run.folder, record, name, describe_training(config), config.monitor)
    patches = name_run(patches_of(data, config.model.patch_size), name)
    dashboard = Dashboard(config, data, name, {"command": record["command"]}, patches)
    if is_first():
        files.summary.unlink(missing_ok=True)  # the old record, if a finished run is extended
        write_atomic(files.config, yaml.safe_dump(asdict(config), sort_keys=False))
        with warn_instead("patches"):
            save_figure(patches, files.patches)
    own = [recorder, dashboard, *callbacks, *([] if report is None else [Report(report, config.monitor)])]
    trainer = build_trainer(run, data, recorder, own, loggers)
    if is_first():
        dashboard.text["step"] = describe_step(config, trainer.world_size)
        dashboard.text["network"] = show_start(config, data, classifier, trainer)
    if config.compile:
        compile_network(classifier.net, trainer.strategy.root_device)

    trainer.fit(classifier, data, ckpt_path=run.checkpoint, weights_only=True)
    if is_first():
        recorder.draw()
    if not files.best.exists():
        raise InputError("the run ended before its first validation; set trainer.check_val_every_n_epoch=1")
    # Trainer.test(ckpt_path=…) would reset the callbacks to the best epoch, so the test uses a separate classifier.
    tested = load_classifier(str(files.best))
    test = measure_test(tested, data, trainer) if config.test and len(data.indices["test"]) else {}
    if is_first():
        summary = summarise(config, recorder, trainer, classifier, test)
        dashboard.log_best(trainer, summary)
        write_atomic(files.summary, json.dumps(summary, indent=2) + "\n")  # from here on the run is finished
        best = load_classifier(str(files.best)) if config.trainer.strategy == "fsdp" else tested  # fsdp shards tested
        dashboard.show_best(best.to(trainer.strategy.root_device), trainer, summary)
        show_results(summary, files)
    return recorder.best.get(config.monitor, math.nan)


def measure_test(classifier: ViTClassifier, data: ImageData, trainer: L.Trainer) -> dict[str, float]:
    """Measure ``test/loss``, ``test/acc`` and the other metrics on the test images."""
    classifier.log_curves = False  # log_best logs them
    trainer.test(classifier, datamodule=data, verbose=False)
    measured = {name: value.item() for name, value in trainer.callback_metrics.items()}
    return {name: value for name, value in measured.items() if name.startswith("test/") and name != "test/images"}


def build_loggers(config: Config, run: Run, invocation: Invocation) -> list[Logger]:
    """Build the chosen loggers, or TensorBoard if called from Python."""
    # Points that were logged after the checkpoint are hidden, because the resumed run logs those steps again.
    if invocation.build is None:
        return [TensorBoardLogger(run.folder, name="", version="", default_hp_metric=False, purge_step=run.step)]
    tensorboard = "TensorBoardLogger"
    return [
        invocation.build({**each, **({"purge_step": run.step} if tensorboard in each["_target_"] else {})}, run.folder)
        for each in config.logger.values()
    ]


def build_trainer(
    run: Run, data: ImageData, recorder: EpochRecorder, more: Sequence[L.Callback], loggers: Sequence[Logger]
) -> L.Trainer:
    """Build Lightning's Trainer with the callbacks, loggers and checkpoints of a run."""
    config = run.config
    saver = Saver(run.files, config.save_minutes, recorder, data.arrays.digest if data.arrays else None)
    bars = [EpochBar()] if config.trainer.enable_progress_bar and sys.stdout.isatty() and is_first() else []
    callbacks: list[L.Callback] = [*bars, StopAtNaN(run.folder, config.trainer.log_every_n_steps), *more, saver]
    if config.optim.ema:
        callbacks.append(WeightAverage(multi_avg_fn=ema_update(config.optim.ema)))
    if config.target_acc or config.target_acc5:
        callbacks.append(StopAtTarget(config.target_acc or 0.0, config.target_acc5 or 0.0))
    for logger in loggers:
        logger.log_hyperparams(hyper_parameters(config))
    content, run.content = run.content, None  # freed once the Trainer has loaded it
    arguments = asdict(config.trainer)
    for name in ("fast_dev_run", "overfit_batches"):  # TrainerConfig and open_data implement them
        del arguments[name]
    profiler = PROFILERS.get(config.trainer.profiler or "")
    return L.Trainer(
        **{
            **arguments,
            "max_steps": config.trainer.max_steps or -1,
            "profiler": profiler and profiler(dirpath=run.folder, filename="profile"),
            "enable_progress_bar": False,  # EpochBar replaces it
            **placement(config),
        },
        default_root_dir=run.folder,
        logger=list(loggers) or False,
        callbacks=callbacks,
        # With fsdp, Lightning reads the checkpoint itself.
        plugins=[VerifiedCheckpointIO(content if config.trainer.strategy != "fsdp" else None)],
        enable_model_summary=False,  # show_start prints one without the metrics
    )


def check_limits(trainer: TrainerConfig, data: ImageData) -> None:
    """Check that every limit given as a share of the batches is at least one batch.

    Raises:
        InputError: if one is not.
    """
    for split in ("train", "val", "test"):
        key = f"limit_{split}_batches"
        limit = getattr(trainer, key)
        if not len(data.indices[split]):
            continue  # a source may lack test images
        loader = data.train_dataloader() if split == "train" else data.eval_dataloader(split)
        if isinstance(limit, float) and int(limit * len(loader)) == 0:
            raise InputError(f"trainer.{key}={limit} rounds down to 0 of {len(loader)} batches; use trainer.{key}=1")


def check_splits(config: Config, data: ImageData) -> None:
    """Check that every process gets a validation and a test image.

    Raises:
        InputError: if one would not.
    """
    devices, nodes = count_devices(config)
    for split in ("val", "test"):
        count = len(data.indices[split])
        if 0 < count < devices * nodes:
            raise InputError(f"{devices * nodes} processes need at least as many {split} images; there are {count}")


def patches_of(data: ImageData, patch_size: int) -> Figure:
    """Draw the first validation image, as the network sees it, next to its patches."""
    images, labels = data.stored("val", torch.tensor([0]))
    image = denormalise(eval_transform(images, data.image_size, data.mean, data.std), data.mean, data.std)
    return draw_patches(image[0].permute(1, 2, 0).numpy(), patch_size, data.class_names[labels[0]])
