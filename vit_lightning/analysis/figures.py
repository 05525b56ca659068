"""Pictures from arrays: no model, no logger, no file. ``figure.savefig(path)`` keeps one.

Colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter

TRAIN, VAL = "#0072B2", "#D55E00"  # blue, vermilion


def draw_curves(rows: Sequence[Mapping[str, float]]) -> Figure:
    """Loss, and top-1 and top-5 accuracy, of training and validation against the epoch.

    Args:
        rows: one for each epoch, with the keys ``epoch``, ``train/loss``, ``val/loss``, ``train/acc`` … as in
            ``metrics.csv``; an epoch without validation lacks the ``val/…`` keys.
    """
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
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
    return figure


def _curve(
    axes: Axes, rows: Sequence[Mapping[str, float]], key: str, color: str, style: str, label: str, percent: bool = False
) -> None:
    points = [(row["epoch"], row[key] * (100 if percent else 1)) for row in rows if key in row]
    if points:
        marker = "o" if len(points) == 1 else None  # one point makes no line
        axes.plot(*zip(*points, strict=True), style, color=color, marker=marker, label=label)


def draw_patches(image: np.ndarray, patch_size: int, title: str) -> Figure:
    """An image beside the patches that the network sees, in their places.

    Args:
        image: (S, S, C) of floats in [0, 1]; C is 1 or 3.
        patch_size: P, a divisor of S.
        title: the image's class.
    """
    S, _, C = image.shape
    n = S // patch_size
    figure = Figure(figsize=(8.4, 4.6), dpi=120, layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12))
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
    return figure


def draw_benchmark(report: Mapping[str, Any]) -> Figure:
    """Speeds as bars, median with least and greatest, and the cost of a step against each size.

    Args:
        report: ``speeds`` (group to contestant to ``median``, ``min``, ``max`` in images/s; ours comes first) and
            ``step_seconds`` (axis to points with the axis's value and ``median`` in seconds), as in ``benchmark.json``.
    """
    figure = Figure(figsize=(12, 7), dpi=110, layout="constrained")
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
    return figure


def draw_sweep(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Validation accuracy of each setting of a sweep: its runs, their mean and standard deviation; the best on top.

    Args:
        rows: as of :func:`vit_lightning.sweep.summarise`.
    """
    figure = Figure(figsize=(8, 1.2 + 0.3 * len(rows)), dpi=100, layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        runs = [100 * accuracy for accuracy in row["accuracies"]]
        axes.plot(runs, [place] * len(runs), "o", color=TRAIN, alpha=0.5, label="a run" if place == 0 else None)
        mean, spread = 100 * row["val/acc"], 100 * (row["val/acc ±"] or 0)
        if len(runs) > 1:
            label = "mean and standard deviation" if place == 0 else None
            axes.errorbar(mean, place, xerr=spread, fmt="|", color=VAL, capsize=4, markersize=12, label=label)
    axes.set_yticks(range(len(rows)), [row["setting"] or "all runs" for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(alpha=0.3)
    axes.set(xlabel="validation top-1 (%)")
    figure.legend(loc="outside upper right", ncols=2)
    return figure


def draw_search(history: Mapping[int, float], importances: Mapping[str, float]) -> Figure:
    """Accuracy of each trial of a search with the best so far, and how much of its variance each key explains.

    Args:
        history: ``val/acc``, in [0, 1], of each trial that came to its end, by the trial's number.
        importances: by key, in [0, 1]; may be empty.
    """
    figure = Figure(figsize=(10, 3.6), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    numbers = list(history)
    values = 100 * np.array(list(history.values()))
    left.plot(numbers, values, "o", color=TRAIN, label="a trial")
    left.step(numbers, np.maximum.accumulate(values), color=VAL, where="post", label="the best so far")
    left.set(xlabel="trial", ylabel="validation top-1 (%)")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend(loc="lower right")
    names = list(importances)
    right.barh(range(len(names)), [100 * importances[name] for name in names], color=TRAIN)
    right.set_yticks(range(len(names)), names)
    right.invert_yaxis()
    right.set(xlabel="importance (%)", xlim=(0, 100))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def draw_confusion(matrix: np.ndarray, class_names: Sequence[str]) -> Figure:
    """How often each class was taken for each, as shares of its images; written into the cells where there is room.

    Args:
        matrix: (classes, classes) of counts: rows are labels, columns predictions.
        class_names: in their order.
    """
    classes = len(class_names)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    size = max(4.5, min(0.16 * classes, 32)) if classes > 25 else max(4.5, 0.48 * classes)
    figure = Figure(figsize=(size + 2, size + 1), dpi=100, layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="cividis", norm=PowerNorm(0.4, 0, 1))  # so that a few per cent can be seen
    if classes <= 200:  # more names would lie one over the other
        font = 7 if classes > 25 else 10
        axes.set_xticks(range(classes), class_names, rotation=90, fontsize=font)
        axes.set_yticks(range(classes), class_names, fontsize=font)
    axes.set(xlabel="prediction", ylabel="label")
    if classes <= 25:
        for row, column in np.argwhere(shares >= 0.005):
            share = shares[row, column]
            color = "black" if share > 0.4 else "white"
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=color)
    bar = figure.colorbar(picture, ax=axes, shrink=0.6, format=PercentFormatter(1))
    bar.set_label("of the label's images")
    return figure


def draw_per_class(class_names: Sequence[str], accuracies: np.ndarray) -> Figure:
    """Accuracy of each class as a bar, the best on top, in columns of at most 50.

    Args:
        class_names: in their order.
        accuracies: (classes,), in [0, 1].
    """
    order = np.argsort(-accuracies, kind="stable")
    columns = -(-len(order) // 50)
    rows = -(-len(order) // columns)
    figure = Figure(figsize=(5 * columns, 1 + 0.2 * rows), dpi=100, layout="constrained")
    mean = 100 * float(accuracies.mean())
    for axes, part in zip(figure.subplots(1, columns, squeeze=False)[0], np.array_split(order, columns), strict=True):
        axes.barh(range(len(part)), 100 * accuracies[part], color=TRAIN, height=0.7)
        axes.set_yticks(range(len(part)), [class_names[index] for index in part])
        line = axes.axvline(mean, color=VAL)
        axes.set(xlim=(0, 100), xlabel="top-1 accuracy (%)", ylim=(rows - 0.5, -0.5))
        axes.tick_params(axis="y", labelsize=8)
        axes.grid(axis="x", alpha=0.3)
    figure.legend([line], [f"mean {mean:.1f} %"], loc="outside upper right")
    return figure


def draw_reliability(confidence: np.ndarray, correct: np.ndarray, error: float, bins: int = 15) -> Figure:
    """Accuracy against confidence, and how many predictions stand at each confidence (Guo et al., 2017, figure 1).

    After https://arxiv.org/abs/1706.04599.

    Args:
        confidence: (n,), probability of each prediction.
        correct: (n,), bool.
        error: the expected calibration error, for the title.
        bins: intervals of equal width.
    """
    edges = np.linspace(0, 1, bins + 1)
    where = np.clip(np.digitize(confidence, edges[1:-1]), 0, bins - 1)
    counts = np.bincount(where, minlength=bins)
    share = np.bincount(where, weights=correct, minlength=bins) / np.maximum(counts, 1)
    centres, width = (edges[:-1] + edges[1:]) / 2, 1 / bins
    figure = Figure(figsize=(5, 6), dpi=100, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    above.bar(centres, share, width, color=TRAIN, edgecolor="white", label="accuracy")
    above.plot([0, 1], [0, 1], "--", color=VAL, label="as confident as right")
    above.set(ylabel="accuracy", ylim=(0, 1), xlim=(0, 1), title=f"Expected calibration error {100 * error:.1f} %")
    above.legend(loc="upper left")
    below.bar(centres, counts, width, color=TRAIN, edgecolor="white")
    below.set(xlabel="confidence", ylabel="images")
    return figure


def draw_images(images: np.ndarray, titles: Sequence[str], columns: int = 6, title: str | None = None) -> Figure:
    """Images in a grid, each under its title.

    Args:
        images: (n, S, S, C) of floats in [0, 1]; C is 1 or 3.
        titles: one for each, of one line or more.
        columns: images in a row.
        title: of them all.
    """
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    above = 0.02 + 0.11 * (1 + max(text.count("\n") for text in titles))  # room for a title, in sides of an image
    figure, axes = _canvas(columns, rows * (1 + above))
    axes.set_title(title or "", fontsize=10)
    for number, (image, text) in enumerate(zip(images, titles, strict=True)):
        row, column = divmod(number, columns)
        bottom = (row + 1) * (1 + above)
        _put(axes, image, column, bottom - 1)
        axes.text(column + 0.5, bottom - 1.02, text, ha="center", va="bottom", fontsize=9)
    return figure


def draw_attention(images: np.ndarray, maps: np.ndarray, map_names: Sequence[str], titles: Sequence[str]) -> Figure:
    """Each image in a row of its own, and beside it where attention lies, drawn over it.

    Args:
        images: (n, S, S, C) of floats in [0, 1]; C is 1 or 3.
        maps: (n, m, side, side), not negative: m maps for each image, each scaled to its own greatest value.
        map_names: m of them.
        titles: n of them.
    """
    figure, axes = _canvas(1 + len(map_names), len(images))
    for column, name in enumerate(["image", *map_names]):
        axes.text(column + 0.5, -0.04, name, ha="center", va="bottom", fontsize=9)
    for row, (image, of_image, title) in enumerate(zip(images, maps, titles, strict=True)):
        rotation = 90 if len(title) > 2 else 0  # a 6 on its side could be a 9
        place: dict[str, Any] = dict(ha="right", va="center", ma="center", fontsize=9, rotation=rotation)
        axes.text(-0.03, row + 0.5, title, parse_math=False, **place)  # a $ in a file's name is one
        _put(axes, image, 0, row)
        for column, map_ in enumerate(of_image, start=1):
            _put(axes, image, column, row)
            _put(axes, map_ / map_.max(), column, row, cmap="inferno", alpha=0.65)
    return figure


def draw_position_similarity(similarity: np.ndarray) -> Figure:
    """For each patch, in its place, how alike its position embedding is to every other's.

    Args:
        similarity: (n, n, n, n), cosines in [-1, 1].
    """
    n = len(similarity)
    cell = n + max(1, round(n / 8))
    sheet = np.full((n * cell, n * cell), np.nan)  # a gap shows nothing
    for row, column in np.ndindex(n, n):
        sheet[row * cell :, column * cell :][:n, :n] = similarity[row, column]
    figure = Figure(figsize=(6.6, 6), dpi=100, layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(sheet, cmap="cividis", vmin=-1, vmax=1, interpolation="nearest")
    ticks = [cell * number + (n - 1) / 2 for number in range(n)]
    names = [str(number) for number in range(1, n + 1)]
    axes.set_xticks(ticks, names)
    axes.set_yticks(ticks, names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="column of the patch", ylabel="row of the patch", xlim=(-1, n * cell), ylim=(n * cell, -1))
    figure.colorbar(picture, shrink=0.7, label="cosine similarity")
    return figure


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Bare axes, in sides of an image; many images in one axes are drawn several times as fast as in axes each."""
    figure = Figure(figsize=(1.75 * width + 0.2, 1.75 * height + 0.4), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set(xlim=(-0.02, width), ylim=(height + 0.02, -0.02), aspect="equal")
    return figure, axes


def _put(axes: Axes, image: np.ndarray, x: float, y: float, cmap: str = "gray", alpha: float | None = None) -> None:
    """Draw an image (S, S) or (S, S, C) of floats in [0, 1] into the square at (x, y)."""
    extent = (x + 0.02, x + 0.98, y + 0.98, y + 0.02)
    axes.imshow(image, cmap=cmap, vmin=0, vmax=1, interpolation="nearest", alpha=alpha, extent=extent, aspect="auto")
