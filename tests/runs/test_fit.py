"""The train command, run as a user types it, from a directory that is not the project's."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import FEW, command, composed, needs_compiler, write_folder
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vit_lightning.data.module import ImageData
from vit_lightning.keys import InputError
from vit_lightning.recipe.classifier import ViTClassifier
from vit_lightning.runs.dashboard import flatten
from vit_lightning.runs.fit import train

SMALL = ["model.image_size=8", "model.patch_size=2", "model.layers=2", "model.mlp_head_units=[16]"]


def trained(*arguments: str, cwd: Path) -> tuple[Path, subprocess.CompletedProcess]:
    """The run directory of a command that succeeds and says nothing on standard error."""
    before = set(cwd.glob("outputs/*/*"))
    result = command("train", *arguments, cwd=cwd)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    [run] = set(cwd.glob("outputs/*/*")) - before
    return run, result


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """Where the commands are started: digits are decoded here once."""
    return tmp_path_factory.mktemp("start")


@pytest.fixture(scope="module")
def digits(start) -> tuple[Path, str]:
    run, result = trained("experiment=quickstart", "trainer.max_epochs=3", *SMALL, "seed=7", cwd=start)
    return run, result.stdout


def summary_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_a_run_leaves_its_files(digits):
    run, _ = digits
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert events
    assert names - events == {
        *("config.yaml", "hparams.yaml", "metrics.csv", "summary.json", "curves.png", "patches.png"),
        *("checkpoints/best.ckpt", "checkpoints/last.ckpt", "checkpoints/last-previous.ckpt", ".lock"),
    }


def test_the_terminal_tells_results_and_where_the_files_lie(digits):
    run, out = digits
    assert "digits: 1,149 training, 288 validation, 360 test images of 10 classes\ndevice: " in out
    assert len(re.findall(r"^ +[123]/3 ", out, re.MULTILINE)) == 3
    for file in ("checkpoints/best.ckpt", "curves.png", "patches.png", "summary.json"):
        assert f"{run.relative_to(run.parents[2])}/{file}" in out
    assert f"tensorboard --logdir {run.parent.relative_to(run.parents[2])}\n" in out
    assert f"{summary_of(run)['metrics']['test/acc']:.1%}" in out


def test_the_parts_parameters_add_up(digits):
    run, out = digits
    rows = dict(re.findall(r"^(\S.*?)  .* +([\d,]+)$", out.partition("parameters\n")[2].partition("\nepoch")[0], re.M))
    counts = {name: int(count.replace(",", "")) for name, count in rows.items()}
    total = counts.pop("total")
    assert sum(counts.values()) == total == summary_of(run)["parameters"]
    assert counts["pos_embed"] == 17 * 64


def test_metrics_csv_has_a_row_an_epoch(digits):
    run, _ = digits
    rows = rows_of(run)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [row["step"] for row in rows] == [
        str(n * summary_of(run)["samples_seen"] // 3 // batch(run)) for n in (1, 2, 3)
    ]
    assert all(value != "" for row in rows for value in row.values())
    assert float(rows[2]["train/loss"]) < float(rows[0]["train/loss"])
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)


def batch(run: Path) -> int:
    return yaml.safe_load((run / "config.yaml").read_text())["data"]["batch_size"]


def test_the_summary_tells_where_its_numbers_come_from(digits):
    run, _ = digits
    summary = summary_of(run)
    assert summary["command"].startswith("python -m vit_lightning.train experiment=quickstart trainer.max_epochs=3 ")
    assert summary["seed"] == 7
    assert summary["config"] == yaml.safe_load((run / "config.yaml").read_text())
    assert summary["config"]["model"]["num_classes"] == 10
    assert summary["config"]["model"]["channels"] == 1
    assert torch.__version__.startswith(summary["libraries"]["torch"])
    assert summary["hardware"]["cores"] >= 1
    assert summary["images"] == {"train": 1149 // batch(run) * batch(run), "val": 288, "test": 360}
    assert summary["epochs"] == 3
    assert summary["samples_seen"] == 3 * summary["images"]["train"]
    net = ViTClassifier.load_from_checkpoint(run / "checkpoints" / "best.ckpt").net
    assert summary["parameters"] == sum(p.numel() for p in net.parameters())
    assert summary["train/images_per_second"] > 0
    with (run / "metrics.csv").open() as file:
        best = max(csv.DictReader(file), key=lambda row: (float(row["val/acc"]), -float(row["val/loss"])))
    assert summary["best_epoch"] == int(best["epoch"])
    for key in ("train/loss", "train/acc", "val/loss", "val/acc"):
        assert summary["metrics"][key] == pytest.approx(float(best[key]))
    assert {"test/loss", "test/acc"} <= summary["metrics"].keys()


def test_test_metrics_are_the_best_checkpoints_on_every_test_image(digits, start):
    """Recomputed with nothing of the project but the checkpoint and the cached arrays."""
    run, _ = digits
    module = ViTClassifier.load_from_checkpoint(run / "checkpoints" / "best.ckpt", weights_only=True).eval()
    [cache] = (start / "data" / "cache").glob("digits-*")
    images = torch.from_numpy(np.load(cache / "test_images.npy")) / 255
    labels = torch.from_numpy(np.load(cache / "test_labels.npy"))
    mean, std = (torch.tensor(module.hparams[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        logits = module.net((images - mean) / std)
    summary = summary_of(run)["metrics"]
    assert summary["test/acc"] == pytest.approx((logits.argmax(-1) == labels).double().mean().item())
    assert summary["test/loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)


def test_tensorboard_shows_the_run(digits):
    run, _ = digits
    events = EventAccumulator(str(run))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    curves = ("loss/", "accuracy/top1_")
    expected = {f"{curve}{split}" for split in ("train", "val") for curve in curves}
    expected |= {f"summary/test_{name}" for name in ("loss", "acc")}
    assert expected | {"optim/lr", "loss/train_step"} <= tags
    assert not {"hp_metric", "epoch"} & tags
    for tag in tags:  # TensorBoard drops what lies before a point of an earlier step
        steps = [event.step for event in events.Scalars(tag)]
        assert steps == sorted(steps), tag
    assert len(events.Scalars("accuracy/top1_val")) == 3
    assert events.Scalars("accuracy/best_val")[-1].value == pytest.approx(summary_of(run)["metrics"]["val/acc"])
    assert yaml.safe_load((run / "hparams.yaml").read_text())["model.layers"] == 2
    assert events.Scalars("summary/test_acc")[0].value == pytest.approx(summary_of(run)["metrics"]["test/acc"])


def test_last_is_the_last_epochs_checkpoint_and_best_the_bests(digits):
    run, _ = digits
    epochs = {
        name: torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)["epoch"] for name in ("best", "last")
    }
    assert epochs == {"best": summary_of(run)["best_epoch"] - 1, "last": 2}  # Lightning counts from zero


def test_a_directory_that_holds_a_run_is_not_written_to(digits, start):
    run, _ = digits
    before = (run / "summary.json").read_text()
    result = command("train", "data=digits", *FEW, f"hydra.run.dir={run}", cwd=start)
    assert result.returncode == 1
    hint = "choose a new hydra.run.dir (in a sweep hydra.sweep.dir) or remove that setting"
    assert result.stderr == f"error: {run.relative_to(start)} contains another run; {hint}\n"
    assert (run / "summary.json").read_text() == before


def test_pictures_are_there(digits):
    run, _ = digits
    for name in ("curves.png", "patches.png"):
        with Image.open(run / name) as image:
            assert min(image.size) > 300


def test_a_seed_repeats_a_run_bit_for_bit_and_another_does_not(digits, start):
    run, _ = digits
    again, _ = trained("experiment=quickstart", "trainer.max_epochs=3", *SMALL, "seed=7", cwd=start)
    other, _ = trained("experiment=quickstart", "trainer.max_epochs=3", *SMALL, "seed=8", cwd=start)
    first = weights_of(run)
    assert all(torch.equal(first[name], value) for name, value in weights_of(again).items())
    assert summary_of(run)["metrics"] == summary_of(again)["metrics"]
    assert not all(torch.equal(first[name], value) for name, value in weights_of(other).items())


@pytest.mark.slow
def test_an_image_folder_trains_at_the_defaults_of_everything_else(tmp_path):
    write_folder(tmp_path / "data" / "pets", {"cat": (40, 10), "dog": (40, 10)})
    arguments = ["data=image_folder", "data.root=data/pets", *FEW, "trainer.precision=bf16-mixed"]
    run, _ = trained(*arguments, "data.batch_size=8", cwd=tmp_path)
    summary = summary_of(run)
    assert summary["config"]["model"]["num_classes"] == 2
    assert summary["images"] == {"train": 4 * 8, "val": 8, "test": 20}
    assert summary["samples_seen"] == 2 * 4 * 8
    module = ViTClassifier.load_from_checkpoint(run / "checkpoints" / "best.ckpt")
    assert module.hparams["class_names"] == ["cat", "dog"]
    assert module.net.pos_embed.shape == (1, 145, 64)


def test_a_sweep_names_its_jobs_and_ends_with_a_table(start):
    sweep = ["-m", "data=digits", *FEW, *SMALL, "model.layers=1,2", "trainer.check_val_every_n_epoch=2"]
    result = command("train", *sweep, "hydra.sweep.dir=sweep", cwd=start)
    assert result.returncode == 0, result.stderr
    jobs = [start / "sweep" / f"model.layers-{layers}" for layers in (1, 2)]
    assert [summary_of(job)["config"]["model"]["layers"] for job in jobs] == [1, 2]
    assert [summary_of(job)["overrides"].count("model.layers=1") for job in jobs] == [1, 0]
    assert summary_of(jobs[1])["command"].startswith("python -m vit_lightning.train data=digits trainer.max_epochs=2 ")
    assert "model.layers=2" in summary_of(jobs[1])["command"].split()
    with (jobs[0] / "metrics.csv").open() as file:
        assert [row["val/acc"] == "" for row in csv.DictReader(file)] == [True, False]
    with (start / "sweep" / "summary.csv").open() as file:
        table = list(csv.DictReader(file))
    best = sorted((summary_of(job)["metrics"]["val/acc"] for job in jobs), reverse=True)
    assert [float(row["val/acc"]) for row in table] == pytest.approx(best)
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[-4:]] == [
        *(row["setting"] for row in table),
        *("sweep/summary.csv", "sweep/summary.png"),
    ]
    Image.open(start / "sweep" / "summary.png").verify()


@pytest.mark.slow
def test_a_sweep_started_again_runs_what_has_not_finished(start):
    """One job done, one killed after its first epoch, one new."""
    tiny = ["data=digits", *FEW, *SMALL, "trainer.max_epochs=3"]
    assert command("train", *tiny, "seed=0", "hydra.run.dir=again/seed-0", cwd=start).returncode == 0
    killed = start / "again" / "seed-1"
    arguments = [sys.executable, "-m", "vit_lightning.train", *tiny, "seed=1", f"hydra.run.dir={killed}"]
    with subprocess.Popen(arguments, cwd=start, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.split()[:1] == ["2/3"]:
                process.kill()
    result = command("train", "-m", *tiny, "seed=0,1,2", "hydra.sweep.dir=again", cwd=start)
    assert result.returncode == 0, result.stderr
    assert "again/seed-0 is already finished: val/acc" in result.stdout
    assert "continuing again/seed-1 from step " in result.stdout
    started = [line for line in result.stdout.splitlines() if line.startswith("  1/3 ")]
    assert len(started) == 1  # seed 2
    for seed in range(3):
        assert len(rows_of(start / "again" / f"seed-{seed}")) == 3


def test_a_preset_is_a_sweep(start):
    tiny = ["data=digits", *FEW, "model.image_size=16", "model.layers=1", "model.mlp_head_units=[]"]
    where = ["hydra.sweep.dir=preset", "dashboard=curves"]
    result = command("train", "sweep=patch_size", "model.patch_size=4,8", *tiny, *where, cwd=start)
    assert result.returncode == 0, result.stderr
    names = {path.parent.name for path in (start / "preset").glob("*/summary.json")}
    assert names == {"model.patch_size-4", "model.patch_size-8"}


def test_an_ablation_is_a_sweep_over_files_that_change_one_thing(start):
    tiny = ["data=digits", "data.val_fraction=0.2", "model.image_size=16", "model.embed_dim=32", "trainer.max_epochs=1"]
    sweep = ["-m", "experiment=ablation", "ablation=glob([ba*,cos*])", "hydra.sweep.dir=ablation"]
    result = command("train", *sweep, *tiny, cwd=start)
    assert result.returncode == 0, result.stderr
    jobs = {path.parent.name: summary_of(path.parent) for path in start.glob("ablation/*/summary.json")}
    base = flatten(jobs["ablation-base"]["config"])
    changed = {
        name: {key for key, value in flatten(job["config"]).items() if value != base[key]} for name, job in jobs.items()
    }
    assert changed == {"ablation-base": set(), "ablation-cosine": {"optim.schedule"}}


def test_a_failing_job_stops_no_other_and_fails_the_sweep(start):
    sweep = ["-m", "data=digits", *FEW, *SMALL, "model.heads=5,2,7", "hydra.sweep.dir=failing"]
    result = command("train", *sweep, cwd=start)
    assert result.returncode == 1
    for job, heads in ((0, 5), (2, 7)):
        [line] = [line for line in result.stderr.splitlines() if line.startswith(f"job {job} (")]
        message = f"error: model.embed_dim=64 is not divisible by model.heads={heads}"
        assert line.startswith(f"job {job} (model.heads-{heads}): {message}")
        assert message in (start / "failing" / f"model.heads-{heads}" / "error.txt").read_text()
    header, *failed = result.stderr.splitlines()[-3:]
    assert header == "error: 2 of the sweep's jobs failed:"
    for line, heads in zip(failed, (5, 7), strict=True):
        assert line.startswith(f"  failing/model.heads-{heads}: error: model.embed_dim=64 is not divisible by")
    assert [path.parent.name for path in (start / "failing").rglob("summary.json")] == ["model.heads-2"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.layerz=1,2", "model.layerz is not a key; did you mean model.layers?"),
        ("+model.layerz=1,2", "model.layerz is not a key; did you mean model.layers?"),
        ("model.layers=1,2,1", "model.layers=1,2,1 has 1 twice; the jobs of a sweep must differ"),
        ("model.layers=range(4,2)", "model.layers=range(4,2) has no value; give some, as in model.layers=1,2"),
        ("model.layers=1,many", "model.layers=many"),
        ("sweep=layerz", "sweep=layerz is not known; choose one of layers_width, lr_decay, patch_size, seeds"),
    ],
)
def test_an_impossible_grid_ends_before_its_first_job(tmp_path, setting, message):
    result = command("train", "-m", "data=digits", setting, "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not list(tmp_path.glob("sweep/*/*"))


@pytest.mark.slow
def test_ctrl_c_says_where_the_run_lies(start):
    before = set(start.glob("outputs/*/*"))
    arguments = [sys.executable, "-u", "-m", "vit_lightning.train", "experiment=quickstart", *SMALL]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    heeded = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job's shell has it ignored
    with subprocess.Popen(arguments, cwd=start, **pipes, preexec_fn=heeded) as process:
        while not process.stdout.readline().lstrip().startswith("2/"):
            assert process.poll() is None
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
    [run] = set(start.glob("outputs/*/*")) - before
    assert process.returncode == 130
    stopping, interrupted = stderr.splitlines()
    assert stopping == "saving and stopping; press Ctrl-C again to quit immediately"
    where = run.relative_to(start)
    assert re.fullmatch(rf"interrupted at step \d+; continue with resume={where}", interrupted)
    assert (run / "checkpoints" / "last.ckpt").exists()
    assert (run / "curves.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_the_test_says_so_too(start, number, code):
    before = set(start.glob("outputs/*/*"))
    script = (
        "import runpy, signal; from vit_lightning.recipe.classifier import ViTClassifier as Classifier\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"def interrupted(*_): signal.raise_signal({int(number)})\n"
        "Classifier.test_step = interrupted; runpy.run_module('vit_lightning.train', run_name='__main__')"
    )
    arguments = [sys.executable, "-c", script, "data=digits", *FEW, "data.eval_batch_size=32", *SMALL]
    result = subprocess.run(arguments, cwd=start, capture_output=True, text=True)
    [run] = set(start.glob("outputs/*/*")) - before
    assert result.returncode == code
    assert result.stderr.endswith(f"; continue with resume={run.relative_to(start)}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data=digits", "model.channels=3"], "model.channels=3, but data.source=digits has 1; leave"),
        (["data=digits", "data.batch_size=5000"], "data.batch_size=5000 exceeds the 1293 training images"),
        (
            ["data=digits", "trainer.limit_val_batches=0.1"],
            "rounds down to 0 of 1 batches; use trainer.limit_val_batches=1",
        ),
        (["data=digits", "trainer=cpu", "trainer.precision=16-mixed"], "use trainer.precision=bf16-mixed"),
        (
            ["data=image_folder", "data.root=nowhere"],
            "data.root=nowhere is not a directory; data.root needs train/<class>/*",
        ),
    ],
)
def test_what_does_not_fit_data_or_machine_is_refused(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        train(composed(*arguments), tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_exhausted_memory_says_what_to_reduce(tmp_path, monkeypatch):
    """More bytes than any machine can address."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^out of memory; reduce data\.batch_size, model\.image_size, or "):
        train(composed("data=digits", "model.mlp_head_units=[1000000000000000]"), tmp_path / "run")


