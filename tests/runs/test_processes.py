"""One run in two processes: started by one command, and as two nodes by torchrun."""

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import command, composed, write_folder

from vit_lightning.data.module import BatchIndices
from vit_lightning.keys import InputError
from vit_lightning.runs.processes import placement

pytestmark = pytest.mark.slow

TINY = ["data=digits", "model.image_size=8", "model.patch_size=2", "model.layers=2", "model.mlp_head_units=[16]"]
TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_epochs=3", "data.batch_size=64"]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(("shuffle", "count", "batch"), [(True, 103, 10), (False, 103, 10), (False, 5, 256)])
@pytest.mark.parametrize("processes", [2, 5])
@pytest.mark.parametrize("balanced", [False, True])
def test_processes_share_every_batch(shuffle, count, batch, processes, balanced):
    indices = torch.arange(1000, 1000 + count)
    alone = BatchIndices(indices, batch, shuffle, seed=3)
    shares = [BatchIndices(indices, batch, shuffle, 3, (rank, processes)) for rank in range(processes)]
    for epoch in (0, 1):
        for sampler in (alone, *shares):
            sampler.weights = torch.linspace(1, 9, count) if balanced else None
            sampler.set_epoch(epoch)
        parts = [list(share) for share in shares]
        assert {len(part) for part in parts} == {len(alone)}
        assert all(len(piece) for part in parts for piece in part)
        together = [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
        if shuffle:  # the very same steps
            assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
        else:
            assert torch.equal(torch.cat(together), indices)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A directory with the same run in one process and in two, without randomness in a step."""
    start = tmp_path_factory.mktemp("runs")
    plain = [*TINY, *TWO[3:], "augment=none", "model.dropout=0", "model.head_dropout=0"]
    result = command("train", *plain, "trainer=cpu", "hydra.run.dir=one", cwd=start)
    assert result.returncode == 0, result.stderr
    for name in ("ddp", "fsdp", "norms"):
        two = [f"trainer={name.replace('norms', 'ddp')}", *TWO[1:3], f"hydra.run.dir={name}"]
        two += ["model.patch_embed=conv", "model.pool=mean", "optim.ema=0.9"] * (name == "norms")
        result = run("-m", "vit_lightning.train", *plain, *two, cwd=start)
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        (start / f"{name}.txt").write_text(result.stdout)
    return start


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_one_command_trains_in_two_processes_and_leaves_one_run(runs, name):
    summary, out = summary_of(runs / name), (runs / f"{name}.txt").read_text()
    assert summary["processes"] == 2
    assert summary["images"] == {"train": 1293 // 64 * 64, "val": 144, "test": 360}
    assert summary["samples_seen"] == 3 * (1293 // 64 * 64)
    with (runs / name / "metrics.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3"]
    assert out.count("  1/3 ") == 1
    assert out.count("best of 3 epochs") == 1
    step = "2 processes, 32 of the 64 images per step in each; gradients are averaged"
    assert step in out
    assert summary["step"].startswith(step)
    assert not (runs / "outputs").exists()


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_steps_are_those_of_one_process(runs, name):
    """Up to the order of sums."""
    ours, alone = summary_of(runs / name)["metrics"], summary_of(runs / "one")["metrics"]
    for key in ("train/loss", "val/loss", "test/loss"):
        assert ours[key] == pytest.approx(alone[key], rel=1e-3), key


@pytest.mark.parametrize("name", ["ddp", "fsdp", "norms"])
def test_every_image_counts_once(runs, name):
    """The same numbers as one process has, from the same weights."""
    metrics = summary_of(runs / name)["metrics"]
    for split in ("val", "test"):
        result = command("evaluate", f"checkpoint={name}", f"split={split}", f"hydra.run.dir={name}-{split}", cwd=runs)
        assert result.returncode == 0, result.stderr
        alone = json.loads((runs / f"{name}-{split}" / "evaluation.json").read_text())
        for key in ("acc", "loss"):
            assert metrics[f"{split}/{key}"] == pytest.approx(alone[key], abs=1e-6), key


KILLED = """
import os, runpy
from vit_lightning.runs.checkpoints import Saver
save = Saver._save
def save_and_die(self, trainer, module, best=False):
    save(self, trainer, module, best)
    if trainer.global_step == 45: os._exit(9)
Saver._save = save_and_die
runpy.run_module("vit_lightning.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("name", ["one", "ddp", "fsdp"])
def test_a_run_moves_between_one_process_and_two_within_an_epoch(runs, name):
    """Killed after 5 of the 20 steps of its last epoch; every image counts once, as in the run that was not killed."""
    start, folder = runs, runs / f"{name}-moved"
    plain = [*TINY, *TWO[3:], "augment=none", "model.dropout=0", "model.head_dropout=0", "save_minutes=0"]
    several = [f"trainer={name}", *TWO[1:3]]
    first, then = (["trainer=cpu"], ["trainer=ddp", *TWO[1:3]]) if name == "one" else (several, ["trainer=cpu"])
    (start / "killed.py").write_text(KILLED)
    assert run("killed.py", *plain, *first, f"hydra.run.dir={folder.name}", cwd=start).returncode != 0
    result = run("-m", "vit_lightning.train", f"resume={folder.name}", *then, cwd=start)
    assert result.returncode == 0, result.stderr
    ours, expected = summary_of(folder), summary_of(start / "one")
    assert ours["processes"] == (2 if name == "one" else 1)
    assert ours["images"] == expected["images"]
    assert ours["samples_seen"] == expected["samples_seen"]
    with (folder / "metrics.csv").open() as file, (start / "one" / "metrics.csv").open() as other:
        for row, theirs in zip(csv.DictReader(file), csv.DictReader(other), strict=True):
            assert float(row["train/loss"]) == pytest.approx(float(theirs["train/loss"]), rel=1e-3)
            assert float(row["train/acc"]) == pytest.approx(float(theirs["train/acc"]), abs=5 / 1280)


def test_a_process_that_dies_ends_the_others_with_one_line(runs):
    (runs / "one_dies.py").write_text(KILLED.replace("os._exit(9)", "trainer.strategy.launcher.procs[0].kill()"))
    result = run("one_dies.py", *TINY, *TWO, "save_minutes=0", "hydra.run.dir=dies", cwd=runs)
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert line.startswith("error: another process of this run ended; ")
    assert line.endswith("; continue from step 45 with resume=dies")


def test_processes_report_a_loss_of_nan_once(runs):
    result = run("-m", "vit_lightning.train", *TINY, *TWO, "optim.lr=1e30", "hydra.run.dir=nan", cwd=runs)
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert line.startswith("error: train/loss is ")
    assert len(json.loads((runs / "nan" / "nan.json").read_text())["images"]) == 32


def test_more_processes_than_images_are_refused(tmp_path):
    write_folder(tmp_path / "images", {"a": (40, 2), "b": (40, 1)})
    folder = ["data=image_folder", "data.root=images", *TINY[1:], *TWO, "trainer.devices=4"]
    result = run("-m", "vit_lightning.train", *folder, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr == "error: 4 processes need at least as many test images; there are 3\n"


def test_two_nodes_of_torchrun_make_one_run(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    node = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=test"]
    arguments = ["-m", "vit_lightning.train", *TINY, *TWO, "trainer.check_val_every_n_epoch=2"]  # not after the last
    nodes = [
        subprocess.Popen(
            [sys.executable, *node, f"--rdzv-endpoint=127.0.0.1:{port}", *arguments],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    for process in nodes:
        _, stderr = process.communicate()
        assert process.returncode == 0, stderr
    [folder] = [path for path in tmp_path.glob("outputs/*/*") if any(path.iterdir())]
    assert summary_of(folder)["processes"] == 2
    assert summary_of(folder)["images"]["val"] == 144
    assert len(list(tmp_path.glob("outputs/*/*"))) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trainer.devices=2"], "trainer.devices=2 needs trainer=ddp or trainer=fsdp"),
        ([*TWO, "data.batch_size=63"], "data.batch_size=63 cannot be divided among 2 processes; try"),
        ([*TWO, "data.eval_batch_size=3"], "data.eval_batch_size=3 is too small for 2 processes"),
        ([*TWO, "optim.clock=time"], "optim.clock=time needs a single device"),
        (["trainer=fsdp", "optim.ema=0.9"], "trainer.strategy=fsdp needs optim.name=adamw and optim.ema=0"),
        (["trainer=ddp", "trainer.devices=0"], "trainer.devices=0 must be at least 1, or -1"),
    ],
)
def test_what_does_not_go_together_is_said(arguments, message):
    with pytest.raises(InputError) as error:
        composed("data=digits", *arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("environment", "strategy", "message"),
    [
        (
            {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"},
            "auto",
            "use trainer=ddp or trainer=fsdp",
        ),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, "ddp", "srun --ntasks-per-node=1 torchrun"),
    ],
)
def test_processes_that_cannot_form_a_run_are_refused(environment, strategy, message, monkeypatch):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(InputError, match=message):
        placement(composed("data=digits", f"trainer.strategy={strategy}"))


def test_a_sweep_of_runs_on_several_devices_is_refused(tmp_path):
    result = command("train", "-m", *TINY, *TWO, "seed=0,1", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr == "error: trainer.strategy=ddp is for single runs; a sweep uses one device\n"
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"multirun.yaml"}  # Hydra's own
