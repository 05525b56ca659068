"""Metrics against scikit-learn, and which epoch is the best."""

import math

import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, top_k_accuracy_score
from torchmetrics.classification import MulticlassCalibrationError, MulticlassCohenKappa

from vit_lightning import register
from vit_lightning.recipe.metrics import build_metrics, mode_of, quality


@pytest.mark.parametrize("classes", [3, 11])
def test_metrics_of_unequal_classes_are_scikit_learns(classes):
    generator = torch.Generator().manual_seed(classes)
    labels = torch.arange(classes).repeat_interleave(torch.arange(1, 4 * classes, 4))
    logits = torch.randn(len(labels), classes, generator=generator)
    logits[torch.arange(len(labels)), labels] += 1
    metrics = build_metrics(classes, ["balanced_acc", "f1"])
    for part in (slice(0, 10), slice(10, None)):
        n = len(labels[part])
        metrics.update(preds=logits[part], target=labels[part], value=torch.tensor(float(n)), weight=n)
    ours = {name: value.item() for name, value in metrics.compute().items()}
    guesses, n = logits.argmax(1), len(labels)
    expected = {
        "acc": accuracy_score(labels, guesses),
        "balanced_acc": balanced_accuracy_score(labels, guesses),
        "f1": f1_score(labels, guesses, average="macro"),
        "loss": (10**2 + (n - 10) ** 2) / n,
        "images": n,
    }
    if classes > 10:
        expected["acc5"] = top_k_accuracy_score(labels, logits, k=5)
    assert ours == pytest.approx(expected)
    assert ours["balanced_acc"] != pytest.approx(ours["acc"], abs=1e-3)


def test_torchmetrics_say_whether_a_registered_metric_is_better_when_lower(registries):
    register.metric("calibration")(lambda classes: MulticlassCalibrationError(classes))
    register.metric("agreement")(lambda classes: MulticlassCohenKappa(classes))
    names = ("val/loss", "val/acc", "val/acc5", "val/f1", "val/balanced_acc", "val/calibration", "val/agreement")
    assert [name for name in names if mode_of(name) == "min"] == ["val/loss", "val/calibration"]


@pytest.mark.parametrize(
    ("monitor", "worse", "better"),
    [
        ("val/acc", {"val/acc": 0.4, "val/loss": 0.1}, {"val/acc": 0.5, "val/loss": 0.9}),
        ("val/f1", {"val/f1": 0.4, "val/acc": 0.9, "val/loss": 1}, {"val/f1": 0.5, "val/acc": 0.1, "val/loss": 1}),
        ("val/f1", {"val/f1": 0.5, "val/loss": 0.9}, {"val/f1": 0.5, "val/loss": 0.8}),
        ("val/loss", {"val/acc": 0.9, "val/loss": 0.9}, {"val/acc": 0.1, "val/loss": 0.8}),
        ("val/acc", {"train/acc": 1.0}, {"val/acc": 0.0, "val/loss": 9.0}),
        ("val/loss", {"val/loss": math.nan}, {"val/loss": 9.0}),
        ("val/f1", {"val/f1": math.nan, "val/loss": 0.1}, {"val/f1": -0.2, "val/loss": 0.2}),
    ],
)
def test_the_better_epoch_has_the_better_monitored_metric_then_the_lower_loss(monitor, worse, better):
    assert quality(worse, monitor) < quality(better, monitor)
