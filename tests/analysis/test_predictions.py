"""Measures and tables of predictions against scikit-learn and torchmetrics, and their figures."""

import csv

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    precision_score,
    top_k_accuracy_score,
)
from torchmetrics.functional.classification import multiclass_calibration_error

from vit_lightning.analysis.predictions import FIGURES, Predictions
from vit_lightning.data.module import ImageData
from vit_lightning.data.superclasses import SUPERCLASSES, superclass_indices

NAMES = [f"class {index}" for index in range(7)]


def guesses(names: list[str] = NAMES, count: int = 200) -> Predictions:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(len(names) - 1, (count,), generator=generator)  # the last class has no image
    logits = torch.randn(count, len(names), generator=generator)
    logits[torch.arange(count), labels] += 1
    return Predictions(logits.softmax(dim=1), labels, names)


def certain(guess: torch.Tensor, labels: torch.Tensor, names: list[str], *images) -> Predictions:
    """Each image is classified with a probability of 1."""
    return Predictions(torch.nn.functional.one_hot(guess, len(names)).float(), labels, names, *images)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_numbers_are_scikit_learns():
    names = [f"class {index}" for index in range(11)]
    predictions = guesses(names)
    report = predictions.measure()
    p, y = predictions.probabilities.double().numpy(), predictions.labels.numpy()
    assert (report["images"], report["classes"]) == (200, 11)
    assert report["loss"] == pytest.approx(log_loss(y, p / p.sum(1, keepdims=True), labels=range(11)), rel=1e-5)
    assert report["acc"] == pytest.approx(accuracy_score(y, p.argmax(1)))
    assert report["acc5"] == pytest.approx(top_k_accuracy_score(y, p, k=5, labels=range(11)))
    assert report["balanced_acc"] == pytest.approx(balanced_accuracy_score(y, p.argmax(1)))
    assert report["macro_f1"] == pytest.approx(f1_score(y, p.argmax(1), average="macro"))
    assert not {"superclass_acc", "acc5"} & guesses().measure().keys()  # seven classes that are not CIFAR-100's
    matrix = confusion_matrix(y, p.argmax(1), labels=range(11))
    np.testing.assert_array_equal(predictions.confusion, matrix)
    recall = matrix.diagonal()[:10] / matrix.sum(1)[:10]
    assert [row["acc"] for row in report["worst_classes"]] == pytest.approx(sorted(recall))
    np.fill_diagonal(matrix, 0)
    pair = report["most_confused"][0]
    assert pair["images"] == matrix.max()
    assert matrix[names.index(pair["label"]), names.index(pair["prediction"])] == matrix.max()


def test_a_thousand_classes_are_counted_under_deterministic_algorithms():
    """A matrix for each image would take 12 GB."""
    predictions = guesses([f"class {index}" for index in range(1000)], count=3000)
    torch.use_deterministic_algorithms(True)
    try:
        report = predictions.measure()
    finally:
        torch.use_deterministic_algorithms(False)
    guess = predictions.probabilities.argmax(1)
    expected = confusion_matrix(predictions.labels, guess, labels=range(1000))
    np.testing.assert_array_equal(predictions.confusion, expected)
    assert report["acc"] == pytest.approx(expected.trace() / 3000)


def test_the_calibration_error_is_torchmetrics():
    predictions = guesses(count=500)
    expected = multiclass_calibration_error(predictions.probabilities, predictions.labels, 7, n_bins=15).item()
    assert predictions.measure()["calibration_error"] == pytest.approx(expected, abs=1e-6)
    counts, accuracies, error = predictions.calibration
    assert counts.sum() == 500
    assert (counts * accuracies).sum() == pytest.approx(500 * predictions.measure()["acc"])
    assert error == pytest.approx(expected, abs=1e-6)


def test_calibration_error_is_the_gap_between_confidence_and_accuracy():
    """Two confidences, each in a bin of its own: 0.62 is right half of the time, 0.9 always."""
    probabilities = torch.tensor([[0.62, 0.38]] * 4 + [[0.9, 0.1]] * 6)
    labels = torch.tensor([0, 0, 1, 1] + [0] * 6)
    report = Predictions(probabilities, labels, ["a", "b"]).measure()
    assert report["calibration_error"] == pytest.approx(0.4 * 0.12 + 0.6 * 0.1, abs=1e-6)


def test_cifar100s_superclasses_are_counted_too():
    names = sorted(name for group in SUPERCLASSES.values() for name in group)
    of = superclass_indices(names)
    assert sorted(of) == sorted(list(range(20)) * 5)
    assert list(SUPERCLASSES)[of[names.index("willow_tree")]] == "trees"
    labels = torch.tensor([names.index(name) for name in ("maple_tree", "bee", "bus")])
    guess = torch.tensor([names.index(name) for name in ("oak_tree", "bee", "tank")])
    report = certain(guess, labels, names).measure()
    assert report["acc"] == pytest.approx(1 / 3)
    assert report["superclass_acc"] == pytest.approx(2 / 3)
    assert superclass_indices(NAMES) is None


