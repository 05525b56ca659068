"""The predictions of a classifier on one split: measured, drawn and written to files."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_fscore_support
from torch import Tensor

from vit_lightning.analysis.embeddings import classify_and_embed
from vit_lightning.analysis.figures import draw_confusion, draw_images, draw_per_class, draw_reliability, shorten
from vit_lightning.data.module import ImageData
from vit_lightning.data.superclasses import SUPERCLASSES, superclass_indices
from vit_lightning.files import write_csv
from vit_lightning.keys import InputError
from vit_lightning.recipe.classifier import ViTClassifier
from vit_lightning.recipe.metrics import measures_top5
from vit_lightning.terminal import with_bar

WORST = 10  # number of classes, and of pairs of classes, that the report lists
MISTAKES = 24  # number of images in the figure of mistakes
BINS = 15  # number of confidence bins
SPLITS = {"train": "training", "val": "validation", "test": "test"}  # names used in titles
FIGURES = ("confusion", "confusion_superclasses", "per_class", "reliability", "mistakes")


@dataclass(frozen=True, eq=False)
class Predictions:
    """The class probabilities of all images of a split, and derived results, each computed once.

    Attributes:
        probabilities: (n, classes), float32, on the CPU.
        labels: (n,), int64.
        class_names: names of the classes, in the order of ``probabilities``.
        split: ``train``, ``val`` or ``test``, for titles.
        data: the images themselves, in the same order; ``None`` leaves out the figure that shows images.
        embeddings: (n, D), float32, on the CPU, if requested.
    """

    probabilities: Tensor
    labels: Tensor
    class_names: list[str]
    split: str = "test"
    data: ImageData | None = None
    embeddings: Tensor | None = None

    @cached_property
    def top5(self) -> tuple[Tensor, Tensor]:
        """The five highest probabilities and their classes, (n, 5) each; fewer if there are fewer classes."""
        values, classes = self.probabilities.topk(min(5, len(self.class_names)), dim=1)
        return values, classes

    @property
    def confidence(self) -> Tensor:
        """The probability of the predicted class: (n,)."""
        return self.top5[0][:, 0]

    @property
    def guess(self) -> Tensor:
        """The predicted class: (n,)."""
        return self.top5[1][:, 0]

    @cached_property
    def in_top5(self) -> Tensor:
        """Whether the label is one of the top five: (n,), bool."""
        return (self.top5[1] == self.labels[:, None]).any(dim=1)

    @cached_property
    def confusion(self) -> Tensor:
        """Number of images of each class (rows) predicted as each class (columns): (classes, classes), int64."""
        classes = len(self.class_names)
        pairs = self.labels * classes + self.guess
        return torch.bincount(pairs, minlength=classes**2).view(classes, classes)

    @property
    def mistaken(self) -> Tensor:
        """The confusion matrix without its diagonal."""
        return self.confusion - self.confusion.diag().diag()

    @cached_property
    def scores(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Precision, recall, F1 and number of images of each class, (classes,) each; NaN where undefined."""
        classes = range(len(self.class_names))
        guess = self.guess.numpy()
        return precision_recall_fscore_support(self.labels.numpy(), guess, labels=classes, zero_division=np.nan)

    @cached_property
    def calibration(self) -> tuple[np.ndarray, np.ndarray, float]:
        """Number of images and accuracy, (15,) each, in confidence bins of equal width, and the calibration error.

        The error is the expected one (Guo et al., 2017, https://arxiv.org/abs/1706.04599, equation 3), in [0, 1].
        """
        confidence, correct = self.confidence.double().numpy(), (self.guess == self.labels).numpy()
        bins = np.clip((confidence * BINS).astype(int), 0, BINS - 1)
        counts, right, sure = (np.bincount(bins, weights, BINS) for weights in (None, correct, confidence))
        return counts, right / np.maximum(counts, 1), float(np.abs(right - sure).sum() / len(correct))

    def measure(self) -> dict[str, Any]:
        """The metrics, as a report that can be written as JSON.

        Returns:
            ``images``, ``classes``, ``loss`` (cross-entropy, in nats), ``acc``, ``acc5`` with more than ten classes,
            ``balanced_acc`` (the mean recall of the classes that have images), ``macro_f1`` (the mean F1 of the classes
            that occur as labels or predictions), ``calibration_error`` (expected, with 15 bins), ``superclass_acc`` for
            CIFAR-100's classes, ``worst_classes``, ``most_confused``. Shares are in [0, 1].
        """
        names, guess, labels = self.class_names, self.guess, self.labels
        _, recall, f1, counts = self.scores
        own = self.probabilities.gather(1, labels[:, None])
        report: dict[str, Any] = {
            "images": len(labels),
            "classes": len(names),
            "loss": -own.clamp_min(torch.finfo(own.dtype).tiny).log().mean().item(),
            "acc": (guess == labels).double().mean().item(),
            **({"acc5": self.in_top5.double().mean().item()} if measures_top5(len(names)) else {}),
            "balanced_acc": float(np.nanmean(recall)),
            "macro_f1": float(np.nanmean(f1)),
            "calibration_error": self.calibration[2],
        }
        superclasses = superclass_indices(names)
        if superclasses is not None:
            of = torch.tensor(superclasses)
            report["superclass_acc"] = (of[guess] == of[labels]).double().mean().item()
        worst = [i for i in recall.argsort(kind="stable").tolist() if counts[i]][:WORST]
        report["worst_classes"] = [{"class": names[i], "acc": float(recall[i])} for i in worst]
        values, places = self.mistaken.flatten().topk(min(WORST, len(names) ** 2))
        report["most_confused"] = [
            {"label": names[place // len(names)], "prediction": names[place % len(names)], "images": value}
            for value, place in zip(values.tolist(), places.tolist(), strict=True)
            if value
        ]
        return report

    def draw(self, name: str) -> Figure | None:
        """Draw one of ``FIGURES``; return ``None`` if it would be empty.

        ``confusion`` orders CIFAR-100's classes by superclass, and ``confusion_superclasses`` needs these classes.
        ``mistakes`` shows the most confident ones; it needs the images and at least one mistake.
        """
        images = f"{len(self.labels):,} {SPLITS[self.split]} images"
        names, superclasses = self.class_names, superclass_indices(self.class_names)
        if name == "confusion":
            order = sorted(range(len(names)), key=superclasses.__getitem__ if superclasses else None)
            matrix = self.confusion[order][:, order]
            return draw_confusion(matrix.numpy(), [names[i] for i in order], f"Confusion, {images}")
        if name == "confusion_superclasses" and superclasses:
            into = F.one_hot(torch.tensor(superclasses))  # (classes, superclasses)
            matrix = into.T @ self.confusion @ into
            return draw_confusion(matrix.numpy(), list(SUPERCLASSES), f"Confusion of superclasses, {images}")
        if name == "per_class":
            _, recall, _, counts = self.scores
            seen = counts.nonzero()[0]
            return draw_per_class([names[i] for i in seen], recall[seen], f"Accuracy by class, {images}")
        if name == "reliability":
            counts, accuracies, error = self.calibration
            title = f"Reliability, {images}\nexpected calibration error {error:.1%}"
            return draw_reliability(counts, accuracies, title)
        if name == "mistakes" and self.data is not None and (self.guess != self.labels).any():
            return self._draw_mistakes(self.data, f"Mistakes: label → prediction, {images}")
        return None

    def _draw_mistakes(self, data: ImageData, title: str) -> Figure:
        wrong = (self.guess != self.labels).nonzero().squeeze(1)
        wrong = wrong[self.confidence[wrong].argsort(descending=True)][:MISTAKES]
        names = [shorten(name, 13) for name in self.class_names]
        titles = [f"{names[self.labels[i]]}\n→ {names[self.guess[i]]} {self.confidence[i]:.0%}" for i in wrong.tolist()]
        return draw_images(data.stored(self.split, wrong)[0].permute(0, 2, 3, 1).numpy() / 255, titles, title=title)

    def write_per_class(self, path: Path) -> None:
        """Write a row for each class that has images: its metrics, and the class it is most often mistaken for."""
        precision, recall, _, counts = self.scores
        times, others = (values.tolist() for values in self.mistaken.max(dim=1))
        top5 = ["acc5"] if measures_top5(len(self.class_names)) else []
        rows: list[list[Any]] = [["class", "images", "acc", *top5, "precision", "mostly_taken_for", "times"]]
        for index in counts.nonzero()[0].tolist():
            acc5 = [self.in_top5[self.labels == index].double().mean().item() for _ in top5]
            share = "" if np.isnan(precision[index]) else precision[index]
            other = self.class_names[others[index]] if times[index] else ""
            rows.append([self.class_names[index], counts[index], recall[index], *acc5, share, other, times[index]])
        write_csv(path, rows)

    def files(self) -> Sequence[Any]:
        """The files of the images, or their indices in the split if they are not files."""
        return (self.data and self.data.files(self.split)) or range(len(self.labels))

    def write_predictions(self, path: Path) -> None:
        """Write a row for each image, in the split's order: its file, label and the five most probable classes."""
        names, (values, classes) = self.class_names, self.top5
        numbers = range(1, values.shape[1] + 1)
        rows = [["image", "label", *(f"{what}_{i}" for i in numbers for what in ("class", "probability"))]]
        for file, label, indices, shares in zip(
            self.files(), self.labels.tolist(), classes.tolist(), values.tolist(), strict=True
        ):
            guesses = ((names[index], f"{share:.6f}") for index, share in zip(indices, shares, strict=True))
            rows.append([file, names[label], *chain(*guesses)])
        write_csv(path, rows)


def predict_split(
    classifier: ViTClassifier, data: ImageData, split: str, tta: bool = False, embeddings: bool = False
) -> Predictions:
    """The predictions for all images of a split, in their order, with the classifier's order of classes.

    Args:
        classifier: the classifier, on the device to compute on.
        data: the images, after ``setup()``.
        split: ``train``, ``val`` or ``test``.
        tta: whether to average the probabilities of an image and its mirror image.
        embeddings: whether to keep the embeddings.

    Raises:
        InputError: if the data has a class that the classifier lacks, or a different number of channels.
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
    probabilities, labels, embedded = [], [], []
    loader = data.eval_dataloader(split)
    for images, numbers in with_bar(loader, f"Predicting {split} images", len(loader)):
        shares, features = classify_and_embed(classifier, images, tta)
        probabilities.append(shares.cpu())
        labels.append(index[numbers.cpu()])
        if embeddings:
            embedded.append(features.cpu())
    kept = torch.cat(embedded) if embeddings else None
    return Predictions(torch.cat(probabilities), torch.cat(labels), names, split, data, kept)
