"""Arguments of Lightning's Trainer, callbacks and loggers, as a run takes them."""

import csv
import json
import sqlite3
from pathlib import Path

import lightning as L
import pytest
import torch
from conftest import command, composed
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vit_lightning.keys import InputError
from vit_lightning.runs.fit import train

TINY = [
    *("experiment=quickstart", "model.image_size=8", "model.patch_size=4", "model.layers=1", "model.embed_dim=16"),
    *("model.mlp_head_units=[]", "trainer.max_epochs=3", "dashboard=curves", "test=false", "data.batch_size=64"),
    *("trainer.precision=32-true", "save_minutes=0"),
]
STEPS = 17  # of an epoch: 1,149 training images


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("start")


@pytest.fixture
def fit(start, tmp_path, monkeypatch):
    """Train in this process; returns the run's directory."""
    monkeypatch.chdir(start)

    def fitted(*arguments: str, run: str = "run", **more) -> Path:
        train(composed(*TINY, *arguments), tmp_path / run, **more)
        return tmp_path / run

    return fitted


def summary_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def rows_of(run: Path, name: str = "metrics.csv") -> list[dict[str, str]]:
    with (run / name).open() as file:
        return list(csv.DictReader(file))


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_a_number_of_steps_ends_a_run_with_a_validation(fit):
    run = fit("trainer.max_steps=20", "optim.schedule=linear", "optim.warmup=0", "optim.lr=0.02")
    [first, second] = rows_of(run)
    assert [int(row["step"]) for row in (first, second)] == [STEPS, 20]
    assert second["val/acc"]
    assert float(second["lr"]) == pytest.approx(0.02 / 20)  # the schedule spans the steps, not the epochs
    summary = summary_of(run)
    assert summary["samples_seen"] == 20 * 64


def test_a_run_without_validation_keeps_its_last_weights(fit):
    run = fit("trainer.limit_val_batches=0", "test=true")
    summary = summary_of(run)
    assert summary["best_epoch"] == 3
    assert {name.split("/")[0] for name in summary["metrics"]} == {"train", "test"}
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    torch.testing.assert_close(best, weights_of(run), rtol=0, atol=0)


def test_a_trial_run_takes_a_few_batches_of_everything(fit):
    run = fit("trainer.fast_dev_run=2", "test=true", "dashboard=full")
    summary = summary_of(run)
    assert (summary["epochs"], summary["samples_seen"], summary["images"]["test"]) == (1, 128, 360)
    events = EventAccumulator(str(run)).Reload()
    assert {"pictures/batch", "pictures/confusion"} <= set(events.Tags()["images"])


