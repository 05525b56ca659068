"""Evaluate a trained network on one split: metrics, tables and figures."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vit_lightning.analysis.embeddings import write_embeddings
from vit_lightning.analysis.figures import name_run
from vit_lightning.analysis.predictions import FIGURES, predict_split
from vit_lightning.config import DataConfig
from vit_lightning.data.module import ImageData
from vit_lightning.devices import evaluation_device
from vit_lightning.files import save_figure, write_atomic
from vit_lightning.keys import InputError, Invocation, from_python
from vit_lightning.provenance import provenance
from vit_lightning.recipe.classifier import ViTClassifier
from vit_lightning.recipe.weights import load_classifier
from vit_lightning.schemas import EvaluateConfig
from vit_lightning.terminal import print_files, print_table, warn_instead


def evaluate(config: EvaluateConfig, run_dir: Path, invocation: Invocation | None = None) -> float:
    """Evaluate a checkpoint on one split, print tables, and write a report, tables and figures to ``run_dir``.

    Returns:
        Top-1 accuracy, in [0, 1].

    Raises:
        InputError: if the checkpoint cannot be read, or the images have other classes or channels.
    """
    classifier = load_classifier(config.checkpoint).to(evaluation_device(config.accelerator))
    chosen = chosen_data(config, classifier, invocation.keys if invocation else set())
    # No batch of training images is drawn, so there may be fewer than the usual batch size.
    data = ImageData(replace(chosen, batch_size=1), classifier.net.image_size)
    data.setup()
    predictions = predict_split(classifier, data, config.split, config.tta, config.embeddings)
    report = {
        **provenance(invocation or from_python()),
        "checkpoint": config.checkpoint,
        "data": asdict(chosen),
        "split": config.split,
        "tta": config.tta,
        **predictions.measure(),
    }
    write_atomic(run_dir / "evaluation.json", json.dumps(report, indent=2) + "\n")
    predictions.write_per_class(run_dir / "per_class.csv")
    predictions.write_predictions(run_dir / "predictions.csv")
    show(report)
    print_files(run_dir / name for name in ("evaluation.json", "per_class.csv", "predictions.csv"))
    if predictions.embeddings is not None:
        labels, guesses = (
            [predictions.class_names[i] for i in each] for each in (predictions.labels, predictions.guess)
        )
        columns = {"labels": labels, "class": guesses, "files": [str(file) for file in predictions.files()]}
        write_embeddings(run_dir, predictions.embeddings, columns, lambda at: data.stored(config.split, at)[0])
    for name in FIGURES:
        with warn_instead(name):
            figure = predictions.draw(name)
            if figure is not None:
                save_figure(name_run(figure, config.checkpoint), run_dir / f"{name}.png")
                print_files([run_dir / f"{name}.png"])
    return report["acc"]


def chosen_data(config: EvaluateConfig, classifier: ViTClassifier, typed: set[str]) -> DataConfig:
    """The images to evaluate on: the classifier's own, or those of ``config.data``, split like its own.

    Args:
        config: the command's configuration.
        classifier: the classifier; its hyper-parameters may name the data that it was trained on.
        typed: keys set on the command line, which take precedence over the classifier's split.

    Raises:
        InputError: if ``config.data`` is ``None`` and the classifier does not name its own data.
    """
    own: dict[str, Any] | None = classifier.hparams["data"]
    if config.data is None:
        if own is None:
            raise InputError(
                f"checkpoint={config.checkpoint} does not say what it was trained on; set data, as in data=cifar100"
            )
        return DataConfig(**own)
    if own is None or not typed:  # a caller from Python has set config.data as a whole
        return config.data
    split = {key: own[key] for key in ("split", "val_fraction", "split_seed") if f"data.{key}" not in typed}
    return replace(config.data, **split)


def show(report: dict[str, Any]) -> None:
    """Print the metrics, the worst classes and the most confused pairs."""
    title = f"{report['checkpoint']} on {report['images']:,} {report['split']} images of {report['data']['source']}"
    names = {
        "acc": "top-1",
        "acc5": "top-5",
        "balanced_acc": "balanced accuracy",
        "macro_f1": "macro F1",
        "superclass_acc": "superclass",
        "calibration_error": "calibration error",
    }
    rows = [(name, f"{report[key]:.1%}") for key, name in names.items() if key in report]
    print_table(title, ("", "value"), [("loss", f"{report['loss']:.3f}"), *rows])
    worst = [(row["class"], f"{row['acc']:.1%}") for row in report["worst_classes"]]
    print_table("worst classes", ("class", "top-1"), worst)
    if report["most_confused"]:
        pairs = [(row["label"], row["prediction"], str(row["images"])) for row in report["most_confused"]]
        print_table("most confused", ("label", "prediction", "images"), pairs, left=2)