@pytest.mark.slow
def test_a_run_killed_while_its_figures_are_drawn_is_finished(start):
    script = (
        "import os, runpy; from vit_lightning.runs.dashboard import Dashboard\n"
        "Dashboard.show_best = lambda *_: os._exit(9)\n"
        "runpy.run_module('vit_lightning.train', run_name='__main__', alter_sys=True)"
    )
    arguments = ["data=digits", *FEW, *SMALL, "hydra.run.dir=figures"]
    assert subprocess.run([sys.executable, "-c", script, *arguments], cwd=start, capture_output=True).returncode == 9
    result = command("train", *arguments, cwd=start)
    assert result.returncode == 0, result.stderr
    assert (
        result.stdout
        == f"figures is already finished: val/acc {summary_of(start / 'figures')['metrics']['val/acc']:.1%}\n"
    )


def test_without_data_and_network_the_command_says_what_to_do_and_leaves_nothing(tmp_path):
    """A proxy that is not there stands for a network that is not there."""
    environment = {**os.environ, "https_proxy": "http://127.0.0.1:9"}
    result = command("train", "data=cifar100", cwd=tmp_path, env=environment)
    assert result.returncode == 1
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("error: data=cifar100: data/cifar-100-python has no valid copy, and https://")
    assert "put that archive at data/cifar-100-python.tar.gz" in line
    assert "data=digits, which needs no download" in line
    assert list(tmp_path.glob("outputs/*/*")) == []