def test_overfitting_sees_the_same_images_in_every_epoch(fit):
    seen = []

    class Seen(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append({image.numpy().tobytes() for image in batch[0]})

    fit("trainer.overfit_batches=2", callbacks=[Seen()])
    assert len(seen) == 6
    assert seen[0] | seen[1] == seen[2] | seen[3] == seen[4] | seen[5]


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_weights_of_another_precision_see_the_same_images(fit, precision):
    kept = []

    class Seen(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            kept.append((pl_module.augmented(*batch)[0], next(pl_module.parameters()).dtype))
            trainer.should_stop = True

    for name in (precision, "32-true"):
        fit(f"trainer.precision={name}", "augment.rotation=20", run=name, callbacks=[Seen()])
    (theirs, dtype), (ours, full) = kept[0], kept[-1]
    assert theirs.dtype == dtype != full
    torch.testing.assert_close(theirs, ours.to(dtype), rtol=0, atol=0)


def test_accumulated_gradients_equal_those_of_one_large_batch(fit):
    """Without dropout and augmentation, and with an optimizer that sees no noise in small gradients."""
    plain = ["augment=none", "model.dropout=0", "model.head_dropout=0", "optim.schedule=constant", "optim.warmup=0"]
    shared = [*plain, "optim.name=SGD", "optim.lr=0.1", "optim.ema=0", "trainer.max_epochs=1"]
    one = fit(*shared, "data.batch_size=128", "trainer.limit_train_batches=8", run="one")
    two = fit(*shared, "trainer.accumulate_grad_batches=2", "trainer.limit_train_batches=16", run="two")
    assert [summary_of(run)["samples_seen"] for run in (one, two)] == [1024, 1024]
    assert rows_of(one)[0]["step"] == rows_of(two)[0]["step"] == "8"
    torch.testing.assert_close(weights_of(one), weights_of(two), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("at", [7, 8, 20])
def test_a_run_with_accumulated_gradients_is_resumed_exactly(fit, tmp_path, at):
    class Stop(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.fit_loop.total_batch_idx == at:
                raise InputError("enough")

    three = ["trainer.accumulate_grad_batches=3", "augment.rotation=10"]
    whole = fit(*three, run="whole")
    with pytest.raises(InputError, match=r"enough; continue from step"):
        fit(*three, run="parts", callbacks=[Stop()])
    train(composed(f"resume={tmp_path / 'parts'}"), tmp_path / "new")
    torch.testing.assert_close(weights_of(tmp_path / "parts"), weights_of(whole), rtol=0, atol=0)
    same = [[{**row, "seconds": "", "train/images_per_second": ""} for row in rows_of(run)]
            for run in (whole, tmp_path / "parts")]  # fmt: skip
    assert same[0] == same[1]


def test_validation_before_training_leaves_no_trace(fit):
    plain, checked = fit(run="plain"), fit("trainer.num_sanity_val_steps=1", run="checked")
    torch.testing.assert_close(weights_of(plain), weights_of(checked), rtol=0, atol=0)
    assert [row["val/loss"] for row in rows_of(plain)] == [row["val/loss"] for row in rows_of(checked)]


def test_a_profile_is_written_to_the_run(fit):
    run = fit("trainer.profiler=simple", "trainer.fast_dev_run=1")
    assert "run_training_batch" in (run / "fit-profile.txt").read_text()


def test_other_arguments_reach_the_trainer(fit):
    wanted = {"detect_anomaly": True, "inference_mode": False, "min_epochs": 1, "min_steps": 3, "benchmark": True}
    seen = {}

    class Look(L.Callback):
        def on_validation_start(self, trainer, pl_module):
            seen.update(
                detect_anomaly=trainer._detect_anomaly,
                benchmark=torch.backends.cudnn.benchmark,
                inference_mode=trainer.fit_loop.epoch_loop.val_loop.inference_mode,
                min_epochs=trainer.min_epochs,
                min_steps=trainer.min_steps,
            )

    few = ["trainer.limit_train_batches=2", "trainer.max_epochs=2", "trainer.deterministic=false"]
    fit(*few, *(f"trainer.{name}={str(value).lower()}" for name, value in wanted.items()), callbacks=[Look()])
    assert seen == wanted


def test_gradients_are_clipped_by_value(fit):
    largest = []

    class Look(L.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            largest.extend(p.grad.abs().max().item() for p in pl_module.parameters() if p.grad is not None)

    fit("trainer.gradient_clip_val=0.001", "trainer.gradient_clip_algorithm=value", "trainer.limit_train_batches=2",
        callbacks=[Look()])  # fmt: skip
    assert max(largest) == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trainer.val_check_interval=0.5"], "for shorter epochs use trainer.limit_train_batches=0.25"),
        (["-m", "optim.lr=interval(0.1,1)"], "a sweep needs values, as in optim.lr=1,2; python -m "),
        (["-m", "hydra/sweeper=optuna"], "hydra/sweeper=optuna is not known; choose one of basic"),
        (["trainer.num_nodes=2"], "trainer.num_nodes is not a key: use torchrun --nnodes"),
        (["trainer.logger=false"], "use the group logger, as in logger=csv"),
        (["logger=null"], "logger=null is not an option; choose one of csv, mlflow, none, tensorboard, wandb"),
        (["debug=true"], "choose one of anomaly, fast, overfit, profile; traceback=true shows where"),
        (["callbacks.x._target_=os.path.nothing"], "_target_=os.path.nothing cannot be built ("),
        (["callbacks.x._target_=lightning.pytorch.callbacks.EarlyStopping"], "cannot be built (TypeError: "),
        (["+model._target_=os.system"], "_target_ can only be set in callbacks and logger"),
        (["model={_target_: os.system}"], "_target_ can only be set in callbacks and logger"),
    ],
)
def test_what_a_run_does_not_take_says_what_to_use(start, arguments, message):
    result = command("train", "experiment=quickstart", *arguments, cwd=start)
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert message in line


def test_callbacks_and_loggers_come_from_the_command_line_and_not_from_a_run(start, tmp_path):
    stopping = ["callbacks=[early_stopping,top_k]", "callbacks.early_stopping.patience=1"]
    own = [*stopping, "callbacks.early_stopping.min_delta=9", "logger=[csv,tensorboard]", "logger.csv.name=curves"]
    result = command("train", *TINY, *own, f"hydra.run.dir={tmp_path}", cwd=start)
    assert result.returncode == 0, result.stderr
    assert [row["epoch"] for row in rows_of(tmp_path)] == ["1", "2"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "best.ckpt", "epoch-0.ckpt", "epoch-1.ckpt", "last-previous.ckpt", "last.ckpt",
    ]  # fmt: skip
    theirs = [row["val/loss"] for row in rows_of(tmp_path, "curves/version_0/metrics.csv") if row["val/loss"]]
    assert [float(x) for x in theirs] == pytest.approx([float(row["val/loss"]) for row in rows_of(tmp_path)])
    assert "accuracy/top1_val" in EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"]
    (tmp_path / "summary.json").unlink()
    result = command("train", f"resume={tmp_path}", cwd=start)
    assert result.returncode == 1
    assert "was trained with callbacks=[early_stopping,top_k]; set them, with the same settings" in result.stderr


def test_without_a_logger_a_run_leaves_its_files(fit):
    run = fit("dashboard=full", loggers=[])
    assert not list(run.glob("events*"))
    assert rows_of(run)
    assert (run / "curves.png").exists()


def test_python_code_passes_its_own_callbacks_and_loggers(fit, tmp_path):
    stop = EarlyStopping("val/loss", patience=1, min_delta=9)
    run = fit(callbacks=[stop], loggers=[CSVLogger(tmp_path, name="csv")])
    assert stop.stopped_epoch == 1
    assert len(rows_of(run)) == 2
    assert (tmp_path / "csv" / "version_0" / "metrics.csv").exists()


@pytest.mark.slow
def test_pictures_and_metrics_reach_mlflow(start, tmp_path):
    pytest.importorskip("mlflow")
    database = tmp_path / "mlflow.db"
    place = [
        f"logger.mlflow.tracking_uri=sqlite:///{database}",
        f"logger.mlflow.artifact_location={tmp_path}/artifacts",
    ]
    few = ["dashboard=full", "trainer.max_epochs=1", f"hydra.run.dir={tmp_path / 'run'}"]
    result = command("train", *TINY, *few, "logger=mlflow", *place, cwd=start)
    assert result.returncode == 0, result.stderr
    with sqlite3.connect(database) as connection:
        metrics = dict(connection.execute("SELECT key, value FROM latest_metrics"))
        params = dict(connection.execute("SELECT key, value FROM params"))
    assert metrics["best/acc"] == metrics["val/acc"] == summary_of(tmp_path / "run")["metrics"]["val/acc"]
    assert params["model.layers"] == "1"
    assert {path.stem for path in (tmp_path / "artifacts").rglob("*.png")} >= {"batch", "confusion"}


@pytest.mark.slow
def test_pictures_and_metrics_reach_weights_and_biases(fit, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    kept: dict[str, object] = {}
    logger = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    log = type(logger.experiment).log
    monkeypatch.setattr(
        type(logger.experiment), "log", lambda self, data, *a, **k: (kept.update(data), log(self, data, *a, **k))[1]
    )
    fit("dashboard=full", "trainer.max_epochs=1", loggers=[logger])
    logger.experiment.finish()
    assert {"val/acc", "best/acc", "pictures/confusion", "pictures/batch"} <= kept.keys()
    assert list(tmp_path.rglob("*.wandb"))
