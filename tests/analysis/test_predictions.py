"""What predictions are worth, against scikit-learn."""

import csv

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
from sklearn.metrics import confusion_matrix as sklearn_confusion

from vit_lightning.analysis.predictions import draw, measure, write_per_class, write_predictions
from vit_lightning.data.module import ImageData
from vit_lightning.data.superclasses import SUPERCLASSES, superclass_indices

NAMES = [f"class {index}" for index in range(7)]


def guesses(classes: int = 7, count: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes - 1, (count,), generator=generator)  # the last class has no image
    logits = torch.randn(count, classes, generator=generator)
    logits[torch.arange(count), labels] += 1
    return logits.softmax(dim=1), labels


def test_numbers_are_scikit_learns():
    probabilities, labels = guesses()
    report = measure(probabilities, labels, NAMES)
    p, y = probabilities.double().numpy(), labels.numpy()
    assert report["images"] == 200
    assert report["loss"] == pytest.approx(log_loss(y, p / p.sum(1, keepdims=True), labels=range(7)), rel=1e-5)
    assert report["acc"] == pytest.approx(accuracy_score(y, p.argmax(1)))
    assert report["acc5"] == pytest.approx(top_k_accuracy_score(y, p, k=5, labels=range(7)))
    assert "superclass_acc" not in report
    matrix = sklearn_confusion(y, p.argmax(1), labels=range(7))
    recall = matrix.diagonal()[:6] / matrix.sum(1)[:6]
    assert [row["acc"] for row in report["worst_classes"]] == pytest.approx(sorted(recall))
    np.fill_diagonal(matrix, 0)
    pair = report["most_confused"][0]
    assert pair["images"] == matrix.max()
    assert matrix[NAMES.index(pair["label"]), NAMES.index(pair["prediction"])] == matrix.max()


def test_calibration_error_is_the_gap_between_confidence_and_accuracy():
    """Two confidences, each in a bin of its own: 0.62 is right half of the times, 0.9 always."""
    probabilities = torch.tensor([[0.62, 0.38]] * 4 + [[0.9, 0.1]] * 6)
    labels = torch.tensor([0, 0, 1, 1] + [0] * 6)
    report = measure(probabilities, labels, ["a", "b"])
    assert report["calibration_error"] == pytest.approx(0.4 * 0.12 + 0.6 * 0.1, abs=1e-6)


def test_of_cifar100s_classes_superclasses_are_counted_too():
    names = sorted(name for group in SUPERCLASSES.values() for name in group)
    of = superclass_indices(names)
    assert sorted(of) == sorted(list(range(20)) * 5)
    assert list(SUPERCLASSES)[of[names.index("willow_tree")]] == "trees"
    labels = torch.tensor([names.index(name) for name in ("maple_tree", "bee", "bus")])
    guess = torch.tensor([names.index(name) for name in ("oak_tree", "bee", "tank")])
    probabilities = torch.nn.functional.one_hot(guess, 100).float()
    report = measure(probabilities, labels, names)
    assert report["acc"] == pytest.approx(1 / 3)
    assert report["superclass_acc"] == pytest.approx(2 / 3)
    assert superclass_indices(NAMES) is None


def test_a_classifier_that_is_never_wrong_confuses_nothing():
    report = measure(torch.eye(3), torch.arange(3), ["a", "b", "c"])
    assert report["acc"] == 1
    assert report["most_confused"] == []


def test_tables_hold_every_class_and_image(tmp_path):
    probabilities, labels = guesses()
    write_per_class(tmp_path / "classes.csv", probabilities, labels, NAMES)
    rows = list(csv.DictReader((tmp_path / "classes.csv").read_text().splitlines()))
    assert [row["class"] for row in rows] == NAMES[:6]
    assert sum(int(row["images"]) for row in rows) == 200
    guess = probabilities.argmax(1)
    for index, row in enumerate(rows):
        assert float(row["acc"]) == pytest.approx((guess[labels == index] == index).float().mean().item())
        taken = NAMES.index(row["mostly_taken_for"])
        assert int(row["times"]) == ((labels == index) & (guess == taken)).sum()

    write_predictions(tmp_path / "images.csv", probabilities, labels, NAMES)
    rows = list(csv.DictReader((tmp_path / "images.csv").read_text().splitlines()))
    assert [row["label"] for row in rows] == [NAMES[label] for label in labels]
    assert [row["class_1"] for row in rows] == [NAMES[index] for index in guess]
    assert float(rows[7]["probability_5"]) == pytest.approx(probabilities[7].sort().values[-5].item(), abs=1e-6)


def test_cifar100s_classes_are_drawn_by_superclass(folder_config):
    data = ImageData(folder_config, 8)
    data.setup()
    names = sorted(name for group in SUPERCLASSES.values() for name in group)
    labels = torch.arange(100)
    guess = labels.clone()
    guess[names.index("bee")] = names.index("bus")
    figures = draw(torch.nn.functional.one_hot(guess, 100).float(), labels, data, "train", names)
    by_class, by_superclass = (figures[name].axes[0] for name in ("confusion", "confusion_superclasses"))
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
    right = torch.nn.functional.one_hot(labels, 3).float()
    assert draw(right, labels, data, "test", data.class_names).keys() == {"confusion", "per_class", "reliability"}
    wrong = right.roll(1, dims=1)
    assert "mistakes" in draw(wrong, labels, data, "test", data.class_names)
