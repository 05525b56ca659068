"""Pictures of one's own: layouts of folders, and what cannot be used."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command
from PIL import Image

from vit_lightning.config import DataConfig
from vit_lightning.data.images import SUFFIXES
from vit_lightning.data.module import ImageData
from vit_lightning.keys import InputError


def picture(path: Path, number: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)


def tree(root: Path, count: int = 10, **parts: str) -> Path:
    """Folders ``<part>/<class>/``; a part of no name has its classes at the top."""
    for number, (part, classes) in enumerate(parts.items()):
        for label, name in enumerate(classes.split()):
            for index in range(count):
                picture(root / part.strip("_") / name / f"{index:02}.png", 1000 * number + 100 * label + index)
    return root


def opened(root: Path, **changes) -> ImageData:
    config = DataConfig(
        source="image_folder", root=str(root), cache_dir=str(root.parent / "cache"), split="standard", batch_size=2,
        **changes,
    )  # fmt: skip
    data = ImageData(config, 8)
    data.setup()
    return data


def counts(data: ImageData) -> tuple[int, ...]:
    return tuple(len(data.indices[split]) for split in ("train", "val", "test"))


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (dict(train="a b", val="a b", test="a b"), (20, 20, 20)),
        (dict(training="a b", validation="a b", testing="a b"), (20, 20, 20)),
        (dict(train="a b", val="a b"), (20, 20, 0)),
        (dict(train="a b", test="a b"), (18, 2, 20)),
        (dict(_="a b"), (16, 2, 2)),
        (dict(_="a b train"), (24, 3, 3)),  # a class that is called train
        (dict(test="a"), (0, 0, 10)),
        (dict(val="a b"), (0, 20, 0)),
    ],
)
def test_a_folder_is_split_as_it_says(tmp_path, parts, expected):
    data = opened(tree(tmp_path / "photos", **parts))
    assert counts(data) == expected
    seen = [name for split in ("train", "val", "test") for name in data.files(split)]
    assert sorted(seen) == sorted(
        str(path.relative_to(tmp_path / "photos")) for path in (tmp_path / "photos").rglob("*.png")
    )
    for split in ("train", "val", "test"):  # each image's class is its folder's
        labels = data.stored(split, torch.arange(len(data.indices[split])))[1] if len(data.indices[split]) else []
        assert [data.class_names[label] for label in labels] == [Path(name).parent.name for name in data.files(split)]


def test_a_csv_file_lists_pictures(tmp_path):
    rows = ["path,label,split"]
    for index in range(12):
        picture(tmp_path / "all" / f"{index}.png", index)
        rows.append(f"all/{index}.png,{['even', 'odd'][index % 2]},{['train', 'train', 'valid', 'test'][index // 3]}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    data = opened(tmp_path / "labels.csv")
    assert counts(data) == (6, 3, 3)
    assert data.files("test") == ["all/10.png", "all/9.png", "all/11.png"]
    (tmp_path / "unsplit.csv").write_text("\n".join(row.rpartition(",")[0] for row in rows))
    assert sum(counts(opened(tmp_path / "unsplit.csv", val_fraction=0.2))) == 12


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,label\na.png,x", "needs the columns path and label, and may have split; it lacks path"),
        ("path,label,split\na.png,x,fold1", "labels.csv, line 2, needs a path, a label and a split"),
        ("path,label\na.png,", "line 2, needs a path, a label"),
        ("", "it lacks path"),
        ("path,label\n", r"labels\.csv lists no pictures"),
        (None, "labels.csv does not exist; data.root needs train/"),
    ],
)
def test_a_mistaken_csv_file_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "labels.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        opened(tmp_path / "labels.csv")


def test_a_changed_label_in_a_csv_file_is_read_again(tmp_path):
    """The files of all classes in order are the same before and after."""
    for index in range(12):
        picture(tmp_path / f"{index:02}.png", index)

    def labels(first_of_b: int, name_of_b: str) -> tuple[list[int], list[str]]:
        rows = [f"{index:02}.png,{'a' if index < first_of_b else name_of_b}" for index in range(12)]
        (tmp_path / "labels.csv").write_text("\n".join(["path,label", *rows]))
        data = opened(tmp_path / "labels.csv", val_fraction=0.2)
        return data.arrays.labels["train"].tolist(), data.class_names

    assert labels(6, "b") == ([0] * 6 + [1] * 6, ["a", "b"])
    assert labels(7, "b") == ([0] * 7 + [1] * 5, ["a", "b"])
    assert labels(7, "c") == ([0] * 7 + [1] * 5, ["a", "c"])


def test_pictures_in_sub_folders_and_of_any_format_are_read_and_others_reported(tmp_path, capsys):
    root = tree(tmp_path / "photos", _="a b")
    for suffix in ("bmp", "tif", "gif", "jfif", "ppm"):
        picture(root / "a" / "deep" / "er" / f"x.{suffix}")
    for name in ("a/notes.txt", "a/deep/data.json", "readme.txt"):
        (root / name).write_text("-")
    for hidden in ("a/._x.png", "a/.cache/y.png", ".git/z.png", "__MACOSX/a/k.png"):
        picture(root / "a" / "k.png")
        (root / hidden).parent.mkdir(exist_ok=True, parents=True)
        (root / hidden).write_bytes(b"no picture")
    data = opened(root)
    assert sum(counts(data)) == 26
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert line.endswith("photos: 3 files are not used (2 .txt, 1 .json), such as a/notes.txt")
    assert {".bmp", ".tif", ".webp", ".jfif", ".avif", ".pgm"} <= SUFFIXES


def test_a_link_to_a_folder_that_contains_it_is_not_followed_again(tmp_path):
    root = tree(tmp_path / "photos", _="a b")
    (root / "a" / "loop").symlink_to(".")
    (root / "b" / "top").symlink_to("../b")
    (root / "c").symlink_to("a")
    assert sum(counts(opened(root))) == 30


def test_all_pictures_that_cannot_be_read_are_named_or_left_out(tmp_path, capsys):
    root = tree(tmp_path / "photos", train="a b", test="a b")
    for index in range(12):
        (root / "train" / "a" / f"bad{index:02}.png").write_bytes(b"-" * index)
    os.mkfifo(root / "test" / "b" / "pipe.png")
    with pytest.raises(InputError) as error:
        opened(root)
    message = str(error.value)
    assert message.count("cannot be read (not an image)") == 10
    assert message.endswith("; and 3 more; fix or remove them, or set data.skip_unreadable=true")
    data = opened(root, skip_unreadable=True)
    assert counts(data) == (18, 2, 20)
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert line.startswith(f"warning: 13 images are left out: {root}/train/a/bad00.png cannot be read")
    assert not [name for split in ("train", "val", "test") for name in data.files(split) if "bad" in name]
    assert counts(opened(root, skip_unreadable=True)) == (18, 2, 20)
    with pytest.raises(InputError, match="; and 3 more"):  # although they are left out of the cache
        opened(root)
    (root / "test" / "b" / "pipe.png").unlink()
    for path in (root / "train" / "a").glob("bad*"):
        path.unlink()
    assert opened(root).arrays.digest == data.arrays.digest


def test_a_class_without_a_readable_picture_is_named(tmp_path):
    root = tree(tmp_path / "photos", train="a b", test="a b")
    for part, name in (("test", "a"), ("train", "b")):
        for path in (root / part / name).glob("*"):
            path.write_bytes(b"-")
    with pytest.raises(InputError, match="no image of b can be read; replace them or remove the class"):
        opened(root, skip_unreadable=True)


def test_a_named_pipe_alone_is_named(tmp_path):
    root = tree(tmp_path / "photos", train="a b", test="a b")
    os.mkfifo(root / "train" / "b" / "pipe.png")
    with pytest.raises(InputError, match=r"train/b/pipe\.png cannot be read \(not a regular file\)"):
        opened(root)


def test_names_that_are_not_utf8(tmp_path):
    root = tree(tmp_path / "photos", _="a b")
    name = os.fsencode(root / "a") + b"/caf\xe9.png"
    os.rename(os.fsencode(root / "a" / "00.png"), name)  # noqa: PTH104 - a path of bytes
    os.rename(os.fsencode(root / "b"), os.fsencode(root) + b"/th\xe9")  # noqa: PTH104
    data = opened(root)
    assert counts(data) == (16, 2, 2)
    assert data.class_names == ["a", r"th\xe9"]
    names = "\n".join(name for split in ("train", "val", "test") for name in data.files(split))
    assert r"a/caf\xe9.png" in names.splitlines()
    assert names.encode()  # can be written


def test_a_class_of_one_image_is_named(tmp_path):
    root = tree(tmp_path / "photos", train="a b", test="a b")
    picture(root / "train" / "rare" / "x.png")
    with pytest.raises(InputError, match=r"class by class: each class needs at least 2 images; too few of rare \(1\)"):
        opened(root)


def test_too_few_images_for_the_classes_are_refused(tmp_path):
    with pytest.raises(InputError, match="8 images are too few for 2 classes; choose a share closer"):
        opened(tree(tmp_path / "photos", count=4, train="a b", test="a b"))


def test_the_digest_tells_labels_order_and_pixels_apart(tmp_path):
    root = tree(tmp_path / "photos", train="a b", test="a b")
    first = opened(root).arrays.digest
    assert opened(root.rename(tmp_path / "moved")).arrays.digest == first
    picture(tmp_path / "moved" / "test" / "a" / "00.png", 77)
    replaced = opened(tmp_path / "moved").arrays.digest
    assert (replaced["train"] == first["train"], replaced["test"] == first["test"]) == (True, False)
    train = tmp_path / "moved" / "train"
    (train / "a").rename(train / "c")
    (train / "b").rename(train / "a")
    (train / "c").rename(train / "b")
    assert opened(tmp_path / "moved").arrays.digest["train"] != first["train"]


@pytest.mark.slow
def test_a_folder_of_train_and_val_trains_and_predictions_name_the_files(tmp_path):
    root = tree(tmp_path / "photos", train="a b", val="a b")
    small = [
        "model.image_size=8",
        "model.patch_size=4",
        "model.layers=1",
        "model.mlp_head_units=[]",
        "dashboard=curves",
    ]
    own = [
        "data=image_folder",
        f"data.root={root}",
        "data.batch_size=4",
        "trainer.max_epochs=1",
        *small,
        "dashboard=curves",
    ]
    result = command("train", *own, "hydra.run.dir=run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "20 training, 20 validation, 0 test images of 2 classes" in result.stdout
    assert not [line for line in result.stdout.splitlines() if line.startswith("test ")]
    result = command("evaluate", "checkpoint=run", "split=val", "hydra.run.dir=val", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "val" / "predictions.csv").read_text().splitlines()[1].startswith("val/a/00.png,a,")
    result = command("evaluate", "checkpoint=run", cwd=tmp_path)
    assert (result.returncode, result.stderr.splitlines()[-1][-19:]) == (1, " has no test images")

    tree(tmp_path / "more", count=3, test="b")  # one of the classes, for a test alone
    other = ["data=image_folder", "data.root=more", "hydra.run.dir=test"]
    result = command("evaluate", "checkpoint=run", *other, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = (tmp_path / "test" / "predictions.csv").read_text().splitlines()[1:]
    assert [row.split(",")[:2] for row in rows] == [[f"test/b/{index:02}.png", "b"] for index in range(3)]


def test_a_resumed_run_refuses_changed_images_and_accepts_moved_ones(tmp_path):
    """A change by one image of each kind: every label swapped, a test image replaced, the order, and no test images."""
    root = tree(tmp_path / "photos", train="a b", test="a b")
    model = ["model.image_size=8", "model.patch_size=4", "model.layers=1", "model.mlp_head_units=[]"]
    arguments = ["data=image_folder", "data.root=photos", "data.batch_size=4", "trainer.max_epochs=1", *model]
    assert command("train", *arguments, "dashboard=curves", "hydra.run.dir=run", cwd=tmp_path).returncode == 0

    def changed(name: str) -> Path:
        return shutil.copytree(root, tmp_path / name)

    swapped = changed("swapped")
    (swapped / "train" / "a").rename(swapped / "c")
    (swapped / "train" / "b").rename(swapped / "train" / "a")
    (swapped / "c").rename(swapped / "train" / "b")
    picture(changed("replaced") / "test" / "a" / "00.png", 77)
    (changed("reordered") / "train" / "a" / "00.png").rename(tmp_path / "reordered" / "train" / "a" / "zz.png")
    shutil.rmtree(changed("cut") / "test")
    resume = ["train", "resume=run", "trainer.max_epochs=2"]
    for name, split in (("swapped", "train"), ("replaced", "test"), ("reordered", "train"), ("cut", "test")):
        result = command(*resume, f"data.root={name}", cwd=tmp_path)
        assert result.returncode == 1, name
        assert result.stderr.splitlines()[-1] == (
            f"error: the data set changed since this run started ({split} images); restore it or start a new run"
        )
    root.rename(tmp_path / "moved")
    result = command(*resume, "data.root=moved", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