@pytest.mark.slow
@needs_compiler
def test_a_compiled_run_leaves_an_ordinary_checkpoint(start):
    arguments = ["experiment=quickstart", *FEW, *SMALL, "model.layers=1"]
    run, _ = trained(*arguments, "compile=true", cwd=start)
    plain, _ = trained(*arguments, cwd=start)
    assert weights_of(run).keys() == weights_of(plain).keys()
    assert not torch.equal(weights_of(run)["net.head.0.weight"], weights_of(plain)["net.head.0.weight"])  # other masks


@pytest.mark.slow
def test_without_a_compiler_a_run_says_so_and_goes_on(start, tmp_path):
    environment = {**os.environ, "CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    arguments = [sys.executable, "-m", "vit_lightning.train", "data=digits", *FEW, *SMALL, "compile=true"]
    result = subprocess.run(arguments, cwd=start, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    [line] = result.stderr.splitlines()
    assert line.startswith("warning: compile=true fails (")
    assert line.endswith("); continuing without torch.compile")


RECIPE = ["optim=muon", "augment=crop", "augment.mixup=0.2", "model.pool=mean", "model.zero_init=true"]


@pytest.mark.slow
def test_an_interrupted_run_ends_as_if_it_had_not_been(start):
    """Killed between two epochs; also with two optimizers, an average of the weights and mixed images."""
    arguments = ["data=digits", *SMALL, *RECIPE, "trainer.max_epochs=4", "data.batch_size=256"]
    whole, _ = trained(*arguments, "hydra.run.dir=outputs/resume/whole", cwd=start)
    run = start / "outputs/resume/killed"
    killed = [sys.executable, "-m", "vit_lightning.train", *arguments, f"hydra.run.dir={run}"]
    with subprocess.Popen(killed, cwd=start, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.split()[:1] == ["3/4"]:  # its checkpoint may be written or not
                process.kill()
    assert not (run / "summary.json").exists()
    result = command("train", f"resume={run}", cwd=start)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    for one, other in zip(weights_of(whole).values(), weights_of(run).values(), strict=True):
        assert torch.equal(one, other)
    rows, expected = rows_of(run), rows_of(whole)
    timed = ("seconds", "train/images_per_second")
    assert [{k: v for k, v in row.items() if k not in timed} for row in rows] == [
        {k: v for k, v in row.items() if k not in timed} for row in expected
    ]
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)
    ours, theirs = summary_of(run), summary_of(whole)
    for key in ("metrics", "samples_seen", "images", "best_epoch", "config"):
        assert ours[key] == theirs[key]
    assert ours["command"].endswith(f"hydra.run.dir={run}")
    assert ours["overrides"] == arguments
    assert [start["overrides"] for start in ours["resumed"]] == [[f"resume={run}"]]
    assert theirs["resumed"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limits", "refused", "more"),
    [
        (
            ["trainer.max_epochs=100000", "trainer.max_time=00:00:00:02", "optim.clock=time"],
            (
                "trainer.max_epochs=200000",
                "finished (trainer.max_time=00:00:00:02); to extend it, set a higher trainer.max_time",
            ),
            "trainer.max_time=00:00:00:04",
        ),
        (
            ["target_acc=0.3"],
            ("target_acc=0.3", "is already finished (target_acc=0.3); to extend it, set a higher target_acc"),
            "target_acc=0.5",
        ),
    ],
)
def test_a_run_goes_on_with_more_of_what_ended_it(start, limits, refused, more):
    run, _ = trained("experiment=quickstart", *SMALL, *limits, cwd=start)
    before = rows_of(run)
    result = command("train", f"resume={run}", refused[0], cwd=start)
    assert result.returncode == 1
    assert refused[1] in result.stderr
    result = command("train", f"resume={run}", more, cwd=start)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    rows, summary = rows_of(run), summary_of(run)
    assert rows[: len(before)] == before
    assert [int(row["epoch"]) for row in rows] == list(range(1, len(rows) + 1))
    steps = [int(row["step"]) for row in rows]
    assert len(rows) > len(before)
    assert steps == sorted(set(steps))
    if more.startswith("target"):
        assert [float(row["val/acc"]) >= 0.5 for row in rows] == [False] * (len(rows) - 1) + [True]
    else:
        assert 4 <= summary["seconds"] < 60
        assert float(rows[-1]["lr"]) < 2e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resume={run}"], "is already finished"),
        (["resume=nowhere"], "resume=nowhere is not the directory of a run"),
        (["resume={run}", "optim.lr=1"], "remove optim.lr"),
    ],
)
def test_what_cannot_be_resumed_is_said(digits, tmp_path, arguments, message):
    run, _ = digits
    before = (run / "summary.json").read_text()
    with pytest.raises(InputError, match=message):
        train(composed(*(argument.format(run=run) for argument in arguments)), tmp_path)
    assert (run / "summary.json").read_text() == before


