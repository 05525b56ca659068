"""Figures drawn from arrays, without a model, logger or file. ``figure.savefig(path)`` writes one.

Text is drawn literally, in any script. The colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

import functools
import textwrap
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, font_manager, rcParams
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text
from matplotlib.ticker import PercentFormatter

TRAIN, VAL = "#0072B2", "#D55E00"  # blue, vermilion
SPARSE = 0.01  # share of the images below which a bar of the reliability diagram is faded
SHOWN = 15  # number of best and of worst classes drawn if there are many classes
CAVEAT = "Attention shows what the network mixes, which need not be what decides the class."

# Transparent where attention is low, so that the image shows through.
OVERLAY = ListedColormap(np.c_[colormaps["inferno"](np.linspace(0, 1, 256))[:, :3], 0.85 * np.linspace(0, 1, 256)])


class TitledFigure(Figure):
    """A figure with a title that is legible at a width of 300 pixels, as in TensorBoard's overview.

    Its text is never parsed as mathematics, and is drawn in whichever installed fonts have its characters.
    """

    def __init__(self, width: float, height: float, title: str | None = None, dpi: int = 100) -> None:
        super().__init__(figsize=(width, height), dpi=dpi, layout="constrained")
        if title:
            self.suptitle(_wrapped(title, 120, 56), fontsize=_readable(self))

    def draw(self, renderer: Any) -> None:
        texts: list[Any] = self.findobj(Text)
        fonts = _fonts_for(frozenset("".join(text.get_text() for text in texts)))
        for text in texts:
            text.set(parse_math=False, fontfamily=fonts)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"Glyph .* missing from", UserWarning)  # it is drawn as a box
            super().draw(renderer)


def _readable(figure: Figure) -> float:
    """The text size, in points, that is legible when the figure is 300 pixels wide."""
    return max(10, 1.6 * figure.get_figwidth())


@functools.lru_cache
def _fonts_for(characters: frozenset[str]) -> list[str]:
    """The default font, and installed fonts that have the characters that it lacks."""
    names = list(rcParams["font.family"])
    default = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    missing = {ord(character) for character in characters if character.isprintable()} - default.get_charmap().keys()
    for entry in font_manager.fontManager.ttflist if missing else ():
        try:
            found = missing & font_manager.get_font(entry.fname).get_charmap().keys()
        except (OSError, RuntimeError):  # a bitmap font, or one that was removed
            continue
        if found and not entry.name.startswith("Last Resort"):
            names.append(entry.name)
            missing -= found
    return names


def shorten(text: str, length: int = 30) -> str:
    """Shorten text to a printable line at most ``length`` letters wide; an ellipsis replaces its middle."""
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.split()))
    kept, shown = len(text), text
    while _width(shown) > length:
        kept = min(kept, length) - 1
        shown = f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"
    return shown


def _width(text: str) -> int:
    return sum(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in text)


def _wrapped(text: str, length: int, width: int) -> str:
    """Shorten each line, and break it where it is wider than ``width`` letters."""
    lines = [shorten(line, length) for line in text.split("\n")]
    return "\n".join(part for line in lines for part in textwrap.wrap(line, max(1, width * len(line) // _width(line))))


def name_run(figure: Figure, run: str) -> Figure:
    """Add the name of a run as the last line of the figure's title."""
    figure.suptitle(f"{figure.get_suptitle()}\n{shorten(run, 56)}".strip(), fontsize=_readable(figure))
    return figure


def draw_curves(
    rows: Sequence[Mapping[str, float]], title: str = "Loss and accuracy by epoch", training: str = "training"
) -> Figure:
    """Loss, and top-1 and, if measured, top-5 accuracy, of training and validation against the epoch.

    Args:
        rows: one per epoch, with the keys ``epoch``, ``train/loss``, ``val/loss``, ``train/acc`` … as in
            ``metrics.csv``; an epoch without validation lacks the ``val/…`` keys.
        title: of the figure.
        training: label of the training curves; it can say, for example, that mixed images raise their loss.
    """
    figure = TitledFigure(6.4, 3.5, title, dpi=200)
    left, right = figure.subplots(1, 2)
    for split, color, name in (("train", TRAIN, training), ("val", VAL, "validation")):
        for axes, key, style, scale in ((left, "loss", "-", 1), (right, "acc", "-", 100), (right, "acc5", "--", 100)):
            points = [(row["epoch"], row[f"{split}/{key}"] * scale) for row in rows if f"{split}/{key}" in row]
            if points:
                marker = "o" if len(points) == 1 else None  # a single point would not be visible as a line
                label = {"loss": name, "acc5": f"{name.partition(' ')[0]}, top-5"}.get(key)
                axes.plot(*zip(*points, strict=True), style, color=color, marker=marker, label=label)
    left.set(xlabel="epoch", ylabel="loss")
    right.set(
        xlabel="epoch", ylabel=f"top-1{' and top-5' if 'train/acc5' in rows[0] else ''} accuracy (%)", ylim=(0, 102)
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return figure


def draw_patches(image: np.ndarray, patch_size: int, title: str) -> Figure:
    """An image next to the patches that the network sees, in the same layout.

    Args:
        image: (S, S, C) of floats in [0, 1]; C is 1 or 3.
        patch_size: P, a divisor of S.
        title: the image's class.
    """
    S, _, C = image.shape
    n = S // patch_size
    figure = TitledFigure(5.6, 3.5, f"{title}: {n * n} patches", dpi=180)
    figure.set_layout_engine(ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12))
    left, right = figure.subplots(1, 2)
    gap = max(1, round(patch_size / 6))
    cell = patch_size + gap
    sheet = np.ones((n * cell - gap, n * cell - gap, C))
    for row, column in np.ndindex(n, n):
        patch = image[row * patch_size :, column * patch_size :][:patch_size, :patch_size]
        sheet[row * cell :, column * cell :][:patch_size, :patch_size] = patch
    left.set_title(f"{S} × {S} pixels")
    right.set_title(f"each {patch_size} × {patch_size}")
    for axes, picture in ((left, image), (right, sheet)):
        axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_axis_off()
    return figure


