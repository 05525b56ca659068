"""Checkpoints that are damaged, and runs that are killed, interrupted and resumed."""

import csv
import hashlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import command, composed, started
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vit_lightning.files import RunFiles, write_atomic
from vit_lightning.keys import InputError, Invocation, flatten
from vit_lightning.recipe.weights import load_classifier, read_checkpoint
from vit_lightning.runs.checkpoints import VerifiedCheckpointIO, latest_valid
from vit_lightning.runs.run import Run, check_same_data, find_run

TINY = ["data=digits", "model.image_size=8", "model.patch_size=2", "model.layers=2", "model.mlp_head_units=[16]"]
RECIPE = [*TINY, "optim=muon", "augment=crop", "augment.mixup=0.2", "model.pool=mean", "model.zero_init=true"]


def write(path: Path, **content) -> None:
    VerifiedCheckpointIO().save_checkpoint(content, path)


@pytest.fixture
def files(tmp_path) -> RunFiles:
    """A run with a checkpoint after step 2 and one after step 1."""
    files = RunFiles(tmp_path)
    write(files.previous, global_step=1)
    write(files.last, global_step=2, weights=torch.randn(1000))
    return files


def test_a_checkpoint_can_be_read_by_torch_alone(tmp_path):
    path, weight = tmp_path / "new" / "last.ckpt", torch.randn(7, 3)
    write(path, weight=weight, epoch=3)
    for loaded in (read_checkpoint(path), torch.load(path, weights_only=True)):
        assert loaded["epoch"] == 3
        assert torch.equal(loaded["weight"], weight)