def test_the_average_of_the_weights_is_what_is_validated_tested_and_kept(start, tmp_path):
    """A decay so slow that the average stays near the start, while the weights themselves learn."""
    config = composed("data=digits", *SMALL, "trainer.max_epochs=2", "optim.lr=1e-2", "optim.ema=0.99")
    config.data.cache_dir = str(start / "data" / "cache")
    train(config, tmp_path)
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    average, raw = saved["state_dict"], saved["current_model_state"]
    assert not torch.equal(average["net.head.0.weight"], raw["net.head.0.weight"])

    data = ImageData(config.data, config.model.image_size)
    data.setup()
    classifier = ViTClassifier.load_from_checkpoint(tmp_path / "checkpoints" / "last.ckpt").eval()
    correct = total = 0
    with torch.no_grad():
        for images, labels in data.val_dataloader():
            logits = classifier(images)
            correct += int((logits.argmax(1) == labels).sum())
            total += len(labels)
    assert float(rows_of(tmp_path)[-1]["val/acc"]) == pytest.approx(correct / total)


def test_training_stops_at_its_target_and_the_summary_says_when_each_mark_was_passed(start):
    run, _ = trained("experiment=quickstart", *SMALL, "target_acc=0.4", cwd=start)
    summary = summary_of(run)
    rows = [{key: float(value) for key, value in row.items()} for row in rows_of(run)]
    reached = [row["val/acc"] >= 0.4 for row in rows]
    assert reached == [False] * (len(rows) - 1) + [True]
    marks = summary["seconds_to_val_acc"]
    assert list(marks)[:2] == ["5%", "10%"]
    assert marks["40%"] <= rows[-1]["seconds"] == summary["seconds"]
    assert list(marks.values()) == sorted(marks.values())


