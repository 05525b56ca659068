"""The predict command, on pictures of every kind."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import command, composed
from PIL import Image

from vit_lightning.analysis.predict import predict
from vit_lightning.data.sources import load_arrays
from vit_lightning.keys import InputError
from vit_lightning.recipe.weights import load_classifier


@pytest.fixture
def pictures(digits_run, tmp_path, monkeypatch):
    """A digit in files of many modes and sizes, and the class that the network gives it."""
    monkeypatch.chdir(digits_run.parent)
    image = load_arrays(composed("data=digits").data, 8).images["test"][:1]
    expected = load_classifier("run").classify(image)[0]
    gray = Image.fromarray(image[0, 0].numpy())
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    gray.save(folder / "gray.png")
    gray.convert("RGB").save(folder / "rgb.webp", lossless=True)
    black = Image.new("P", gray.size)
    gray.convert("P").save(folder / "palette.GIF", save_all=True, append_images=[black])  # of which the first counts
    gray.convert("RGBA").save(folder / "more" / "alpha.png")
    Image.fromarray(np.asarray(gray).astype(np.uint16) * 257).save(folder / "16-bit.png")
    gray.resize((32, 32), Image.Resampling.NEAREST).save(folder / "large.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter to the right
    gray.rotate(90, expand=True).save(folder / "turned.png", exif=exif)
    return folder, expected


def test_every_kind_of_picture_is_read(pictures, tmp_path, digits_run):
    folder, expected = pictures
    result = command(
        "predict", "checkpoint=run", f"images={folder}", "attention=true", "hydra.run.dir=out", cwd=digits_run.parent
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    out = digits_run.parent / "out"
    rows = json.loads((out / "predictions.json").read_text())
    assert len(rows) == 7
    for row in rows:
        got = torch.zeros(10)
        for guess in row["predictions"]:
            got[int(guess["class"])] = guess["probability"]
        top = expected.topk(5)
        if "large" not in row["file"]:  # which is smoothed when it is made small again
            torch.testing.assert_close(got[top.indices], top.values, atol=1e-4, rtol=0, msg=row["file"])
    table = list(csv.DictReader((out / "predictions.csv").read_text().splitlines()))
    assert [row["file"] for row in table] == [row["file"] for row in rows]
    assert table[0]["class_1"] == rows[0]["predictions"][0]["class"]
    Image.open(out / "attention.png").verify()
    assert "attention.png" in result.stdout


def test_an_unreadable_file_is_named_and_the_others_are_still_predicted(pictures, digits_run, tmp_path):
    folder, _ = pictures
    (folder / "broken.png").write_bytes(b"no picture")
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("of the photographer")
    (other / "phone.heic").write_bytes(b"")
    images = f"images=[{folder / 'gray.png'},{folder / 'broken.png'},{folder / 'none*.png'},{other}]"
    result = command("predict", "checkpoint=run", images, "hydra.run.dir=two", cwd=digits_run.parent)
    assert result.returncode == 1
    errors = result.stderr.splitlines()
    assert any("broken.png cannot be read (not an image)" in line for line in errors)
    assert any("none*.png matches no picture" in line for line in errors)
    assert f"warning: images={other}: 2 files are not used (1 .txt, 1 .heic), such as notes.txt" in errors
    assert any(line.endswith(f"images={other} matches no picture") for line in errors)
    assert errors[-1] == "error: 3 of 4 files could not be read (see above)"
    [row] = json.loads((digits_run.parent / "two" / "predictions.json").read_text())
    assert row["file"].endswith("gray.png")


def test_attention_of_many_pictures_says_that_it_shows_the_first(pictures, tmp_path, capsys):
    folder, _ = pictures
    for number in range(25):
        (folder / "more" / f"${number:02} with a name that is far too long.png").write_bytes(
            (folder / "gray.png").read_bytes()
        )
    predict(composed("checkpoint=run", f"images={folder / 'more'}", "attention=true", name="predict"), tmp_path)
    assert "attention.png shows the first 24 of 26 images" in capsys.readouterr().out
    Image.open(tmp_path / "attention.png").verify()


def test_an_oblong_picture_is_cropped_in_the_same_way_as_by_the_classifier(digits_run, tmp_path):
    """Decoded by Pillow at the network's size, or handed to the classifier as it is: 2:1 and 1:2."""
    smooth = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    wide = Image.fromarray(smooth).resize((96, 48), Image.Resampling.BICUBIC)
    wide.save(tmp_path / "a wide.png")
    wide.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "tall.png")
    classifier = load_classifier(str(digits_run))
    predict(composed(f"checkpoint={digits_run}", f"images={tmp_path}", "top=10", name="predict"), tmp_path)
    for row in json.loads((tmp_path / "predictions.json").read_text()):
        pixels = torch.from_numpy(np.array(Image.open(row["file"])))[None, None]
        [expected] = classifier.classify(pixels).tolist()
        for guess in row["predictions"]:
            assert guess["probability"] == pytest.approx(expected[int(guess["class"])], abs=0.02), row["file"]


def test_a_glob_and_a_number_of_classes(pictures, tmp_path):
    folder, _ = pictures
    config = composed("checkpoint=run", f"images='{folder}/*a*.png'", "top=2", name="predict")
    share = predict(config, tmp_path)
    rows = json.loads((tmp_path / "predictions.json").read_text())
    assert sorted(row["file"].rsplit("/", 1)[1] for row in rows) == ["gray.png", "large.png"]
    assert [len(row["predictions"]) for row in rows] == [2, 2]
    assert share == pytest.approx(np.mean([row["predictions"][0]["probability"] for row in rows]))


@pytest.mark.parametrize("images", ["", "[]"])
def test_without_images_it_says_what_to_name(images):
    with pytest.raises(InputError, match="images= is empty; name files, directories or globs"):
        composed(f"images={images}", name="predict")


def test_where_nothing_is_found_it_says_what_it_takes(pictures, tmp_path):
    with pytest.raises(InputError, match="no picture could be read"):
        predict(composed("checkpoint=run", f"images={tmp_path / 'nothing'}", name="predict"), tmp_path)


@pytest.mark.slow
def test_a_file_name_that_is_not_valid_unicode(pictures, digits_run):
    """A Latin-1 name on a UTF-8 terminal; pictures in hidden directories are left out."""
    folder, _ = pictures
    (folder / "more" / "alpha.png").rename(folder / "more" / os.fsdecode(b"caf\xe9.png"))
    (folder / "more" / ".thumbs").mkdir()
    (folder / "gray.png").rename(folder / "more" / ".thumbs" / "gray.png")
    arguments = ["checkpoint=run", f"images={folder / 'more'}", "top=1", "attention=true", "hydra.run.dir=latin"]
    result = subprocess.run(
        [sys.executable, "-m", "vit_lightning.predict", *arguments],
        cwd=digits_run.parent,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "caf\\udce9.png" in result.stdout
    [row] = json.loads((digits_run.parent / "latin" / "predictions.json").read_text())
    assert os.fsencode(row["file"]).endswith(b"more/caf\xe9.png")
    [cells] = csv.DictReader((digits_run.parent / "latin" / "predictions.csv").read_text(encoding="utf-8").splitlines())
    assert cells["file"].endswith("more/caf\\udce9.png")