@pytest.mark.parametrize("sealed", [False, True])
def test_every_flipped_bit_is_reported_or_harmless(tmp_path, sealed):
    """Also in checkpoints of earlier versions, which end in a SHA-256."""
    path, weight = tmp_path / "last.ckpt", torch.randn(1000)
    write(path, weight=weight, step=3)
    data = path.read_bytes()
    end = b"\nvit_lightning sha256 " + hashlib.sha256(data).hexdigest().encode() if sealed else b""
    path.write_bytes(data + end)
    assert torch.equal(read_checkpoint(path)["weight"], weight)
    rng, reported = random.Random(0), 0
    for _ in range(200):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(damaged) + end)
        try:
            content = read_checkpoint(path)
        except InputError:
            reported += 1
        else:
            assert content["step"] == 3
            assert torch.equal(content["weight"], weight)
    assert reported > 100


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "half"])
def test_a_corrupt_checkpoint_is_reported_and_the_one_before_it_is_used(files, damage):
    path, content, problems = latest_valid(files)
    assert (path, content["global_step"], problems) == (files.last, 2, [])
    data = bytearray(files.last.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    files.last.write_bytes({"cut": data[:-1], "flip": data, "empty": b"", "half": data[: len(data) // 2]}[damage])
    reason = "checksum mismatch" if damage == "flip" else "truncated or overwritten"
    for read in (read_checkpoint, VerifiedCheckpointIO().load_checkpoint):
        with pytest.raises(InputError) as error:
            read(files.last)
        assert str(error.value) == f"{files.last} is corrupt ({reason})"
    path, content, problems = latest_valid(files)
    assert (path, content["global_step"], problems) == (files.previous, 1, [f"{files.last} is corrupt ({reason})"])


@pytest.mark.parametrize("content", [{"weights": 1}, [1, 2], torch.ones(3)])
def test_a_file_of_torch_that_is_not_a_checkpoint_is_skipped(files, content):
    torch.save(content, files.last)
    path, _, [problem] = latest_valid(files)
    assert path == files.previous
    assert "last.ckpt is not a checkpoint" in problem


def test_a_checkpoint_that_cannot_be_read_is_skipped(files):
    files.last.unlink()
    files.last.mkdir()
    path, _, [problem] = latest_valid(files)
    assert path == files.previous
    assert problem.endswith("last.ckpt cannot be read (Is a directory)")


def test_lightning_is_given_the_content_that_was_already_read_once(files):
    plugin = VerifiedCheckpointIO({"global_step": 7})
    assert plugin.load_checkpoint(files.last)["global_step"] == 7
    assert plugin.load_checkpoint(files.last)["global_step"] == 2


def test_a_file_is_complete_or_unchanged(small_disk):
    path = small_disk / "summary.json"
    write_atomic(path, "before")
    with pytest.raises(OSError, match="No space left") as error:
        write_atomic(path, bytes(20_000_000))
    assert error.value.filename == str(path)
    assert path.read_text() == "before"
    assert list(small_disk.iterdir()) == [path]  # the incomplete file takes no space
    write_atomic(path, b"after")
    assert path.read_bytes() == b"after"


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("kind", ["pickle", "torch", "yaml", "zip"])
def test_no_code_in_a_checkpoint_is_executed(tmp_path, kind):
    """The message is ours: torch's would advise to load the file without protection."""
    path, proof = tmp_path / "evil.ckpt", tmp_path / "it-ran"
    content = {"state_dict": Malicious(proof), "hyper_parameters": {}}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    elif kind == "torch":
        torch.save(content, path)
    elif kind == "yaml":
        path.write_text("model: {layers: 3}\n")
    else:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.txt", "text")
    with pytest.raises(InputError, match=r"evil\.ckpt is (corrupt or )?not a checkpoint") as error:
        load_classifier(str(path))
    assert "weights_only" not in str(error.value)
    assert not proof.exists()
    if kind == "torch":  # the code does run without protection
        torch.load(path, weights_only=False)
        assert proof.exists()


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("start")


@pytest.fixture(scope="module")
def whole(start) -> Path:
    """An uninterrupted run, with every component that has a state."""
    command("train", "--help", cwd=start)  # the first command starts the server that all use
    begin = time.monotonic()
    result = command("train", *RECIPE, *SHORT, "hydra.run.dir=whole", cwd=start)
    assert result.returncode == 0, result.stderr
    (start / "seconds").write_text(str(time.monotonic() - begin))
    return start / "whole"


# A checkpoint after every step, and a point of the curves too.
SHORT = ["trainer.max_epochs=3", "data.batch_size=64", "trainer.log_every_n_steps=1", "dashboard=curves"]


def rows_of(run: Path) -> list[dict[str, str]]:
    timed = ("seconds", "train/images_per_second")
    with (run / "metrics.csv").open() as file:
        return [{key: value for key, value in row.items() if key not in timed} for row in csv.DictReader(file)]


def curves_of(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith(("speed/", "summary/seconds"))]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def assert_same_run(run: Path, other: Path) -> None:
    """Weights, averages, optimizers, metrics and curves, bit for bit, without gaps or points that come twice."""
    for name in ("last", "best"):
        ours, theirs = (read_checkpoint(folder / "checkpoints" / f"{name}.ckpt") for folder in (run, other))
        for part in ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "averaging_state"):
            torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)
        assert ours["global_step"] == theirs["global_step"]
    assert rows_of(run) == rows_of(other)
    assert curves_of(run) == curves_of(other)
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (run, other))
    for key in ("metrics", "samples_seen", "images", "epochs", "best_epoch"):
        assert ours[key] == theirs[key], key


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(start, whole, tmp_path):
    """By SIGKILL, twenty times and more, while it saves after every step.

    Ten times just after it has saved or while it does, and ten times at any moment of its life, start and end included;
    where it has come to its end before that, another one takes its place.
    """
    rng = random.Random(0)
    life = float((start / "seconds").read_text())
    ones = [start / "killed-0"]
    kills = writing = 0
    while kills < 20 or not (ones[-1] / "summary.json").exists():
        if (ones[-1] / "summary.json").exists():
            ones.append(start / f"killed-{len(ones)}")
        run = ones[-1]
        unfinished = run / "checkpoints" / ".new.ckpt"
        before = saved_at(run)
        begin = [*RECIPE, *SHORT, "save_minutes=0", f"hydra.run.dir={run}"]
        process, (_, errors) = started("train", *begin, cwd=start, out=tmp_path)
        if kills < 10:
            wait_for_save(process, run, before)
            if kills % 2:  # the moment at which a checkpoint is being written
                while process.is_alive() and not unfinished.exists():
                    pass
            else:
                time.sleep(rng.uniform(0, 0.05))
            process.kill()
        elif kills < 20:
            process.join(rng.uniform(0, life))
            process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        writing += unfinished.exists()
        assert process.exitcode in (0, -signal.SIGKILL), errors.read_text()
    assert writing
    for run in ones:
        assert_same_run(run, whole)


def saved_at(run: Path) -> int:
    """When the last checkpoint was written; 0 if there is none."""
    try:
        return (run / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def wait_for_save(process, run: Path, before: int = 0) -> None:
    """Until there is a newer checkpoint than before, or the process has ended."""
    deadline = time.monotonic() + 60
    while process.is_alive() and saved_at(run) <= before:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_signal_saves_a_run_that_then_ends_as_if_there_had_been_none(start, whole, tmp_path):
    run = start / "signals"
    arguments = [*RECIPE, *SHORT, "save_minutes=0", f"hydra.run.dir={run}"]
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        before = saved_at(run)
        process, (_, errors) = started("train", *arguments, cwd=start, out=tmp_path)
        wait_for_save(process, run, before)
        os.kill(process.pid, number)
        process.join()
        assert process.exitcode == code
        step = read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"]
        again = "press Ctrl-C" if number == signal.SIGINT else "send SIGTERM"
        assert errors.read_text().splitlines() == [
            f"saving and stopping; {again} again to quit immediately",
            f"interrupted at step {step}; continue with resume=signals",
        ]
        assert (run / "curves.png").exists() == (step >= 20)
        arguments = ["resume=signals"]
    assert command("train", *arguments, cwd=start).returncode == 0
    assert_same_run(run, whole)


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(start, tmp_path):
    """While the first one waits for the end of a validation that takes its time."""
    script = (
        "import runpy, time; from vit_lightning.recipe.classifier import ViTClassifier\n"
        "ViTClassifier.validation_step = lambda *_: time.sleep(60)\n"
        "runpy.run_module('vit_lightning.train', run_name='__main__', alter_sys=True)"
    )
    (tmp_path / "slow.py").write_text(script)
    arguments = [sys.executable, "-u", "slow.py", *TINY, "trainer.max_epochs=1", "save_minutes=0", "hydra.run.dir=run"]
    heeded = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    with subprocess.Popen(arguments, cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=heeded) as process:
        while read_step(tmp_path / "run") < 1293 // 32 - 1:
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(0.5)  # the last step and the way into validation
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline().startswith("saving and stopping")
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        process.communicate()
    assert time.monotonic() - begin < 20
    assert process.returncode == 130


def read_step(run: Path) -> int:
    return latest_valid(RunFiles(run))[1].get("global_step", 0)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 16 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_a_run_that_can_be_continued(start, whole, small_disk, tmp_path):
    run = small_disk / "run"
    process, (_, errors) = started(
        "train", *RECIPE, *SHORT, "save_minutes=0", f"hydra.run.dir={run}", cwd=start, out=tmp_path
    )
    wait_for_save(process, run)
    with (small_disk / "other").open("wb", buffering=0) as other, pytest.raises(OSError, match="No space left"):
        other.writelines(repeat(bytes(65536)))
    process.join()
    step = read_step(run)
    assert process.exitcode == 1
    [line] = errors.read_text().splitlines()
    assert "cannot be written (No space left on device); free disk space or fix the permissions; " in line
    assert line.endswith(f"; continue from step {step} with resume={run}")
    (small_disk / "other").unlink()
    result = command("train", f"resume={run}", cwd=start)
    assert result.returncode == 0, result.stderr
    assert_same_run(run, whole)


@pytest.mark.slow
def test_a_directory_that_turns_read_only_ends_a_run(tmp_path):
    bound = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"] if os.geteuid() == 0 else []
    if bound and not shutil.which("setpriv"):
        pytest.skip("root may write everywhere")
    run = tmp_path / "run"
    arguments = [*bound, sys.executable, "-m", "vit_lightning.train", *TINY, "save_minutes=0", f"hydra.run.dir={run}"]
    with subprocess.Popen(
        arguments, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        while not saved_at(run):
            assert process.poll() is None
            time.sleep(0.02)
        (run / "checkpoints").chmod(0o555)
        _, errors = process.communicate()
    (run / "checkpoints").chmod(0o755)
    assert process.returncode == 1
    [line] = errors.splitlines()
    assert line.startswith(f"error: {run}/checkpoints/")
    assert "cannot be written (Permission denied); free disk space or fix the permissions; continue from" in line
    assert read_step(run) > 0


def test_a_loss_of_nan_stops_the_run_and_says_where(start):
    result = command("train", *TINY, "optim.lr=1e30", "save_minutes=0", "hydra.run.dir=nan", cwd=start)
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    report = json.loads((start / "nan" / "nan.json").read_text())
    images = ", ".join(map(str, report["images"][:4]))
    batch = f"(epoch 1, batch {report['batch']}: training images {images}, …)"
    assert line.startswith(
        f"error: train/loss is {report['loss']} at step {report['step']} {batch}, learning rate 1e+30, "
        f"gradient norm {float(report['gradient_norm']):g}; see nan/nan.json; "
    )
    assert line.endswith(f"; continue from step {report['step'] - 1} with resume=nan")
    assert len(report["images"]) == 32
    weights = read_checkpoint(start / "nan" / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        # What torch notices first: the signal, or the exit.
        ("os.kill(os.getpid(), signal.SIGKILL)", "DataLoader worker (pid"),
        ("raise RuntimeError('torn')", "a data loading worker failed (RuntimeError: torn)"),
        (
            "raise OSError(5, 'torn', 'x.npy')",
            "a data loading worker failed (OSError: [Errno 5] torn: 'x.npy')",
        ),
    ],
)
def test_a_loader_worker_that_dies_ends_the_run_with_the_cause(start, tmp_path, fault, message):
    script = f"""
import os, runpy, signal
from torch.utils.data import get_worker_info
from vit_lightning.data.module import ArrayDataset
gather = ArrayDataset.__getitem__
def dying(self, indices):
    if get_worker_info() is not None and 7 in indices: {fault}
    return gather(self, indices)
ArrayDataset.__getitem__ = dying
runpy.run_module("vit_lightning.train", run_name="__main__", alter_sys=True)
"""
    (tmp_path / "dying.py").write_text(script)
    arguments = [sys.executable, str(tmp_path / "dying.py"), *TINY, "data.workers=1"]
    result = subprocess.run(arguments, cwd=start, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert line.startswith(f"error: {message}")
    assert line.endswith("data.workers=0 needs no workers") == ("kill" in fault)


def test_a_finished_run_can_be_extended(start):
    shared = [*TINY, "data.batch_size=256", "dashboard=curves"]
    assert command("train", *shared, "trainer.max_epochs=3", "hydra.run.dir=three", cwd=start).returncode == 0
    assert command("train", *shared, "trainer.max_epochs=2", "hydra.run.dir=more", cwd=start).returncode == 0
    result = command("train", "resume=more", "trainer.max_epochs=1", cwd=start)
    assert result.stderr == "error: trainer.max_epochs=1 is less than the run's 2; increase or remove it\n"
    result = command("train", "resume=more", "trainer.max_epochs=3", cwd=start)
    assert result.returncode == 0, result.stderr
    assert rows_of(start / "more") == rows_of(start / "three")
    ours, theirs = (read_checkpoint(start / name / "checkpoints" / "last.ckpt") for name in ("more", "three"))
    torch.testing.assert_close(ours["state_dict"], theirs["state_dict"], rtol=0, atol=0)


def test_a_run_that_reached_its_target_ends_at_once_when_it_is_resumed(start, tmp_path):
    """Killed when its last checkpoint was written, before its summary was."""
    arguments = [*TINY, "target_acc=0.01", "trainer.max_epochs=5", "hydra.run.dir=target"]
    assert command("train", *arguments, cwd=start).returncode == 0
    (start / "target" / "summary.json").unlink()
    (start / "target" / "curves.png").unlink()
    result = command("train", "resume=target", cwd=start)
    assert result.returncode == 0, result.stderr
    assert len(rows_of(start / "target")) == 1
    assert (start / "target" / "curves.png").exists()


def test_a_run_killed_before_its_first_checkpoint_logs_its_steps_once(start, tmp_path):
    run = tmp_path / "run"
    arguments = [*TINY, "trainer.max_epochs=1", "trainer.log_every_n_steps=1", "dashboard=curves"]
    assert command("train", *arguments, f"hydra.run.dir={run}", cwd=start).returncode == 0
    expected = curves_of(run)
    assert expected["optim/lr"]
    shutil.rmtree(run / "checkpoints")
    (run / "summary.json").unlink()
    assert command("train", *arguments, f"hydra.run.dir={run}", cwd=start).returncode == 0
    assert len(list(run.glob("events.*"))) > 1
    assert curves_of(run) == expected


def test_a_run_whose_data_set_changed_is_refused(start, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(start / "three", run)
    last = read_checkpoint(run / "checkpoints" / "last.ckpt")
    last["hyper_parameters"]["mean"] = [0.5]
    del last["callbacks"]["Saver"]  # as in checkpoints without a digest
    write(run / "checkpoints" / "last.ckpt", **last)
    result = command("train", f"resume={run}", "trainer.max_epochs=4", cwd=start)
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert line.startswith("error: the data set changed since this run started (mean); restore it or start a new run")


OWN = ["optim.lr=3e-4", "trainer=cpu", "save_minutes=1", "data.root=here", "dashboard.batch=false"]


@pytest.fixture
def own(tmp_path) -> RunFiles:
    """An interrupted run that has only the files by which it is recognised."""
    files = RunFiles(tmp_path / "own")
    config = asdict(composed(*TINY, *OWN))
    config["model"].update(num_classes=10, channels=1)
    hparams = {name: config[name] for name in ("model", "data", "augment", "optim", "seed")}
    starts = [{"git_commit": "0123456789abcdef+changes"}]
    write(
        files.last, global_step=7, hyper_parameters=hparams, callbacks={"EpochRecorder": {"rows": [], "starts": starts}}
    )
    files.config.write_text(yaml.safe_dump(config))
    return files


def resumed(files: RunFiles, *arguments: str) -> Run:
    typed = [f"resume={files.folder}", *arguments]
    return find_run(composed(*typed), files.folder, Invocation("", typed))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optim.lr=1e-3"], "a resumed run keeps its configuration (optim.lr=0.0003); remove optim.lr"),  # the default
        (["model=vit"], "remove model.image_size, model.layers, model.mlp_head_units, model.patch_size"),
        (["debug=profile"], "remove trainer.limit_test_batches, trainer.limit_train_batches, "),
        (["data=cifar10"], "remove data.source"),
        (["seed=1"], "remove seed"),
    ],
)
def test_a_resumed_run_keeps_what_makes_its_numbers(own, arguments, message):
    with pytest.raises(InputError, match=re.escape(message)):
        resumed(own, *arguments)


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        ([], {}),
        (["optim.lr=3e-4", "data=digits"], {}),  # the same, and the run's own directories
        (["trainer=default"], {"trainer.accelerator": "auto"}),
        (["data.root=there", "data.cache_dir=cache", "data.workers=2"],
         {"data.root": "there", "data.cache_dir": "cache", "data.workers": 2}),
        (["data.eval_batch_size=8", "compile=true", "test=false", "traceback=true"],
         {"data.eval_batch_size": 8, "compile": True, "test": False, "traceback": True}),
        (["dashboard.batch=true", "dashboard.text=false"], {"dashboard.batch": True, "dashboard.text": False}),
        (["save_minutes=5", "trainer.max_epochs=200"], {"save_minutes": 5, "trainer.max_epochs": 200}),
    ],
)  # fmt: skip
def test_what_changes_no_number_may_change_when_a_run_is_resumed(own, arguments, changed):
    run = resumed(own, *arguments)
    assert run.step == 7
    saved = flatten(yaml.safe_load(own.config.read_text()))
    now = flatten(asdict(run.config))
    assert {key: now[key] for key in now if now[key] != saved[key]} == changed


