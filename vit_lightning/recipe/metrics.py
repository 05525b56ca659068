"""What is measured in training, validation and testing."""

from typing import Any

from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from vit_lightning import register


class ImageCount(SumMetric):
    """The number of images that the other metrics of a collection are computed from."""

    def update(self, target: Tensor) -> None:  # type: ignore[override]
        """Count a batch by its labels (B,)."""
        super().update(len(target))


@register.metric("balanced_acc")
def balanced_accuracy(classes: int) -> Metric:
    """The mean over classes of the accuracy on their images."""
    return MulticlassAccuracy(classes, average="macro", validate_args=False)


@register.metric("f1")
def macro_f1(classes: int) -> Metric:
    """The mean F1 score over classes."""
    return MulticlassF1Score(classes, average="macro", validate_args=False)


def build_metrics(classes: int, more: list[str]) -> MetricCollection:
    """Everything that is measured.

    A batch updates a metric with those of ``preds`` (logits), ``target``, ``value`` (the loss) and ``weight`` (the
    number of images) that its ``update`` takes.

    Args:
        classes: number of classes.
        more: names of registered metrics, each built from the number of classes.
    """
    metrics: dict[str, Any] = {
        "loss": MeanMetric(),
        "acc": MulticlassAccuracy(classes, average="micro", validate_args=False),
        # With fewer than five classes, any five guesses include the label.
        "acc5": MulticlassAccuracy(classes, top_k=min(5, classes), average="micro", validate_args=False),
        **{name: register.metric[name](classes) for name in more},
        "images": ImageCount(),
    }
    # Metrics whose states are equal after one batch, as top-1 and top-5 may be, would otherwise be merged.
    return MetricCollection(metrics, compute_groups=False)
