"""Figures from arrays: no model, logger or file. ``figure.savefig(path)`` writes one.

Text that comes from outside (class names, file names, settings) is drawn literally: shortened, and never parsed as
mathematics. The colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, font_manager, rcParams
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter

TRAIN, VAL = "#0072B2", "#D55E00"  # blue, vermilion
FEW = 10  # images below which a bar of the reliability diagram is faded

# Scripts that the default font lacks are drawn with the first of these fonts that is installed.
FALLBACKS = ("Noto Sans CJK JP", "Noto Sans CJK SC", "Hiragino Sans", "PingFang SC", "Microsoft YaHei", "Unifont")
rcParams["font.family"] += [name for name in FALLBACKS if name in font_manager.get_font_names()]

# Transparent where attention is low, so that the image shows through.
OVERLAY = ListedColormap(np.c_[colormaps["inferno"](np.linspace(0, 1, 256))[:, :3], 0.85 * np.linspace(0, 1, 256)])


class _Figure(Figure):
    """A figure with a title; a glyph that no installed font has is drawn as a box, without a warning for each."""

    def __init__(self, width: float, height: float, title: str | None = None, dpi: int = 100) -> None:
        super().__init__(figsize=(width, height), dpi=dpi, layout="constrained")
        if title:
            self.suptitle(_lines(title, 100), fontsize=11)

    def draw(self, renderer: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"Glyph .* missing from", UserWarning)
            super().draw(renderer)


def shorten(text: str, length: int = 30) -> str:
    """One line of at most ``length`` printable characters; what is cut off ends in an ellipsis."""
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.split()))
    return text if len(text) <= length else f"{text[: length - 1]}…"


def literal(text: str, length: int = 30) -> str:
    """The text shortened, and escaped so that matplotlib draws it as it is: a ``$`` begins no formula."""
    return shorten(text, length).replace("$", r"\$")


def _lines(text: str, length: int = 24) -> str:
    return "\n".join(literal(line, length) for line in text.split("\n"))


def draw_curves(rows: Sequence[Mapping[str, float]], title: str = "Loss and accuracy by epoch") -> Figure:
    """Loss, and top-1 and top-5 accuracy, of training and validation against the epoch.

    Args:
        rows: one for each epoch, with the keys ``epoch``, ``train/loss``, ``val/loss``, ``train/acc`` … as in
            ``metrics.csv``; an epoch without validation lacks the ``val/…`` keys.
        title: of the figure.
    """
    figure = _Figure(10, 4.3, title, dpi=120)
    left, right = figure.subplots(1, 2)
    for stage in ("train", "val"):  # mixed images and smoothed labels raise the training loss, so the legend says so
        _curve(left, rows, f"{stage}/loss", "-", "")
        _curve(right, rows, f"{stage}/acc", "-", ", top-1", 100)
        _curve(right, rows, f"{stage}/acc5", "--", ", top-5", 100)
    left.set(xlabel="epoch", ylabel="cross-entropy", title="Loss")
    right.set(xlabel="epoch", ylabel="accuracy (%)", title="Accuracy", ylim=(0, 102))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.lines:
            axes.legend()
    return figure


def _curve(axes: Axes, rows: Sequence[Mapping[str, float]], key: str, style: str, name: str, scale: int = 1) -> None:
    points = [(row["epoch"], row[key] * scale) for row in rows if key in row]
    if points:
        color, label = (TRAIN, "training (augmented)") if key.startswith("train/") else (VAL, "validation")
        marker = "o" if len(points) == 1 else None  # a single point makes no line
        axes.plot(*zip(*points, strict=True), style, color=color, marker=marker, label=label + name)


def draw_patches(image: np.ndarray, patch_size: int, title: str) -> Figure:
    """An image next to the patches that the network sees, in their places.

    Args:
        image: (S, S, C) of floats in [0, 1]; C is 1 or 3.
        patch_size: P, a divisor of S.
        title: the image's class.
    """
    S, _, C = image.shape
    n = S // patch_size
    figure = _Figure(8.4, 4.6, dpi=120)
    figure.set_layout_engine(ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12))
    left, right = figure.subplots(1, 2)
    gap = max(1, round(patch_size / 6))
    cell = patch_size + gap
    sheet = np.ones((n * cell - gap, n * cell - gap, C))
    for row, column in np.ndindex(n, n):
        patch = image[row * patch_size :, column * patch_size :][:patch_size, :patch_size]
        sheet[row * cell :, column * cell :][:patch_size, :patch_size] = patch
    left.set_title(f"{literal(title)}, {S} × {S}")
    right.set_title(f"{n * n} patches of {patch_size} × {patch_size}")
    for axes, picture in ((left, image), (right, sheet)):
        axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_axis_off()
    return figure


def draw_benchmark(report: Mapping[str, Any]) -> Figure:
    """Speeds as bars, the median with minimum and maximum, and the cost of a step against each size.

    Args:
        report: ``speeds`` (group to contestant to ``median``, ``min``, ``max`` in images/s; ours comes first) and
            ``step_seconds`` (axis to points with the axis's value and ``median`` in seconds), as in ``benchmark.json``.
    """
    figure = _Figure(12, 7.3, "Speed by implementation, and time per training step by size", dpi=110)
    groups, axes_of_growth = report["speeds"], report["step_seconds"]
    rows = GridSpec(2, 1, height_ratios=[3, 2], figure=figure)
    above, below = figure.add_subfigure(rows[0]), figure.add_subfigure(rows[1])
    for axes, (group, contestants) in zip(above.subplots(1, len(groups)), groups.items(), strict=True):
        low, median, high = np.array(
            [[speed[key] for key in ("min", "median", "max")] for speed in contestants.values()]
        ).T
        names = [name.replace(", ", ",\n") for name in contestants]
        colors = [VAL, *[TRAIN] * (len(names) - 1)]
        bars = axes.barh(names, median, xerr=[median - low, high - median], color=colors, capsize=3)
        axes.bar_label(bars, [f"{speed:,.0f}" for speed in median], padding=6)
        axes.invert_yaxis()
        axes.margins(x=0.35)
        axes.locator_params(axis="x", nbins=4)
        axes.set(title=group, xlabel="images/s")
    for axes, (axis, points) in zip(below.subplots(1, len(axes_of_growth)), axes_of_growth.items(), strict=True):
        axes.plot([point[axis] for point in points], [1000 * point["median"] for point in points], "o-", color=VAL)
        axes.set(xlabel=axis, ylabel="ms per training step", xlim=(0, None), ylim=(0, None))
        axes.get_xaxis().get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    return figure


def draw_sweep(rows: Sequence[Mapping[str, Any]], title: str = "Validation accuracy by setting") -> Figure:
    """Validation accuracy of each setting of a sweep: its runs, their mean and standard deviation; the best on top.

    A dotted line marks the mean of the setting ``base``, as in ``ablation=base``, where there is one.

    Args:
        rows: from :func:`vit_lightning.sweeps.table.summarise`.
        title: of the figure.
    """
    names = [literal(row["setting"] or "all runs", 80) for row in rows]
    figure = _Figure(7 + 0.07 * max(map(len, names)), 1.6 + 0.3 * len(rows), title)
    axes = figure.subplots()
    for place, row in enumerate(rows):
        runs = [100 * accuracy for accuracy in row["accuracies"]]
        axes.plot(runs, [place] * len(runs), "o", color=TRAIN, alpha=0.5, label="run" if place == 0 else None)
        mean, spread = 100 * row["val/acc"], 100 * (row["val/acc ±"] or 0)
        if len(runs) > 1:
            axes.errorbar(mean, place, xerr=spread, fmt="|", color=VAL, capsize=4, markersize=12)
        if row["setting"].partition("=")[2] == "base":
            axes.axvline(mean, color="black", linestyle=":", linewidth=1, label="base")
    if any(len(row["accuracies"]) > 1 for row in rows):
        axes.plot([], [], "|", color=VAL, markersize=12, label="mean and standard deviation")
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(alpha=0.3)
    axes.set(xlabel="validation top-1 (%)")
    figure.legend(loc="outside lower right", ncols=3)
    return figure


def draw_confusion(matrix: np.ndarray, class_names: Sequence[str], title: str = "Confusion matrix") -> Figure:
    """How often each class was taken for each, as shares of its images; written into the cells where there is room.

    Args:
        matrix: (classes, classes) of counts: rows are labels, columns predictions.
        class_names: in their order.
        title: of the figure.
    """
    classes = len(class_names)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    size = max(4.5, min(0.16 * classes, 32)) if classes > 25 else max(4.5, 0.48 * classes)
    figure = _Figure(size + 2, size + 1.3, title)
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="cividis", norm=PowerNorm(0.4, 0, 1))  # makes a few per cent visible
    if classes <= 200:  # more names would overlap
        font = 7 if classes > 25 else 10
        names = [literal(name) for name in class_names]
        axes.set_xticks(range(classes), names, rotation=90, fontsize=font)
        axes.set_yticks(range(classes), names, fontsize=font)
    axes.set(xlabel="prediction", ylabel="label")
    if classes <= 25:
        for row, column in np.argwhere(shares >= 0.005):
            share = shares[row, column]
            color = "black" if share > 0.4 else "white"
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=color)
    bar = figure.colorbar(picture, ax=axes, shrink=0.6, format=PercentFormatter(1))
    bar.set_label("share of the label's images")
    return figure


def draw_per_class(class_names: Sequence[str], accuracies: np.ndarray, title: str = "Accuracy by class") -> Figure:
    """Accuracy of each class as a bar, the best on top, in columns of at most 50.

    Args:
        class_names: in their order.
        accuracies: (classes,), in [0, 1].
        title: of the figure.
    """
    order = np.argsort(-accuracies, kind="stable")
    columns = -(-len(order) // 50)
    rows = -(-len(order) // columns)
    figure = _Figure(5 * columns, 1.4 + 0.2 * rows, title)
    mean = 100 * float(accuracies.mean())
    for axes, part in zip(figure.subplots(1, columns, squeeze=False)[0], np.array_split(order, columns), strict=True):
        axes.barh(range(len(part)), 100 * accuracies[part], color=TRAIN, height=0.7)
        axes.set_yticks(range(len(part)), [literal(class_names[index]) for index in part])
        line = axes.axvline(mean, color=VAL)
        axes.set(xlim=(0, 100), xlabel="top-1 accuracy (%)", ylim=(rows - 0.5, -0.5))
        axes.tick_params(axis="y", labelsize=8)
        axes.grid(axis="x", alpha=0.3)
    figure.legend([line], [f"mean {mean:.1f} %"], loc="outside lower right")
    return figure


def draw_reliability(counts: np.ndarray, accuracies: np.ndarray, title: str = "Reliability diagram") -> Figure:
    """Accuracy against confidence, and how many predictions have each confidence (Guo et al., 2017, figure 1).

    After https://arxiv.org/abs/1706.04599.

    Args:
        counts: (bins,), images in each of the intervals of equal width that divide confidence.
        accuracies: (bins,), in [0, 1].
        title: of the figure.
    """
    width = 1 / len(counts)
    centres, few = width * (np.arange(len(counts)) + 0.5), counts < FEW
    figure = _Figure(5, 6.3, title)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for chosen, alpha, label in ((~few, 1.0, "accuracy"), (few, 0.3, f"accuracy, fewer than {FEW} images")):
        if counts[chosen].any():
            above.bar(centres[chosen], accuracies[chosen], width, color=TRAIN, alpha=alpha, ec="white", label=label)
    above.plot([0, 1], [0, 1], "--", color=VAL, label="perfectly calibrated")
    above.set(ylabel="accuracy", ylim=(0, 1), xlim=(0, 1))
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
        title: of the figure.
    """
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    above = 0.02 + 0.11 * (1 + max(text.count("\n") for text in titles))  # room for a title, in sides of an image
    figure, axes = _canvas(columns, rows * (1 + above), title)
    for number, (image, text) in enumerate(zip(images, titles, strict=True)):
        row, column = divmod(number, columns)
        bottom = (row + 1) * (1 + above)
        _put(axes, image, column, bottom - 1)
        axes.text(column + 0.5, bottom - 1.02, _lines(text), ha="center", va="bottom", fontsize=9)
    return figure


def draw_attention(
    images: np.ndarray,
    maps: np.ndarray,
    map_names: Sequence[str],
    titles: Sequence[str],
    title: str | None = "Attention to each patch",
) -> Figure:
    """Each image in a row of its own, and next to it the attention to its patches, drawn over it.

    Args:
        images: (n, S, S, C) of floats in [0, 1]; C is 1 or 3.
        maps: (n, m, side, side), not negative: m maps for each image, each scaled to its own maximum.
        map_names: m of them.
        titles: n of them.
        title: of the figure.
    """
    figure, axes = _canvas(1 + len(map_names), len(images), title)
    for column, name in enumerate(["image", *map_names]):
        axes.text(column + 0.5, -0.04, literal(name), ha="center", va="bottom", fontsize=9)
    for row, (image, of_image, text) in enumerate(zip(images, maps, titles, strict=True)):
        rotation = 90 if len(text) > 2 else 0  # a 6 on its side could be a 9
        place: dict[str, Any] = dict(ha="right", va="center", ma="center", fontsize=9, rotation=rotation)
        axes.text(-0.03, row + 0.5, _lines(text), **place)
        _put(axes, image, 0, row)
        for column, map_ in enumerate(of_image, start=1):
            _put(axes, image, column, row)
            overlay = _put(axes, map_ / max(map_.max(), 1e-12), column, row, OVERLAY, interpolation="bilinear")
    scale = figure.colorbar(overlay, ax=axes, fraction=0.1 / (1 + len(map_names)), aspect=30)
    scale.set_label("attention / maximum of the map")
    return figure


def draw_position_similarity(similarity: np.ndarray, title: str = "Similarity of position embeddings") -> Figure:
    """For each patch, in its place, how similar its position embedding is to every other's.

    Args:
        similarity: (n, n, n, n), cosines in [-1, 1].
        title: of the figure.
    """
    n = len(similarity)
    cell = n + max(1, round(n / 8))
    sheet = np.full((n * cell, n * cell), np.nan)  # NaN leaves the gaps blank
    for row, column in np.ndindex(n, n):
        sheet[row * cell :, column * cell :][:n, :n] = similarity[row, column]
    figure = _Figure(6.6, 6, title)
    axes = figure.subplots()
    picture = axes.imshow(sheet, cmap="cividis", vmin=-1, vmax=1, interpolation="nearest")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([cell * number + (n - 1) / 2 for number in range(n)], [*map(str, range(1, n + 1))])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="column of the patch", ylabel="row of the patch", xlim=(-1, n * cell), ylim=(n * cell, -1))
    figure.colorbar(picture, shrink=0.7, label="cosine similarity")
    return figure


def _canvas(width: float, height: float, title: str | None) -> tuple[Figure, Axes]:
    """Bare axes, in sides of an image: many images in one axes are drawn several times as fast as in axes each."""
    figure = _Figure(1.75 * width + 0.2, 1.75 * height + 0.5, title)
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set(xlim=(-0.02, width), ylim=(height + 0.02, -0.02), aspect="equal")
    return figure, axes


def _put(axes: Axes, image: np.ndarray, x: float, y: float, cmap: str | Colormap = "gray", **kwargs: Any) -> AxesImage:
    """Draw an image (S, S) or (S, S, C) of floats in [0, 1] into the square at (x, y)."""
    style = {"interpolation": "nearest", "vmin": 0, "vmax": 1, "aspect": "auto", **kwargs}
    return axes.imshow(image, cmap=cmap, extent=(x + 0.02, x + 0.98, y + 0.98, y + 0.02), **style)