def test_the_same_command_on_other_hardware_continues_a_run(own):
    """As a sweep does that is started again with more workers, or where the images are elsewhere."""
    elsewhere = composed(*TINY, "optim.lr=3e-4", "data.root=elsewhere", "data.workers=3")
    run = find_run(elsewhere, own.folder, Invocation(""))
    assert (run.step, run.config.data.workers) == (7, 3)
    with pytest.raises(InputError, match="contains another run"):
        find_run(composed(*TINY, "optim.lr=1e-4"), own.folder, Invocation(""))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda config: config["optim"].update(lr=1.0), "config.yaml has optim.lr=1.0, but .*last.ckpt was trained "
         "with optim.lr=0.0003; restore the original file or start a new run"),
        (lambda config: config.update(seed=5), "config.yaml has seed=5, but .*last.ckpt was trained with seed=0"),
        (lambda config: config["optim"].update(momentum=0.9), r"config.yaml has optim.momentum, unknown to this "
         r"version; continue the run with the commit that made it \(git checkout 0123456789ab\), or start a new run"),
        (lambda config: config["optim"].update(lr=-1), "config.yaml: optim.lr=-1 must be at least 0"),
        (lambda config: config.update(model=[1]), "config.yaml is not the configuration of a run"),
    ],
)  # fmt: skip
def test_an_edited_configuration_is_refused(own, edit, message):
    config = yaml.safe_load(own.config.read_text())
    edit(config)
    own.config.write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match=message) as error:
        resumed(own)
    assert "\n" not in str(error.value)


