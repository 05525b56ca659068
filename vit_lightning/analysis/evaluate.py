"""Count what a trained network gets right, class by class: ``python -m vit_lightning.evaluate checkpoint=…``."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vit_lightning.analysis.predictions import draw, measure, predict_split, write_per_class, write_predictions
from vit_lightning.config import DataConfig, EvaluateConfig, InputError, Invocation, from_python
from vit_lightning.data.module import ImageData
from vit_lightning.devices import evaluation_device
from vit_lightning.provenance import provenance
from vit_lightning.recipe.classifier import ViTClassifier
from vit_lightning.recipe.weights import load_classifier
from vit_lightning.terminal import print_files, print_table


def evaluate(config: EvaluateConfig, run_dir: Path, invocation: Invocation | None = None) -> float:
    """Evaluate a checkpoint on one split, print the tables and write reports and figures into ``run_dir``.

    Returns:
        Top-1 accuracy, in [0, 1].

    Raises:
        InputError: if there is no such checkpoint, or the images' classes are not its own.
    """
    classifier = load_classifier(config.checkpoint).to(evaluation_device(config.accelerator))
    chosen = chosen_data(config, classifier, invocation.keys if invocation else set())
    # No batch of training images is drawn, so that their number does not matter.
    data = ImageData(replace(chosen, batch_size=1), classifier.net.image_size)
    data.setup()
    probabilities, labels = predict_split(classifier, data, config.split, config.tta)
    names: list[str] = classifier.hparams["class_names"]
    report = {
        **provenance(invocation or from_python()),
        "checkpoint": config.checkpoint,
        "data": asdict(chosen),
        "split": config.split,
        "tta": config.tta,
        **measure(probabilities, labels, names),
    }
    (run_dir / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    write_per_class(run_dir / "per_class.csv", probabilities, labels, names)
    write_predictions(run_dir / "predictions.csv", probabilities, labels, names)
    figures = draw(probabilities, labels, data, config.split, names)
    for name, figure in figures.items():
        figure.savefig(run_dir / f"{name}.png")
    show(report)
    written = ("evaluation.json", "per_class.csv", "predictions.csv", *(f"{name}.png" for name in figures))
    print_files(run_dir / name for name in written)
    return report["acc"]


def chosen_data(config: EvaluateConfig, classifier: ViTClassifier, typed: set[str]) -> DataConfig:
    """The images to evaluate on: those that the classifier was trained on, or others, split as those unless typed.

    Raises:
        InputError: if none are chosen, and the classifier does not know its own.
    """
    own: dict[str, Any] | None = classifier.hparams["data"]
    if config.data is None:
        if own is None:
            raise InputError(
                f"checkpoint={config.checkpoint} does not say what it was trained on; set data, as in data=cifar100"
            )
        return DataConfig(**own)
    if own is None or not typed:  # in Python, config.data is as its maker wants it
        return config.data
    split = {key: own[key] for key in ("split", "val_fraction", "split_seed") if f"data.{key}" not in typed}
    return replace(config.data, **split)


def show(report: dict[str, Any]) -> None:
    """Print the tables."""
    title = f"{report['checkpoint']} on {report['images']:,} {report['split']} images of {report['data']['source']}"
    names = {
        "acc": "top-1",
        "acc5": "top-5",
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
