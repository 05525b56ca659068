"""What a classifier's predictions are worth: counted, drawn, and written down."""

import csv
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_confusion_matrix

from vit_lightning.analysis.figures import draw_confusion, draw_images, draw_per_class, draw_reliability
from vit_lightning.config import InputError
from vit_lightning.data.module import ImageData
from vit_lightning.data.superclasses import SUPERCLASSES, superclass_indices
from vit_lightning.recipe.classifier import ViTClassifier
from vit_lightning.terminal import with_bar

WORST = 10  # classes and pairs that are listed
MISTAKES = 24  # that are drawn
BINS = 15  # of confidence


def predict_split(classifier: ViTClassifier, data: ImageData, split: str, tta: bool = False) -> tuple[Tensor, Tensor]:
    """The probabilities of all images of a split, in their order.

    Args:
        classifier: on the device to compute on.
        data: set up.
        split: ``train``, ``val`` or ``test``.
        tta: whether those of an image and its mirror image are averaged.

    Returns:
        Probabilities (n, classes), float32, and labels (n,), int64, both in the classifier's order of classes and on
        the CPU.

    Raises:
        InputError: if the data has a class that the classifier lacks, or other channels.
    """
    names: list[str] = classifier.hparams["class_names"]
    for name in data.class_names:
        if name not in names:
            raise InputError(
                f"data.source={data.config.source} has a class {name} that the checkpoint lacks; choose the data that "
                "it was trained on, or a folder with the same classes"
            )
    if data.channels != classifier.net.channels:
        raise InputError(
            f"data.source={data.config.source} has images of {data.channels} channel(s), and the checkpoint's network "
            f"takes {classifier.net.channels}"
        )
    index = torch.tensor([names.index(name) for name in data.class_names])
    probabilities, labels = [], []
    loader = data.eval_dataloader(split)
    for images, numbers in with_bar(loader, f"Predicting {split} images", len(loader)):
        probabilities.append(classifier.classify(images, tta).cpu())
        labels.append(index[numbers.cpu()])
    return torch.cat(probabilities), torch.cat(labels)