def draw_confusion(matrix: np.ndarray, class_names: Sequence[str], title: str = "Confusion matrix") -> Figure:
    """How often each class was predicted as each, as shares of its images; printed in the cells if they fit.

    Args:
        matrix: (classes, classes) of counts: rows are labels, columns predictions.
        class_names: names of the classes, in this order.
        title: of the figure.
    """
    classes, few = len(class_names), len(class_names) <= 25
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    names = [shorten(name) for name in class_names] if classes <= 200 else []  # more names would overlap
    margin = 0.09 * max(map(len, names), default=0)
    side = max(3, 0.34 * classes) if few else min(0.16 * classes, 30)
    figure = TitledFigure(side + margin + 1.6, side + margin + 1, title)
    axes, font = figure.subplots(), 10 if few else 7
    picture = axes.imshow(shares, cmap="cividis", norm=PowerNorm(0.4, 0, 1))  # makes a few per cent visible
    if names:
        axes.set_xticks(range(classes), names, rotation=90, fontsize=font)
        axes.set_yticks(range(classes), names, fontsize=font)
    axes.set_xlabel("prediction", fontsize=_readable(figure))
    axes.set_ylabel("label", fontsize=_readable(figure))
    for row, column in np.argwhere(shares >= 0.005) if few else ():
        share = shares[row, column]
        color = "black" if share > 0.4 else "white"
        axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=color)
    bar = figure.colorbar(picture, ax=axes, shrink=0.6, format=PercentFormatter(1))
    bar.set_label("share of the label's images", fontsize=_readable(figure))
    return figure


def draw_per_class(class_names: Sequence[str], accuracies: np.ndarray, title: str = "Accuracy by class") -> Figure:
    """Accuracy of each class as a bar, the best on top; with many classes, only the best and worst 15.

    Args:
        class_names: names of the classes, in this order.
        accuracies: (classes,), in [0, 1].
        title: of the figure.
    """
    order = np.argsort(-accuracies, kind="stable")
    places = np.arange(len(order))
    if len(order) > 2 * SHOWN + 5:
        order = np.concatenate([order[:SHOWN], order[-SHOWN:]])
        places = np.concatenate([np.arange(SHOWN), np.arange(SHOWN) + SHOWN + 1])  # with a gap
        title = f"{title}, the best and the worst {SHOWN} of {len(accuracies)}"
    figure = TitledFigure(5, 1.6 + 0.21 * len(places), title)
    axes = figure.subplots()
    axes.barh(places, 100 * accuracies[order], color=TRAIN, height=0.7)
    axes.set_yticks(places, [shorten(class_names[index]) for index in order])
    mean = 100 * float(accuracies.mean())
    axes.axvline(mean, color=VAL, label=f"mean of all classes {mean:.1f}%")
    axes.set(xlim=(0, 100), xlabel="top-1 accuracy (%)", ylim=(places[-1] + 0.5, -0.5))
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower right")
    return figure


def draw_reliability(counts: np.ndarray, accuracies: np.ndarray, title: str = "Reliability diagram") -> Figure:
    """Accuracy against confidence, and how many predictions have each confidence (Guo et al., 2017, figure 1).

    See https://arxiv.org/abs/1706.04599.

    Args:
        counts: (bins,), number of images in each bin of confidence; bins have equal width.
        accuracies: (bins,), in [0, 1].
        title: of the figure.
    """
    width = 1 / len(counts)
    centres, few = width * (np.arange(len(counts)) + 0.5), counts < SPARSE * counts.sum()
    figure = TitledFigure(4.6, 5.4, title)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for chosen, alpha, label in (
        (~few, 1.0, "accuracy"),
        (few, 0.3, f"accuracy, fewer than {SPARSE:.0%} of the images"),
    ):
        if counts[chosen].any():
            above.bar(centres[chosen], accuracies[chosen], width, color=TRAIN, alpha=alpha, ec="white", label=label)
    above.plot([0, 1], [0, 1], "--", color=VAL, label="perfectly calibrated")
    above.set(ylabel="accuracy", ylim=(0, 1), xlim=(0, 1))
    above.legend(loc="upper left", fontsize=8)
    below.bar(centres, counts, width, color=TRAIN, edgecolor="white")
    below.set(xlabel="confidence", ylabel="images")
    return figure


