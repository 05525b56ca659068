"""The table of a sweep."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import command

from vit_lightning.config import InputError
from vit_lightning.sweep import COLUMNS, summarise


def write_run(folder: Path, overrides: list[str], acc: float, **changes) -> None:
    folder.mkdir(parents=True)
    summary = {
        "overrides": overrides,
        "metrics": {"val/acc": acc, "val/acc5": acc + 0.2},
        "epochs": 4,
        "seconds": 10.0,
        "train/images_per_second": 100.0,
        "parameters": 1234,
        **changes,
    }
    (folder / "summary.json").write_text(json.dumps(summary))


def test_runs_that_differ_in_their_seed_are_one_row(tmp_path):
    results = {"2": [0.5, 0.54, 0.55], "4": [0.6, 0.61, 0.65]}
    for layers, accuracies in results.items():
        for seed, acc in enumerate(accuracies):
            overrides = ["experiment=fast", f"model.layers={layers}", f"seed={seed}"]
            write_run(tmp_path / layers / f"seed-{seed}", overrides, acc, seconds=10.0 + seed)
    rows = summarise(tmp_path)
    assert [row["setting"] for row in rows] == ["model.layers=4", "model.layers=2"]
    for row, layers in zip(rows, ("4", "2"), strict=True):
        assert row["runs"] == 3
        assert row["val/acc"] == pytest.approx(np.mean(results[layers]))
        assert row["val/acc ±"] == pytest.approx(np.std(results[layers], ddof=1))
        assert row["val/acc5"] == pytest.approx(np.mean(results[layers]) + 0.2)
        assert row["seconds"] == pytest.approx(11.0)


def test_a_single_run_has_no_spread(tmp_path):
    write_run(tmp_path / "0", ["seed=1"], 0.5)
    [row] = summarise(tmp_path)
    assert (row["setting"], row["val/acc ±"]) == ("", None)


def test_a_directory_without_runs_is_said(tmp_path):
    with pytest.raises(InputError, match=r"holds no summary\.json"):
        summarise(tmp_path)


def test_the_command_prints_the_table_and_keeps_it(tmp_path):
    write_run(tmp_path / "sweep" / "0", ["optim.lr=0.1"], 0.5)
    write_run(tmp_path / "sweep" / "1", ["optim.lr=0.2"], 0.75)
    result = command("sweep", "summary", "dir=sweep", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.index("optim.lr=0.2") < result.stdout.index("optim.lr=0.1")
    assert "75.0%" in result.stdout
    rows = list(csv.DictReader((tmp_path / "sweep" / "summary.csv").read_text().splitlines()))
    assert [row["setting"] for row in rows] == ["optim.lr=0.2", "optim.lr=0.1"]
    assert list(rows[0]) == ["setting", *COLUMNS]
    assert float(rows[0]["val/acc"]) == 0.75


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the command is: python -m vit_lightning.sweep summary dir=DIRECTORY"),
        (("summary", "dir=none"), "dir=none"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, arguments, message):
    result = command("sweep", *arguments, cwd=tmp_path)
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
