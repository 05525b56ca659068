"""The metrics of training, validation and testing, and the comparison of epochs."""

import functools
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from vit_lightning import register
from vit_lightning.config import TOP5_ABOVE


class ImageCount(SumMetric):
    """The number of images that the other metrics of a collection are computed from."""

    def update(self, target: Tensor) -> None:  # type: ignore[override]
        """Count a batch by its labels (B,)."""
        super().update(len(target))


@register.metric("balanced_acc")
def balanced_accuracy(classes: int) -> Metric:
    """The accuracy on the images of each class, averaged over classes."""
    return MulticlassAccuracy(classes, average="macro", validate_args=False)


@register.metric("f1")
def macro_f1(classes: int) -> Metric:
    """The mean F1 score over classes."""
    return MulticlassF1Score(classes, average="macro", validate_args=False)


def measures_top5(classes: int) -> bool:
    """Whether top-5 accuracy is measured and shown."""
    return classes > TOP5_ABOVE


def build_metrics(classes: int, more: list[str]) -> MetricCollection:
    """Build all metrics.

    Each metric is updated with those of ``preds`` (logits), ``target``, ``value`` (the loss) and ``weight`` (the number
    of images) that its ``update`` takes.

    Args:
        classes: number of classes.
        more: names of registered metrics, each constructed with the number of classes.
    """
    metrics: dict[str, Any] = {
        "loss": MeanMetric(),
        "acc": MulticlassAccuracy(classes, average="micro", validate_args=False),
    }
    if measures_top5(classes):
        metrics["acc5"] = MulticlassAccuracy(classes, top_k=5, average="micro", validate_args=False)
    metrics |= {name: register.metric[name](classes) for name in more}
    metrics["images"] = ImageCount()
    # Metrics whose states are equal after one batch, as top-1 and top-5 may be, would otherwise be merged.
    return MetricCollection(metrics, compute_groups=False)


@functools.cache
def mode_of(monitor: str) -> str:
    """Whether a metric such as ``val/loss`` should be low (``min``) or high (``max``)."""
    name = monitor.rpartition("/")[2]
    lower = name == "loss" or (name in register.metric and register.metric[name](2).higher_is_better is False)
    return "min" if lower else "max"


def quality(values: Mapping[str, float], monitor: str) -> tuple[float, float]:
    """A sort key for epochs: the monitored metric, then the loss; larger is better.

    An epoch without validation, or whose metric is NaN, is worse than all others.
    """
    value, loss = values.get(monitor, math.nan), values.get("val/loss", math.nan)
    value = -value if mode_of(monitor) == "min" else value
    return -math.inf if math.isnan(value) else value, -math.inf if math.isnan(loss) else -loss
