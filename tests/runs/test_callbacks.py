"""What a run records of each epoch."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import composed, write_folder
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.metrics import f1_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vit_lightning.config import DataConfig
from vit_lightning.data.module import ImageData
from vit_lightning.keys import Invocation
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
        *(f"{stage}/{name}" for stage in ("train", "val") for name in ("loss", "acc", "f1")),
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
    assert "top-1     f1" in capsys.readouterr().out


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


@pytest.mark.parametrize("monitor", ["val/f1", "val/loss"])
def test_the_monitored_metric_decides_everywhere(tmp_path, monkeypatch, capsys, monitor):
    monkeypatch.chdir(tmp_path)
    chosen = ["metrics=[f1]", f"monitor={monitor}", "trainer.max_epochs=4", "optim.lr=0.004", "callbacks=top_k"]
    run, reports = tmp_path / "run", {}
    run.mkdir()
    config = composed(*SMALL, *chosen)

    def build(callback: dict, folder: Path) -> ModelCheckpoint:
        return ModelCheckpoint(**{key: value for key, value in callback.items() if key[0] != "_"}, dirpath=folder / "k")

    curves = TensorBoardLogger(run, name="", version="")
    result = train(config, run, reports.__setitem__, Invocation("", build=build), loggers=[curves])
    with (run / "metrics.csv").open() as file:
        values = [float(row[monitor]) for row in csv.DictReader(file)]
    best = min(values) if monitor == "val/loss" else max(values)
    assert result == pytest.approx(best)
    assert list(reports.values()) == pytest.approx(values)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["best_epoch"] == values.index(best) + 1
    assert summary["mode"] == ("min" if monitor == "val/loss" else "max")
    assert summary["metrics"][monitor] == pytest.approx(best)
    epoch = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["epoch"]
    assert epoch + 1 == summary["best_epoch"]
    events = EventAccumulator(str(run)).Reload()
    assert events.Scalars(f"summary/{monitor[4:]}")[-1].value == pytest.approx(best)
    # Of four epochs, the three best are kept: not the one that is worst by this metric.
    worst = max(values) if monitor == "val/loss" else min(values)
    expected = {f"epoch-{number}" for number in range(4) if values[number] != worst}
    assert {path.stem for path in (run / "k").iterdir()} == expected
    output = capsys.readouterr().out
    assert f"best of 4 epochs by {monitor}: epoch {summary['best_epoch']}\n" in output
    assert bool(re.search(r"top-1 +f1  images/s", output)) == (monitor == "val/f1")

    assert train(config, run) == pytest.approx(best)
    assert capsys.readouterr().out.endswith(f"is already finished: {monitor} {best:.3f}\n")


@pytest.mark.parametrize("few", [6, 7])
def test_a_run_of_unequal_classes_says_so_and_shows_the_balanced_accuracy(tmp_path, capsys, few):
    write_folder(tmp_path / "images", {"many": (18, 8), "few": (few, 4)})
    config = composed(*SMALL, "augment=none", "trainer.max_epochs=1")
    data = DataConfig(
        source="image_folder", root=str(tmp_path / "images"), split="blog", cache_dir=str(tmp_path / "cache"),
        batch_size=4,
    )  # fmt: skip
    (tmp_path / "run").mkdir()
    train(replace(config, data=data), tmp_path / "run")
    output = capsys.readouterr().out
    unequal = few == 6
    assert ("imbalanced classes (few 6, many 18 images): try optim.class_weights=balanced or" in output) == unequal
    assert bool(re.search(r"images +loss +top-1 +balanced\n", output)) == unequal
    assert ("test/balanced_acc" in json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]) == unequal