def test_a_run_of_an_earlier_version_lacks_new_keys(own):
    config, last = yaml.safe_load(own.config.read_text()), read_checkpoint(own.last)
    for section, key in (("optim", "ns_steps"), ("model", "stem_se"), ("augment", "until")):
        del config[section][key]
        del last["hyper_parameters"][section][key]
    del config["dashboard"]
    del last["hyper_parameters"]["seed"]
    own.config.write_text(yaml.safe_dump(config))
    write(own.last, **last)
    run = resumed(own)
    assert (run.step, run.config.optim.ns_steps, run.config.optim.lr) == (7, 5, 3e-4)


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_run_that_lost_its_best_weights_says_what_is_left(own, damage):
    last = read_checkpoint(own.last)
    last["callbacks"]["EpochRecorder"]["rows"] = [{"epoch": 1, "val/acc": 0.5}]
    write(own.last, **last)
    write(own.best, **last)
    assert resumed(own).step == 7
    if damage == "cut":
        own.best.write_bytes(own.best.read_bytes()[:-100])
    else:
        own.best.unlink()
    with pytest.raises(InputError) as error:
        resumed(own)
    assert "best.ckpt is corrupt" in str(error.value) or "best.ckpt cannot be read" in str(error.value)
    assert str(error.value).endswith(f"start a new run, from its latest weights with checkpoint={own.last}")
    assert "resume=" not in str(error.value)


