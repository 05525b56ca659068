"""Pictures from arrays, as PNG files: no model, no logger.

Colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.layout_engine import ConstrainedLayoutEngine

TRAIN, VAL = "#0072B2", "#D55E00"  # blue, vermilion


def draw_curves(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Loss, and top-1 and top-5 accuracy, of training and validation against the epoch.

    Args:
        rows: one for each epoch, with the keys ``epoch``, ``train/loss``, ``val/loss``, ``train/acc`` … as in
            ``metrics.csv``; an epoch without validation lacks the ``val/…`` keys.
        path: the PNG file to write.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _curve(left, rows, "train/loss", TRAIN, "-", "training")
    _curve(left, rows, "val/loss", VAL, "-", "validation")
    left.set(xlabel="epoch", ylabel="cross-entropy", title="Loss")
    for metric, style, name in (("acc", "-", "top-1"), ("acc5", "--", "top-5")):
        _curve(right, rows, f"train/{metric}", TRAIN, style, f"training {name}", percent=True)
        _curve(right, rows, f"val/{metric}", VAL, style, f"validation {name}", percent=True)
    right.set(xlabel="epoch", ylabel="accuracy (%)", title="Accuracy", ylim=(0, 102))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=120)


def _curve(
    axes: Axes, rows: Sequence[Mapping[str, float]], key: str, color: str, style: str, label: str, percent: bool = False
) -> None:
    points = [(row["epoch"], row[key] * (100 if percent else 1)) for row in rows if key in row]
    if points:
        marker = "o" if len(points) == 1 else None  # one point makes no line
        axes.plot(*zip(*points, strict=True), style, color=color, marker=marker, label=label)


def draw_patches(image: np.ndarray, patch_size: int, title: str, path: Path) -> None:
    """An image beside the patches that the network sees, in their places.

    Args:
        image: (S, S, C) of floats in [0, 1]; C is 1 or 3.
        patch_size: P, a divisor of S.
        title: the image's class.
        path: the PNG file to write.
    """
    S, _, C = image.shape
    n = S // patch_size
    figure = Figure(figsize=(8.4, 4.6), layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12))
    left, right = figure.subplots(1, 2)
    gap = max(1, round(patch_size / 6))
    cell = patch_size + gap
    sheet = np.ones((n * cell - gap, n * cell - gap, C))
    for row in range(n):
        for column in range(n):
            patch = image[row * patch_size :, column * patch_size :][:patch_size, :patch_size]
            sheet[row * cell :, column * cell :][:patch_size, :patch_size] = patch
    left.set_title(f"{title}, {S} × {S}")
    right.set_title(f"{n * n} patches of {patch_size} × {patch_size}")
    for axes, picture in ((left, image), (right, sheet)):
        axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_axis_off()
    figure.savefig(path, dpi=120)


def draw_benchmark(report: Mapping[str, Any], path: Path) -> None:
    """Speeds as bars, median with least and greatest, and the cost of a step against each size.

    Args:
        report: ``speeds`` (group to contestant to ``median``, ``min``, ``max`` in images/s; ours comes first) and
            ``step_seconds`` (axis to points with the axis's value and ``median`` in seconds), as in ``benchmark.json``.
        path: the PNG file to write.
    """
    figure = Figure(figsize=(12, 7), layout="constrained")
    groups, axes_of_growth = report["speeds"], report["step_seconds"]
    rows = GridSpec(2, 1, height_ratios=[3, 2], figure=figure)
    above, below = figure.add_subfigure(rows[0]), figure.add_subfigure(rows[1])
    for axes, (group, contestants) in zip(above.subplots(1, len(groups)), groups.items(), strict=True):
        medians = [speed["median"] for speed in contestants.values()]
        below_median = [speed["median"] - speed["min"] for speed in contestants.values()]
        above_median = [speed["max"] - speed["median"] for speed in contestants.values()]
        names = [name.replace(", ", ",\n") for name in contestants]
        colors = [VAL, *[TRAIN] * (len(names) - 1)]
        bars = axes.barh(names, medians, xerr=[below_median, above_median], color=colors, capsize=3)
        axes.bar_label(bars, [f"{median:,.0f}" for median in medians], padding=6)
        axes.invert_yaxis()
        axes.margins(x=0.35)
        axes.locator_params(axis="x", nbins=4)
        axes.set(title=group, xlabel="images/s")
    for axes, (axis, points) in zip(below.subplots(1, len(axes_of_growth)), axes_of_growth.items(), strict=True):
        axes.plot([point[axis] for point in points], [1000 * point["median"] for point in points], "o-", color=VAL)
        axes.set(xlabel=axis, ylabel="ms a training step", xlim=(0, None), ylim=(0, None))
        axes.get_xaxis().get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
