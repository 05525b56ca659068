"""What a run records of each epoch."""

import csv
import json
from pathlib import Path

import pytest
from conftest import composed
from sklearn.metrics import f1_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vit_lightning.data.module import ImageData
from vit_lightning.recipe.weights import load_classifier
from vit_lightning.runs.callbacks import EpochRecorder
from vit_lightning.runs.fit import train

SMALL = ["experiment=quickstart", "model.image_size=8", "model.patch_size=2", "model.layers=1", "dashboard=curves"]


def test_a_chosen_metric_reaches_every_record(tmp_path, monkeypatch, digits_run, capsys):
    monkeypatch.chdir(digits_run.parent)
    config = composed(*SMALL, "metrics=[f1]", "trainer.max_epochs=3", "trainer.check_val_every_n_epoch=2")
    run = tmp_path / "run"
    run.mkdir()
    train(config, run)

    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        *("epoch", "step", "seconds", "lr"),
        *(f"{stage}/{name}" for stage in ("train", "val") for name in ("loss", "acc", "acc5", "f1")),
        "train/images_per_second",
    ]
    assert [bool(row["val/f1"]) for row in rows] == [False, True, False]  # the first epoch has no validation
    assert all(row["train/f1"] for row in rows)

    summary = json.loads((run / "summary.json").read_text())
    classifier = load_classifier(str(run))
    data = ImageData(config.data, config.model.image_size)
    data.setup()
    for split, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        labels, guesses = [], []
        for images, targets in loader:
            labels += targets.tolist()
            guesses += classifier.classify(images).argmax(1).tolist()
        expected = f1_score(labels, guesses, average="macro")
        assert summary["metrics"][f"{split}/f1"] == pytest.approx(expected, abs=1e-5)
        assert summary["images"][split] == len(labels)
    assert float(rows[1]["val/f1"]) == pytest.approx(summary["metrics"]["val/f1"])
    assert not [name for name in summary["metrics"] if "images" in name]

    events = EventAccumulator(str(run))
    events.Reload()
    counts = {tag: len(events.Scalars(tag)) for tag in events.Tags()["scalars"]}
    assert (counts["metrics/f1_train"], counts["metrics/f1_val"], counts["summary/test_f1"]) == (3, 1, 1)
    assert not [tag for tag in counts if tag.endswith("/images")]
    assert "top-5     f1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("epochs", "best"),
    [
        ([(0.5, 1.0), (0.5, 0.9), (0.4, 0.1)], 2),
        ([(0.5, 0.9), (0.5, 1.0), (0.5, 0.9)], 1),
        ([None, (0.0, 2.0), None], 2),
    ],
)
def test_of_equal_accuracies_the_lower_loss_is_the_best(epochs, best):
    recorder = EpochRecorder(Path(), {})
    for number, epoch in enumerate(epochs, start=1):
        measured = dict(zip(("val/acc", "val/loss"), epoch, strict=True)) if epoch else {}
        recorder.rows.append({"epoch": number, **measured})
    assert recorder.best["epoch"] == best
