"""The figures: what their files show."""

import math
import warnings

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image

from vit_lightning.analysis.figures import (
    draw_attention,
    draw_confusion,
    draw_curves,
    draw_images,
    draw_patches,
    draw_per_class,
    draw_position_similarity,
    draw_reliability,
    name_run,
    shorten,
)
from vit_lightning.benchmarks.benchmark import draw_benchmark
from vit_lightning.sweeps.table import draw_sweep


def rows(epochs: int, every: int = 1) -> list[dict[str, float]]:
    keys = ("train/loss", "train/acc", "train/acc5", "val/loss", "val/acc", "val/acc5")
    return [
        {"epoch": epoch, **{key: 1 / epoch for key in keys if key.startswith("train") or epoch % every == 0}}
        for epoch in range(1, epochs + 1)
    ]


def has_colour(path, rgb: tuple[int, int, int]) -> bool:
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return bool((np.abs(pixels - rgb).max(axis=-1) < 8).sum() > 50)


BLUE, VERMILION = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)


@pytest.mark.parametrize(("epochs", "every"), [(1, 1), (10, 1), (10, 3)])
def test_curves_show_training_and_validation(tmp_path, epochs, every):
    draw_curves(rows(epochs, every)).savefig(tmp_path / "curves.png")
    assert has_colour(tmp_path / "curves.png", BLUE)
    assert has_colour(tmp_path / "curves.png", VERMILION)


def test_curves_without_validation_yet(tmp_path):
    draw_curves(rows(2, every=3)).savefig(tmp_path / "curves.png")
    assert has_colour(tmp_path / "curves.png", BLUE)


def test_a_loss_that_is_not_finite_can_still_be_drawn(tmp_path):
    draw_curves([{"epoch": 1, "train/loss": 1.0}, {"epoch": 2, "train/loss": math.nan}]).savefig(
        tmp_path / "curves.png"
    )
    assert (tmp_path / "curves.png").exists()


def test_the_benchmark_shows_ours_and_the_others(tmp_path):
    def speed(median: float) -> dict[str, float]:
        return {"median": median, "min": 0.9 * median, "max": 1.1 * median}

    speeds = {"training": {"ours": speed(200.0), "theirs": speed(100.0)}, "inference": {"ours": speed(700.0)}}
    report = {
        "speeds": speeds,
        "step_seconds": {axis: [{axis: n, "median": 0.1 * n} for n in (1, 2)] for axis in ("layers", "tokens")},
    }
    draw_benchmark(report).savefig(tmp_path / "benchmark.png")
    assert has_colour(tmp_path / "benchmark.png", BLUE)
    assert has_colour(tmp_path / "benchmark.png", VERMILION)


@pytest.mark.parametrize(("classes", "named"), [(20, 20), (100, 100), (1000, 0)])
def test_a_confusion_matrix_stays_a_picture_however_many_classes(classes, named):
    figure = draw_confusion(np.eye(classes), [f"class {index}" for index in range(classes)])
    assert max(figure.get_size_inches()) <= 34
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert sum(label.startswith("class") for label in labels) == named