@pytest.mark.slow
def test_by_time_a_schedule_ends_with_the_time_and_the_test_images_can_be_left_alone(start):
    arguments = ["trainer.max_epochs=100000", "trainer.max_time=00:00:00:03", "optim.clock=time", "test=false"]
    run, result = trained("experiment=quickstart", *SMALL, *arguments, cwd=start)
    rates = [float(row["lr"]) for row in rows_of(run)]
    assert max(rates) > 1e-3
    assert rates[-1] < 2e-4
    peak = rates.index(max(rates))
    assert rates == sorted(rates[:peak]) + sorted(rates[peak:], reverse=True)
    assert len(re.findall(r" \d+ s$", result.stdout, re.MULTILINE)) == len(
        rates
    )  # of three, whatever 100,000 epochs would take
    summary = summary_of(run)
    assert 3 <= summary["seconds"] < 60
    assert len(rates) == summary["epochs"] < 100000
    assert all(row["val/acc"] for row in rows_of(run))
    assert summary["images"]["test"] == 0
    assert not [name for name in summary["metrics"] if name.startswith("test")]
    assert "\nvalidation  " in result.stdout
    assert "\ntest  " not in result.stdout


def test_time_may_be_over_within_the_first_epoch(start):
    arguments = ["data.batch_size=1", "trainer.max_time=00:00:00:01", "trainer.max_epochs=9"]
    run, _ = trained("experiment=quickstart", *arguments, cwd=start)
    [row] = rows_of(run)
    summary = summary_of(run)
    assert summary["samples_seen"] == summary["images"]["train"] < 1149
    assert summary["samples_seen"] / float(row["train/images_per_second"]) < float(row["seconds"])


def test_a_run_that_ends_before_its_first_validation_says_so(start):
    time_is_over = ["data.batch_size=1", "trainer.max_time=00:00:00:01", "trainer.check_val_every_n_epoch=2"]
    result = command("train", "experiment=quickstart", *time_is_over, "hydra.run.dir=unvalidated", cwd=start)
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert line.startswith("error: the run ended before its first validation; set trainer.check_val_every_n_epoch=1; ")
    assert not (start / "unvalidated" / "checkpoints" / "best.ckpt").exists()