def draw_images(images: np.ndarray, titles: Sequence[str], columns: int = 4, title: str | None = None) -> Figure:
    """Draw images in a grid, each below its title.

    Args:
        images: (n, S, S, C) of floats in [0, 1]; C is 1 or 3.
        titles: one per image, of one or more lines.
        columns: number of images per row.
        title: of the figure.
    """
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    above = 0.02 + 0.13 * (1 + max(text.count("\n") for text in titles))  # room for a title, in sides of an image
    figure, axes = _canvas(columns, rows * (1 + above), title)
    for number, (image, text) in enumerate(zip(images, titles, strict=True)):
        row, column = divmod(number, columns)
        bottom = (row + 1) * (1 + above)
        _put(axes, image, column, bottom - 1)
        axes.text(column + 0.5, bottom - 1.02, _wrapped(text, 22, 22), ha="center", va="bottom", fontsize=9)
    return figure


def draw_attention(
    images: Sequence[np.ndarray] | np.ndarray,
    maps: np.ndarray,
    map_names: Sequence[str],
    titles: Sequence[str],
    title: str | None = "Attention to each patch",
) -> Figure:
    """Draw each image in its own row, next to copies overlaid with the smoothed attention to its patches.

    Args:
        images: n images (S, S, C), of any S, of floats in [0, 1]; C is 1 or 3.
        maps: (n, m, side, side), non-negative: m maps per image, each scaled to its own maximum.
        map_names: the names of the m maps.
        titles: the titles of the n images.
        title: of the figure.
    """
    figure, axes = _canvas(1 + len(map_names), len(images), title)
    figure.set_figwidth(figure.get_figwidth() + 1.6)  # for titles and the colour scale
    size = _readable(figure)
    for column, name in enumerate(["image", *map_names]):
        axes.text(column + 0.5, -0.04, shorten(name), ha="center", va="bottom", fontsize=size)
    for row, (image, of_image, text) in enumerate(zip(images, maps, titles, strict=True)):
        rotation = 90 if len(text) > 2 else 0  # short titles stay upright: a rotated 6 could be read as a 9
        lines = _wrapped(text, 22, 11)
        axes.text(-0.03, row + 0.5, lines, ha="right", va="center", ma="center", fontsize=size, rotation=rotation)
        for column in range(1 + len(map_names)):
            _put(axes, image, column, row, interpolation="bicubic")
        for column, map_ in enumerate(of_image, start=1):
            overlay = _put(axes, map_ / max(map_.max(), 1e-12), column, row, OVERLAY, interpolation="bicubic")
    scale = figure.colorbar(overlay, ax=axes, fraction=0.1 / (1 + len(map_names)), aspect=30)
    scale.set_label("attention / maximum of the map", fontsize=size)
    figure.supxlabel(_wrapped(CAVEAT, 99, 46), fontsize=size)
    return figure


def draw_position_similarity(similarity: np.ndarray, title: str = "Similarity of position embeddings") -> Figure:
    """Draw, at the place of each patch, how similar its position embedding is to every other's.

    Args:
        similarity: (n, n, n, n), cosines in [-1, 1].
        title: of the figure.
    """
    n = len(similarity)
    cell = n + max(1, round(n / 8))
    sheet = np.full((n * cell, n * cell), np.nan)  # NaN leaves the gaps blank
    for row, column in np.ndindex(n, n):
        sheet[row * cell :, column * cell :][:n, :n] = similarity[row, column]
    figure = TitledFigure(5.2, 4.8, title)
    axes = figure.subplots()
    picture = axes.imshow(sheet, cmap="cividis", vmin=-1, vmax=1, interpolation="nearest")
    for axis in (axes.xaxis, axes.yaxis):
        shown = range(0, n, -(-n // 12))
        axis.set_ticks([cell * number + (n - 1) / 2 for number in shown], [str(number + 1) for number in shown])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="column of the patch", ylabel="row of the patch", xlim=(-1, n * cell), ylim=(n * cell, -1))
    figure.colorbar(picture, shrink=0.7, label="cosine similarity")
    return figure


def _canvas(width: float, height: float, title: str | None) -> tuple[Figure, Axes]:
    """Bare axes, in units of an image's side: drawing many images is several times as fast in one axes as in many."""
    figure = TitledFigure(1.35 * width + 0.3, 1.35 * height + 0.7, title, dpi=140)
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set(xlim=(-0.02, width), ylim=(height + 0.02, -0.02), aspect="equal")
    return figure, axes


def _put(axes: Axes, image: np.ndarray, x: float, y: float, cmap: str | Colormap = "gray", **kwargs: Any) -> AxesImage:
    """Draw an image (S, S) or (S, S, C) of floats in [0, 1] into the square at (x, y)."""
    style = {"interpolation": "nearest", "vmin": 0, "vmax": 1, **kwargs}
    return axes.imshow(image, cmap=cmap, extent=(x + 0.02, x + 0.98, y + 0.98, y + 0.02), **style)
