"""The table of a sweep."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import FEW, command

from vit_lightning.keys import InputError
from vit_lightning.sweeps.table import draw_sweep, summarise


def write_run(folder: Path, overrides: list[str], acc: float, **changes) -> None:
    folder.mkdir(parents=True)
    summary = {
        "overrides": overrides,
        "metrics": {"val/acc": acc, "val/acc5": acc + 0.2},
        "samples_seen": 4000,
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
        assert (row["values"], row["samples"]) == (results[layers], 4000)


def test_every_logged_metric_is_a_column_and_the_runs_monitor_decides(tmp_path):
    for rate, losses in {"0.1": [0.9, 0.7], "0.2": [0.4, 0.5]}.items():
        for seed, loss in enumerate(losses):
            metrics = {"val/loss": loss, "val/acc": 0.5, "val/f1": 0.25, "train/f1": 0.1}
            changes = {"metrics": metrics, "mode": "min", "config": {"monitor": "val/loss"}}
            write_run(tmp_path / "sweep" / rate / str(seed), [f"optim.lr={rate}", f"seed={seed}"], 0, **changes)
    result = command("sweep", "summary", "dir=sweep", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    header, *cells = [line.split() for line in result.stdout.splitlines()[1:4]]
    assert header == ["setting", "runs", "loss", "±", "top-1", "f1", "seconds", "images/s"]
    assert cells[0][:6] == ["optim.lr=0.2", "2", "0.450", "0.071", "50.0%", "0.250"]
    assert cells[1][:4] == ["optim.lr=0.1", "2", "0.800", "0.141"]
    [axes] = draw_sweep(summarise(tmp_path / "sweep")).axes
    assert axes.get_xlabel() == "validation loss"
    assert list(axes.lines[0].get_xdata()) == [0.4, 0.5]


def test_runs_with_other_metrics_share_a_table(tmp_path):
    """By the accuracy, since they were chosen by different metrics."""
    for name, acc in (("f1", 0.6), ("balanced_acc", 0.7)):
        changes = {"metrics": {"val/acc": acc, f"val/{name}": 0.5}, "config": {"monitor": f"val/{name}"}}
        write_run(tmp_path / name, [f"monitor=val/{name}"], 0, **changes)
    rows = summarise(tmp_path)
    assert [(row["val/acc"], row["val/balanced_acc"], row["val/f1"]) for row in rows] == [
        (0.7, 0.5, None),
        (0.6, None, 0.5),
    ]


def test_a_single_run_has_no_spread(tmp_path):
    write_run(tmp_path / "0", ["seed=1"], 0.5)
    [row] = summarise(tmp_path)
    assert (row["setting"], row["val/acc ±"]) == ("", None)


def test_a_directory_without_runs_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"has no summary\.json of a finished run"):
        summarise(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"null", b'{"overrides": ["a=1"], "met', b"\xff\x00\x80", b'{"overrides": 3}']
)
def test_a_file_that_is_no_summary_is_named_and_left_out(tmp_path, capsys, content):
    write_run(tmp_path / "good", ["optim.lr=0.1"], 0.5)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "summary.json").write_bytes(content)
    [row] = summarise(tmp_path)
    assert row["val/acc"] == 0.5
    [line] = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/bad/summary.json is damaged or not the summary of a run" in line


def test_the_base_setting_is_marked(tmp_path):
    for name, acc in (("base", 0.5), ("cutmix", 0.6)):
        write_run(tmp_path / name, ["experiment=ablation", f"ablation={name}"], acc)
    axes = draw_sweep(summarise(tmp_path)).axes[0]
    [line] = [line for line in axes.lines if line.get_label() == "base"]
    assert set(line.get_xdata()) == {50.0}
    assert "base" not in [line.get_label() for line in draw_sweep(summarise(tmp_path / "cutmix")).axes[0].lines]


def test_a_table_that_cannot_be_written_is_one_line(tmp_path):
    write_run(tmp_path / "sweep" / "0", ["optim.lr=0.1"], 0.5)
    (tmp_path / "sweep" / "summary.csv").mkdir()
    result = command("sweep", "summary", "dir=sweep", cwd=tmp_path)
    assert result.returncode == 1
    assert "50.0%" in result.stdout
    [line] = result.stderr.splitlines()
    assert line == "error: dir=sweep: summary.csv cannot be written (Is a directory)"


def test_the_command_prints_the_table_and_keeps_it(tmp_path):
    write_run(tmp_path / "sweep" / "0", ["optim.lr=0.1"], 0.5)
    write_run(tmp_path / "sweep" / "1", ["optim.lr=0.2"], 0.75)
    result = command("sweep", "summary", "dir=sweep", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.index("optim.lr=0.2") < result.stdout.index("optim.lr=0.1")
    assert "75.0%" in result.stdout
    rows = list(csv.DictReader((tmp_path / "sweep" / "summary.csv").read_text().splitlines()))
    assert [row["setting"] for row in rows] == ["optim.lr=0.2", "optim.lr=0.1"]
    assert list(rows[0]) == [
        *("setting", "runs", "monitor", "values", "val/acc", "val/acc ±", "val/acc5"),
        *("samples", "seconds", "images/s", "parameters"),
    ]
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


TINY = ["data=digits", "model.image_size=8", "model.patch_size=2", "model.mlp_head_units=[16]", "dashboard=curves"]


@pytest.mark.slow
def test_jobs_side_by_side_share_the_cores(tmp_path):
    launcher = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=sweep"]
    grid = ["model.heads=2,4,5", "model.layers=1", *FEW]
    arguments = [sys.executable, "-m", "vit_lightning.train", *launcher, *TINY, *grid]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    result = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode == 1
    assert "  sweep/model.heads-5: error: model.embed_dim=64 is not divisible by" in result.stderr.splitlines()[-1]
    runs = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("sweep/*/summary.json"))]
    assert [run["config"]["model"]["heads"] for run in runs] == [2, 4]
    for run in runs:
        assert run["hardware"]["threads"] == max(1, run["hardware"]["cores"] // 2)
        assert run["command"].startswith("python -m vit_lightning.train data=digits ")
    with (tmp_path / "sweep" / "summary.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2


@pytest.mark.slow
def test_a_job_that_slurm_preempts_goes_on_when_it_is_requeued(tmp_path):
    """By submitit's local stand-in for SLURM, which sends the same signal and requeues in the same way."""
    launcher = ["-m", "hydra/launcher=submitit_local", "hydra.sweep.dir=sweep"]
    grid = ["seed=0,1", "model.layers=1", "trainer.max_epochs=6", "data.batch_size=16"]
    arguments = [sys.executable, "-m", "vit_lightning.train", *launcher, *TINY, *grid]
    with subprocess.Popen(arguments, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as sweep:
        run = tmp_path / "sweep" / "seed-1"
        while not ((run / "metrics.csv").exists() and len((run / "metrics.csv").read_text().splitlines()) > 2):
            assert sweep.poll() is None
            time.sleep(0.1)
        [events] = run.glob("events.*")
        os.kill(int(events.name.split(".")[-2]), signal.SIGUSR2)
        _, stderr = sweep.communicate()
    assert sweep.returncode == 0, stderr.decode()
    logs = [path.read_text() for path in tmp_path.glob("sweep/.submitit/*/*_log.out")]
    assert sum("continuing sweep/seed-1 from step " in log for log in logs) == 1
    for seed in range(2):
        with (tmp_path / "sweep" / f"seed-{seed}" / "metrics.csv").open() as file:
            assert [row["epoch"] for row in csv.DictReader(file)] == list("123456")