def test_the_data_set_is_recognised_by_its_digest_where_there_is_one(own):
    arrays = SimpleNamespace(digest={"train": "a", "test": "b"})
    data = SimpleNamespace(arrays=arrays, class_names=["0"], mean=torch.tensor([0.5]), std=torch.tensor([0.25]))
    run = resumed(own)
    run.content["hyper_parameters"].update(class_names=["0"], mean=[0.5], std=[0.25])
    check_same_data(run, data)
    run.content["callbacks"]["Saver"] = {"digest": {"train": "a", "test": "c"}}
    with pytest.raises(InputError, match=r"the data set changed since this run started \(test images\); restore"):
        check_same_data(run, data)
    run.content["callbacks"]["Saver"] = {"digest": {"train": "a", "test": "b"}}
    check_same_data(run, data)
    data.class_names = ["1"]
    with pytest.raises(InputError, match=r"\(class names\)"):
        check_same_data(run, data)


@pytest.mark.parametrize("damaged", [["last.ckpt"], ["last.ckpt", "last-previous.ckpt"]])
def test_a_run_continues_from_its_latest_valid_checkpoint_or_says_that_there_is_none(start, tmp_path, damaged):
    run = tmp_path / "run"
    shutil.copytree(start / "three", run)
    for name in damaged:
        path = run / "checkpoints" / name
        path.write_bytes(path.read_bytes()[:-100])
    result = command("train", f"resume={run}", "trainer.max_epochs=4", cwd=start)
    messages = result.stderr.splitlines()
    assert f"{run}/checkpoints/last.ckpt is corrupt (truncated or overwritten)" in messages[0]
    if len(damaged) == 1:
        assert messages[0].endswith(f"; continuing from {run}/checkpoints/last-previous.ckpt")
        assert result.returncode == 0
        assert len(rows_of(run)) == 4
        for name in ("last.ckpt", "last-previous.ckpt"):
            assert read_checkpoint(run / "checkpoints" / name)
        with pytest.raises(InputError, match="is corrupt"):
            read_checkpoint(run / "checkpoints" / "last-damaged.ckpt")
    else:
        assert result.returncode == 1
        assert messages[0].endswith("there is no other checkpoint, so start a new run")


def test_only_one_process_at_a_time_writes_a_run(start, tmp_path):
    run = tmp_path / "run"
    process, _ = started("train", *TINY, f"hydra.run.dir={run}", "save_minutes=0", cwd=start, out=tmp_path)
    wait_for_save(process, run)
    result = command("train", f"resume={run}", cwd=start)
    process.kill()
    assert result.returncode == 1
    assert result.stderr == f"error: {run} is in use by another process; wait for it or stop it\n"