@pytest.mark.parametrize("channels", [1, 3])
def test_patches_keep_every_colour(tmp_path, channels):
    colours = [0.0, 0.25, 0.5, 0.75]
    image = np.zeros((8, 8, channels))
    for index, value in enumerate(colours):
        image[index // 2 * 4 :, index % 2 * 4 :] = value
    draw_patches(image, 4, "checkers").savefig(tmp_path / "patches.png")
    for value in colours:
        assert has_colour(tmp_path / "patches.png", (round(255 * value),) * 3)


def test_attention_is_drawn_smoothly_where_it_is_high(tmp_path):
    """A white image stays white where attention is low, and fades into a colour around its maximum."""
    maps = np.zeros((1, 1, 8, 8))
    maps[0, 0, 4, 4] = 0.3
    figure = draw_attention(np.ones((1, 64, 64, 1)), maps, ["head 1"], ["7"])
    figure.savefig(tmp_path / "attention.png")
    picture = np.asarray(Image.open(tmp_path / "attention.png").convert("RGB")).astype(int)
    box = figure.axes[0].transData.transform([(1.1, 0.9), (1.9, 0.1)])
    (left, bottom), (right, top) = box.astype(int)
    square = picture[-top:-bottom, left:right]
    assert (square[:20, :20] > 240).all()
    assert len(np.unique(square.reshape(-1, 3), axis=0)) > 50
    assert len(figure.axes) == 2  # the map and its colour scale


def test_attention_is_drawn_over_pictures_of_any_size():
    pictures = [np.zeros((32, 32, 1)), np.zeros((256, 256, 3))]
    figure = draw_attention(pictures, np.ones((2, 1, 4, 4)), ["rollout"], ["a", "b"])
    shown = figure.axes[0].images
    assert [image.get_array().shape[0] for image in shown] == [32, 32, 4, 256, 256, 4]
    assert {image.get_interpolation() for image in shown} == {"bicubic"}
    assert "need not be what decides" in figure.get_supxlabel().replace("\n", " ")
    figure.draw_without_rendering()
    boxes = [image.get_window_extent() for image in shown]
    assert all(box.width == pytest.approx(box.height, abs=1) for box in boxes)  # not stretched


def test_bars_of_few_images_are_faded():
    counts = np.array([3, 400, 0])
    figure = draw_reliability(counts, np.array([0.5, 0.4, 0.0]), "Reliability")
    faded = {round(bar.get_x(), 2): bar.get_alpha() for bar in figure.axes[0].patches}
    assert faded[0.0] < 0.5
    assert faded[0.33] == 1
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert "accuracy, fewer than 1% of the images" in labels


def test_every_figure_has_a_title():
    image, similarity = np.ones((1, 8, 8, 1)), np.ones((2, 2, 2, 2))
    row = {"setting": "a=1", "monitor": "val/acc", "values": [0.5], "val/acc": 0.5, "val/acc ±": None}
    figures = {
        "Loss": draw_curves(rows(2)),
        "Validation": draw_sweep([row]),
        "Attention": draw_attention(image, np.ones((1, 1, 2, 2)), ["head 1"], ["7"]),
        "Similarity": draw_position_similarity(similarity),
        "own": draw_curves(rows(2), title="own"),
        "images": draw_images(image, ["7"], title="images"),
    }
    for title, figure in figures.items():
        assert figure.get_suptitle().startswith(title)


def test_the_curves_say_what_raises_the_training_loss():
    figure = draw_curves(rows(2), training="training (mixed images)")
    [legend] = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["training (mixed images)", "validation", "training, top-5", "validation, top-5"]


@pytest.mark.parametrize("width", [4, 8, 16])
def test_titles_are_readable_and_whole_in_a_thumbnail(width):
    """At 300 pixels of width, letters are at least 6 pixels high, and the title does not leave the figure."""
    classes = {4: 2, 8: 16, 16: 90}[width]
    figure = draw_confusion(np.eye(classes), ["a"] * classes, "Confusion matrix, 10,000 validation images")
    name_run(figure, "experiment=fast model.layers=12 optim.lr=0.0003 (outputs/2026-11-27/13-05-22)")
    figure.draw_without_rendering()
    title = figure.texts[0]
    assert len(title.get_text().split("\n")) == 2
    assert title.get_fontsize() / 72 * 300 / figure.get_figwidth() >= 6
    box, whole = title.get_window_extent(), figure.bbox
    assert box.x0 >= whole.x0
    assert box.x1 <= whole.x1


def test_of_many_classes_the_best_and_the_worst_are_drawn():
    accuracies = np.linspace(0, 1, 100)
    figure = draw_per_class([f"class {index}" for index in range(100)], accuracies)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == [f"class {index}" for index in (*range(99, 84, -1), *range(14, -1, -1))]
    assert "15 of 100" in figure.get_suptitle().replace("\n", " ")
    assert len(draw_per_class([str(index) for index in range(30)], np.ones(30)).axes[0].patches) == 30


def test_long_text_is_shortened_in_the_middle_to_one_printable_line():
    assert shorten("a\tb\n c") == "a b c"
    assert shorten("x" * 20 + "y" * 20) == "x" * 15 + "…" + "y" * 14
    assert shorten("x" * 30) == "x" * 30
    assert shorten("\udcff") == "\ufffd"
    assert shorten("猫" * 30) == "猫" * 7 + "…" + "猫" * 7  # each is as wide as two letters


SCRIPTS = ["猫咪", "قطة", "кошка", "बिल्ली", "🐈 cat", "$0_$50", "x" * 80, "\\frac{"]


def test_names_in_any_script_leave_the_figure_as_it_is(tmp_path):
    figure = name_run(draw_confusion(np.eye(8), SCRIPTS), "猫 $x$")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(tmp_path / "figure.png")
    box = figure.axes[0].get_position()
    assert min(box.width, box.height) > 0.3
    plain = draw_confusion(np.eye(8), ["a"] * 8)
    plain.draw_without_rendering()
    size = [figure.axes[0].get_window_extent().width for figure in (figure, plain)]
    assert size[0] == pytest.approx(size[1], rel=0.2)


def test_a_script_is_drawn_in_an_installed_font_that_has_it(tmp_path, monkeypatch):
    """A font of a black square in place of a letter that the default font lacks."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 1000), (1000, 1000), (1000, 0)):
        pen.lineTo(point)
    pen.closePath()
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", "square"])
    font.setupCharacterMap({ord("ぬ"): "square"})
    font.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()})
    font.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 0)})
    font.setupHorizontalHeader(ascent=1000, descent=0)
    font.setupNameTable({"familyName": "Square", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(tmp_path / "square.ttf")
    default = [entry for entry in font_manager.fontManager.ttflist if entry.name == "DejaVu Sans"]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", default)
    font_manager.fontManager.addfont(tmp_path / "square.ttf")
    draw_images(np.ones((1, 8, 8, 1)), ["ぬぬぬ"]).savefig(tmp_path / "figure.png")
    pixels = np.asarray(Image.open(tmp_path / "figure.png").convert("L"))
    assert (pixels < 8).sum() > 500  # three squares of 9 points