def test_a_classifier_that_is_never_wrong_confuses_nothing():
    report = certain(torch.arange(3), torch.arange(3), ["a", "b", "c"]).measure()
    assert report["acc"] == report["balanced_acc"] == report["macro_f1"] == 1
    assert report["most_confused"] == []


def test_tables_have_every_class_and_image(tmp_path):
    predictions = guesses()
    probabilities, labels = predictions.probabilities, predictions.labels
    predictions.write_per_class(tmp_path / "classes.csv")
    rows = list(csv.DictReader((tmp_path / "classes.csv").read_text().splitlines()))
    assert [row["class"] for row in rows] == NAMES[:6]
    assert sum(int(row["images"]) for row in rows) == 200
    guess = probabilities.argmax(1)
    precision = precision_score(labels, guess, labels=range(7), average=None)
    for index, row in enumerate(rows):
        assert float(row["acc"]) == pytest.approx((guess[labels == index] == index).float().mean().item())
        assert float(row["precision"]) == pytest.approx(precision[index])
        taken = NAMES.index(row["mostly_taken_for"])
        assert int(row["times"]) == ((labels == index) & (guess == taken)).sum()

    predictions.write_predictions(tmp_path / "images.csv")
    rows = list(csv.DictReader((tmp_path / "images.csv").read_text().splitlines()))
    assert [row["label"] for row in rows] == [NAMES[label] for label in labels]
    assert [row["class_1"] for row in rows] == [NAMES[index] for index in guess]
    assert float(rows[7]["probability_5"]) == pytest.approx(probabilities[7].sort().values[-5].item(), abs=1e-6)


def test_cifar100s_classes_are_drawn_by_superclass():
    names = sorted(name for group in SUPERCLASSES.values() for name in group)
    labels = torch.arange(100)
    guess = labels.clone()
    guess[names.index("bee")] = names.index("bus")
    predictions = certain(guess, labels, names)
    by_class, by_superclass = (predictions.draw(name).axes[0] for name in ("confusion", "confusion_superclasses"))
    order = [name for group in SUPERCLASSES.values() for name in group]
    assert [label.get_text() for label in by_class.get_yticklabels()] == order
    cells = np.eye(100)
    cells[order.index("bee"), [order.index("bee"), order.index("bus")]] = 0, 1  # rows are labels
    np.testing.assert_array_equal(by_class.images[0].get_array(), cells)
    superclasses = list(SUPERCLASSES)
    assert [label.get_text() for label in by_superclass.get_xticklabels()] == superclasses
    cells = np.eye(20)
    insects, vehicles = superclasses.index("insects"), superclasses.index("vehicles 1")
    cells[insects, [insects, vehicles]] = 0.8, 0.2
    np.testing.assert_allclose(by_superclass.images[0].get_array(), cells, rtol=1e-6)


def test_mistakes_are_drawn_only_where_there_are_some(folder_config):
    data = ImageData(folder_config, 8)
    data.setup()
    labels = torch.cat([labels for _, labels in data.test_dataloader()])
    right = certain(labels, labels, data.class_names, "test", data)
    drawn = [name for name in FIGURES if right.draw(name) is not None]
    assert drawn == ["confusion", "per_class", "reliability"]
    wrong = certain((labels + 1) % 3, labels, data.class_names, "test", data)
    assert wrong.draw("mistakes") is not None


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_titles_name_the_split(split):
    predictions = certain(torch.tensor([0, 1]), torch.tensor([0, 0]), ["a", "b"], split)
    called = {"train": "2 training images", "val": "2 validation images", "test": "2 test images"}[split]
    for name in ("confusion", "per_class", "reliability"):
        assert called in predictions.draw(name).get_suptitle()


NASTY = ["$0_$50", "^", "x" * 80, "猫", r"\frac{", "$x$ $", "a\nb", "\udcff\x00"]  # the last is no valid Unicode


def test_class_names_are_drawn_as_text(tmp_path, folder_config):
    """Names that matplotlib would parse as formulas, cannot draw, or that leave no room for axes."""
    data = ImageData(folder_config, 8)
    data.setup()
    labels = torch.arange(16) % 8
    predictions = certain((labels + 1) % 8, labels, NASTY, "train", data)
    for name in set(FIGURES) - {"confusion_superclasses"}:
        figure = predictions.draw(name)
        figure.savefig(tmp_path / "figure.png")  # any warning fails the test
        assert all(axes.get_position().width > 0.2 for axes in figure.axes[:1])
    figure = predictions.draw("confusion")
    figure.savefig(tmp_path / "figure.png")
    for tick in figure.axes[0].get_xticklabels():
        shown, is_math = tick._preprocess_math(tick.get_text())
        assert not is_math
        assert len(shown) <= 30
        assert shown in ["x" * 15 + "…" + "x" * 14, "a b", "\ufffd\ufffd"] or shown in NASTY
