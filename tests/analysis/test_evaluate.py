"""The evaluate command, as a user types it."""

import csv
import json

import numpy as np
import pytest
import torch
from conftest import command, composed, write_folder
from PIL import Image

from vit_lightning.analysis.evaluate import evaluate
from vit_lightning.data.module import ImageData
from vit_lightning.recipe.weights import load_classifier
from vit_lightning.runs.fit import train


def test_a_run_is_evaluated_on_its_own_images(digits_run):
    start = digits_run.parent
    result = command("evaluate", "checkpoint=run", cwd=start)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    [report_path] = start.glob("outputs/evaluate/*/*/evaluation.json")
    report = json.loads(report_path.read_text())
    summary = json.loads((digits_run / "summary.json").read_text())
    assert report["images"] == 360
    for key in ("loss", "acc"):
        assert report[key] == pytest.approx(summary["metrics"][f"test/{key}"], abs=1e-5)
    assert report["command"] == "python -m vit_lightning.evaluate checkpoint=run"
    assert f"{report['acc']:.1%}" in result.stdout
    names = {path.name for path in report_path.parent.iterdir()}
    pictures = {"confusion.png", "per_class.png", "reliability.png", "mistakes.png"}
    assert names == {"evaluation.json", "per_class.csv", "predictions.csv", *pictures}
    for name in names:
        assert name in result.stdout
    for picture in pictures:
        Image.open(report_path.parent / picture).verify()
    rows = list(csv.DictReader((report_path.parent / "predictions.csv").read_text().splitlines()))
    right = [row["label"] == row["class_1"] for row in rows]
    assert np.mean(right) == pytest.approx(report["acc"])


def test_another_split_and_test_time_augmentation(digits_run, tmp_path, monkeypatch):
    monkeypatch.chdir(digits_run.parent)
    summary = json.loads((digits_run / "summary.json").read_text())
    assert evaluate(composed("checkpoint=run", "split=val", name="evaluate"), tmp_path) == pytest.approx(
        summary["metrics"]["val/acc"]
    )
    evaluate(composed("checkpoint=run", "tta=true", name="evaluate"), tmp_path)
    with_tta = json.loads((tmp_path / "evaluation.json").read_text())
    classifier = load_classifier("run")
    data = ImageData(composed("data=digits").data, 8)
    data.setup()
    losses = []
    for images, labels in data.test_dataloader():
        shares = (classifier.classify(images) + classifier.classify(images.flip(-1))) / 2
        losses.append(torch.nn.functional.nll_loss(shares.log(), labels, reduction="none"))
    assert with_tta["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)
    assert with_tta["tta"] is True


def test_a_folder_with_the_same_classes_works_whatever_their_number_and_size(tmp_path):
    """Classes are matched by name: in a folder without the first class, the others have different numbers.

    All of its test images count, as the network's own do, though data=image_folder alone would mean the blog's split.
    """
    for name, classes, side in (("own", ("ant", "bee", "cat"), 8), ("other", ("bee", "cat"), 12)):
        write_folder(tmp_path / name, dict.fromkeys(classes, (20, 10)), side)
        for path in (tmp_path / name).rglob("*.png"):
            colour = {"ant": (200, 30, 30), "bee": (30, 200, 30), "cat": (30, 30, 200)}[path.parent.name]
            Image.new("RGB", (side, side), colour).save(path)
    (tmp_path / "run").mkdir()
    common = [f"data.cache_dir={tmp_path / 'cache'}", "data=image_folder"]
    network = ["model=conv", "model.image_size=8", "model.embed_dim=16", "model.heads=2", "model.patch_size=2"]
    limits = ["data.split=standard", "trainer.max_epochs=4", "data.batch_size=9", "optim.lr=0.01"]
    train(composed(*common, f"data.root={tmp_path / 'own'}", *network, *limits), tmp_path / "run")
    other = [*common, f"data.root={tmp_path / 'other'}", "checkpoint=run", "hydra.run.dir=evaluation"]
    assert command("evaluate", *other, cwd=tmp_path).returncode == 0
    assert json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["acc"] == 1.0
    rows = csv.DictReader((tmp_path / "evaluation" / "per_class.csv").read_text().splitlines())
    assert [(row["class"], row["images"]) for row in rows] == [("bee", "10"), ("cat", "10")]
    other[-1] = "hydra.run.dir=part"
    assert command("evaluate", *other, "data.split=blog", cwd=tmp_path).returncode == 0
    assert json.loads((tmp_path / "part" / "evaluation.json").read_text())["images"] == 6  # 30 % of the test images


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkpoint=nowhere"], "checkpoint=nowhere does not exist; name a run's directory"),
        (["checkpoint=''"], "checkpoint= is empty; set it to pretrained, a run's directory or a file"),
        (["checkpoint=run", "split=all"], "split=all is not known; choose one of train, val, test"),
        (["checkpoint=run", "splitt=val"], "splitt is not a key; did you mean data.split or split?"),
        (["checkpoint=run", "data=image_folder", "data.root=other"], "has a class cat that the checkpoint lacks"),
        (
            ["checkpoint=run", "data=image_folder", "data.root=same"],
            "3 channel(s), and the checkpoint's network takes 1",
        ),
    ],
)
def test_a_mistake_is_one_line(digits_run, arguments, message):
    start = digits_run.parent
    for name, classes in (("other", "cat dog"), ("same", "3 7")):
        if not (start / name).exists():
            write_folder(start / name, dict.fromkeys(classes.split(), (3, 3)))
    result = command("evaluate", *arguments, cwd=start)
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_failed_job_of_a_sweep_fails_it(digits_run):
    result = command(
        "evaluate", "-m", "checkpoint=run", "split=val,half", "hydra.sweep.dir=splits", cwd=digits_run.parent
    )
    assert result.returncode == 1
    assert "split=half is not known; choose one of train, val, test" in result.stderr
    assert "1 of the sweep's jobs failed" in result.stderr
    assert json.loads((digits_run.parent / "splits" / "0" / "evaluation.json").read_text())["split"] == "val"