def confusion_matrix(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Images of each class (rows) that were taken for each class (columns): (classes, classes), float."""
    return multiclass_confusion_matrix(probabilities, labels, probabilities.shape[1]).float()


def measure(probabilities: Tensor, labels: Tensor, names: list[str]) -> dict[str, Any]:
    """What the predictions are worth.

    Args:
        probabilities: (n, classes).
        labels: (n,).
        names: of the classes.

    Returns:
        ``images``, ``loss`` (cross-entropy, in nats), ``acc`` and ``acc5`` (in [0, 1]), ``calibration_error``
        (expected, of 15 bins), ``superclass_acc`` where the classes are CIFAR-100's, ``worst_classes``,
        ``most_confused``.
    """
    classes = len(names)
    guess = probabilities.argmax(dim=1)
    top5 = probabilities.topk(min(5, classes), dim=1).indices
    own = probabilities.gather(1, labels[:, None]).clamp_min(torch.finfo(probabilities.dtype).tiny)
    report: dict[str, Any] = {
        "images": len(labels),
        "loss": -own.log().mean().item(),
        "acc": (guess == labels).float().mean().item(),
        "acc5": (top5 == labels[:, None]).any(dim=1).float().mean().item(),
        "calibration_error": multiclass_calibration_error(probabilities, labels, classes, n_bins=BINS).item(),
    }
    superclasses = superclass_indices(names)
    if superclasses is not None:
        of = torch.tensor(superclasses)
        report["superclass_acc"] = (of[guess] == of[labels]).float().mean().item()
    confusion = confusion_matrix(probabilities, labels)
    counts = confusion.sum(dim=1)
    recall = confusion.diag() / counts
    worst = [i for i in recall.argsort().tolist() if counts[i]][:WORST]
    report["worst_classes"] = [{"class": names[i], "acc": recall[i].item()} for i in worst]
    mistaken = confusion - confusion.diag().diag()
    values, places = mistaken.flatten().topk(min(WORST, classes**2))
    report["most_confused"] = [
        {"label": names[place // classes], "prediction": names[place % classes], "images": int(value)}
        for value, place in zip(values.tolist(), places.tolist(), strict=True)
        if value
    ]
    return report


def draw(probabilities: Tensor, labels: Tensor, data: ImageData, split: str, names: list[str]) -> dict[str, Figure]:
    """Pictures of the predictions, by name.

    Args:
        probabilities: (n, classes).
        labels: (n,).
        data: whose images they are, in their order.
        split: of the data.
        names: of the classes.

    Returns:
        ``confusion`` (CIFAR-100's classes by superclass), ``per_class``, ``reliability``; ``confusion_superclasses``
        where the classes are CIFAR-100's; ``mistakes``, the most confident ones, where there are any.
    """
    confidence, guess = probabilities.max(dim=1)
    confusion = confusion_matrix(probabilities, labels)
    counts = confusion.sum(dim=1)
    there = counts.nonzero().squeeze(1)
    recall = (confusion.diag() / counts)[there]
    error = multiclass_calibration_error(probabilities, labels, len(names), n_bins=BINS).item()
    superclasses = superclass_indices(names)
    order = list(range(len(names)))  # of the confusion matrix
    if superclasses is not None:
        order.sort(key=superclasses.__getitem__)
    figures = {
        "confusion": draw_confusion(confusion[order][:, order].numpy(), [names[index] for index in order]),
        "per_class": draw_per_class([names[index] for index in there.tolist()], recall.numpy()),
        "reliability": draw_reliability(confidence.numpy(), (guess == labels).numpy(), error, BINS),
    }
    if superclasses is not None:
        into = F.one_hot(torch.tensor(superclasses)).to(confusion.dtype)  # (classes, superclasses)
        figures["confusion_superclasses"] = draw_confusion((into.T @ confusion @ into).numpy(), list(SUPERCLASSES))
    wrong = (guess != labels).nonzero().squeeze(1)
    wrong = wrong[confidence[wrong].argsort(descending=True)][:MISTAKES]
    if len(wrong):
        titles = [f"{names[labels[i]]}\n→ {names[guess[i]]} {confidence[i]:.0%}" for i in wrong.tolist()]
        pictures = data.stored(split, wrong)[0].permute(0, 2, 3, 1).numpy() / 255
        figures["mistakes"] = draw_images(pictures, titles, title="most confident mistakes: label → prediction")
    return figures


def write_per_class(path: Path, probabilities: Tensor, labels: Tensor, names: list[str]) -> None:
    """A row for each class that has images: how many, how often right, and what it is mostly taken for otherwise."""
    confusion = confusion_matrix(probabilities, labels)
    top5 = (probabilities.topk(min(5, len(names)), dim=1).indices == labels[:, None]).any(dim=1)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "images", "acc", "acc5", "precision", "mostly_taken_for", "times"])
        for index, name in enumerate(names):
            row = confusion[index].clone()
            count, right, guessed = int(row.sum()), row[index].item(), confusion[:, index].sum().item()
            if count == 0:
                continue
            row[index] = 0
            other = int(row.argmax())
            taken = [names[other], int(row[other])] if row[other] else ["", 0]
            precision = right / guessed if guessed else ""
            writer.writerow(
                [name, count, right / count, top5[labels == index].float().mean().item(), precision, *taken]
            )


def write_predictions(path: Path, probabilities: Tensor, labels: Tensor, names: list[str]) -> None:
    """A row for each image, in the split's order: its label and the five likeliest classes with their probabilities."""
    values, classes = probabilities.topk(min(5, len(names)), dim=1)
    numbers = range(1, values.shape[1] + 1)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label", *(f"{what}_{i}" for i in numbers for what in ("class", "probability"))])
        for image, label in enumerate(labels.tolist()):
            guesses = [names[index] for index in classes[image].tolist()]
            shares = [f"{share:.6f}" for share in values[image].tolist()]
            writer.writerow([image, names[label], *chain(*zip(guesses, shares, strict=True))])
