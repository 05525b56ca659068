"""Checkpoints on a disk where anything may happen, and runs that are killed, interrupted and resumed."""

import csv
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
from dataclasses import asdict
from itertools import repeat
from pathlib import Path

import pytest
import torch
import yaml
from conftest import command, composed, started
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vit_lightning.files import SealedCheckpoints, read_checkpoint, write_whole
from vit_lightning.keys import InputError, Invocation
from vit_lightning.recipe.weights import load_classifier
from vit_lightning.runs import run as runs
from vit_lightning.runs.checkpoints import newest_sound

TINY = ["data=digits", "model.image_size=8", "model.patch_size=2", "model.layers=2", "model.mlp_head_units=[16]"]
RECIPE = [*TINY, "optim=muon", "augment=crop", "augment.mixup=0.2", "model.pool=mean", "model.zero_init=true"]


def write(path: Path, **content) -> None:
    SealedCheckpoints().save_checkpoint(content, path)


def test_what_is_written_is_read_again_also_by_torch_alone(tmp_path):
    path, weight = tmp_path / "new" / "last.ckpt", torch.randn(7, 3)
    write(path, weight=weight, epoch=3)
    for loaded in (read_checkpoint(path), torch.load(path, weights_only=True)):
        assert loaded["epoch"] == 3
        assert torch.equal(loaded["weight"], weight)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "half"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, damage):
    last, before = tmp_path / "last.ckpt", tmp_path / "last-previous.ckpt"
    write(before, global_step=1)
    write(last, global_step=2, weights=torch.randn(1000))
    assert newest_sound(tmp_path) == (last, 2, [])
    data = bytearray(last.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    last.write_bytes({"cut": data[:-1], "flip": data, "empty": b"", "half": data[: len(data) // 2]}[damage])
    with pytest.raises(InputError, match=r"last\.ckpt is damaged"):
        read_checkpoint(last)
    sound, step, [wrong] = newest_sound(tmp_path)
    assert (sound, step) == (before, 1)
    assert "last.ckpt is damaged" in wrong


@pytest.mark.parametrize("content", [{"weights": 1}, [1, 2], torch.ones(3)])
def test_a_file_of_torchs_that_is_no_checkpoint_is_passed_over(tmp_path, content):
    write(tmp_path / "last-previous.ckpt", global_step=1)
    torch.save(content, tmp_path / "last.ckpt")
    sound, step, [wrong] = newest_sound(tmp_path)
    assert (sound.name, step) == ("last-previous.ckpt", 1)
    assert wrong.endswith("last.ckpt is no checkpoint of a run")


def test_a_checkpoint_that_cannot_be_read_is_passed_over(tmp_path):
    write(tmp_path / "last-previous.ckpt", global_step=1)
    (tmp_path / "last.ckpt").mkdir()
    sound, step, [wrong] = newest_sound(tmp_path)
    assert (sound.name, step) == ("last-previous.ckpt", 1)
    assert wrong.endswith("last.ckpt cannot be read (Is a directory)")


def test_lightning_reads_no_damaged_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    write(path, global_step=2, weights=torch.randn(1000))
    assert SealedCheckpoints().load_checkpoint(path, weights_only=True)["global_step"] == 2
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"last\.ckpt is damaged"):
        SealedCheckpoints().load_checkpoint(path, weights_only=True)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, small_disk):
    path = small_disk / "summary.json"
    write_whole(path, b"before")
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, bytes(20_000_000))
    assert path.read_bytes() == b"before"
    assert list(small_disk.iterdir()) == [path]  # what there was of the other takes no room
    write_whole(path, b"after")
    assert path.read_bytes() == b"after"


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("kind", ["pickle", "torch", "sealed"])
def test_nothing_in_a_checkpoint_is_run(tmp_path, kind):
    path, proof = tmp_path / "evil.ckpt", tmp_path / "it-ran"
    content = {"state_dict": Malicious(proof), "hyper_parameters": {}}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    elif kind == "torch":
        torch.save(content, path)
    else:
        write(path, **content)
    with pytest.raises(InputError, match=r"evil\.ckpt is damaged, or no checkpoint"):
        load_classifier(str(path))
    assert not proof.exists()
    if kind != "pickle":  # it would have, if allowed to
        torch.load(path, weights_only=False)
        assert proof.exists()


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("start")


@pytest.fixture(scope="module")
def whole(start) -> Path:
    """A run that nothing interrupts, with every ingredient that has a state of its own."""
    command("train", "--help", cwd=start)  # the first command waits for the server of all
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
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith(("speed/", "best/seconds"))]
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


def test_a_signal_saves_the_run_which_then_ends_as_if_none_had_come(start, whole, tmp_path):
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
        again = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        assert errors.read_text().splitlines() == [
            f"stopping as soon as the run can be saved; {again} again: at once",
            f"interrupted; what there is so far lies in signals; resume=signals goes on after step {step} "
            "(last.ckpt is sound)",
        ]
        assert (run / "curves.png").exists() == (step >= 20)
        arguments = ["resume=signals"]
    assert command("train", *arguments, cwd=start).returncode == 0
    assert_same_run(run, whole)


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
        assert process.stderr.readline().startswith("stopping as soon as the run can be saved")
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        process.communicate()
    assert time.monotonic() - begin < 20
    assert process.returncode == 130


def read_step(run: Path) -> int:
    return newest_sound(run / "checkpoints")[1]


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
def test_a_full_disk_ends_a_run_that_goes_on_when_there_is_room(start, whole, small_disk, tmp_path):
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
    assert "cannot be written (No space left on device); make room, or mend it; resume=" in line
    assert f" goes on after step {step} (" in line
    (small_disk / "other").unlink()
    result = command("train", f"resume={run}", cwd=start)
    assert result.returncode == 0, result.stderr
    assert_same_run(run, whole)


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
    assert "cannot be written (Permission denied); make room, or mend it; resume=" in line
    assert read_step(run) > 0


def test_a_loss_that_is_no_number_stops_the_run_and_says_where(start):
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
    assert f"resume=nan goes on after step {report['step'] - 1} (last.ckpt is sound)" in line
    assert len(report["images"]) == 32
    weights = read_checkpoint(start / "nan" / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        # What torch notices first: the signal, or the exit.
        ("os.kill(os.getpid(), signal.SIGKILL)", "DataLoader worker (pid"),
        ("raise RuntimeError('torn')", "a process that reads batches ended with RuntimeError: torn"),
        (
            "raise OSError(5, 'torn', 'x.npy')",
            "a process that reads batches ended with OSError: [Errno 5] torn: 'x.npy'",
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
    arguments = [sys.executable, str(tmp_path / "dying.py"), *TINY, "data.workers=2"]
    result = subprocess.run(arguments, cwd=start, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert line.startswith(f"error: {message}")
    assert line.endswith("data.workers=0 needs none") == ("kill" in fault)


def test_a_run_goes_on_beyond_its_end(start):
    shared = [*TINY, "data.batch_size=256", "dashboard=curves"]
    assert command("train", *shared, "trainer.max_epochs=3", "hydra.run.dir=three", cwd=start).returncode == 0
    assert command("train", *shared, "trainer.max_epochs=2", "hydra.run.dir=more", cwd=start).returncode == 0
    result = command("train", "resume=more", "trainer.max_epochs=1", cwd=start)
    assert result.stderr == "error: trainer.max_epochs=1 is less than the run's 2; give more, or leave it out\n"
    result = command("train", "resume=more", "trainer.max_epochs=3", cwd=start)
    assert result.returncode == 0, result.stderr
    assert rows_of(start / "more") == rows_of(start / "three")
    ours, theirs = (read_checkpoint(start / name / "checkpoints" / "last.ckpt") for name in ("more", "three"))
    torch.testing.assert_close(ours["state_dict"], theirs["state_dict"], rtol=0, atol=0)


def test_a_run_that_reached_its_target_is_over_also_when_it_is_resumed(start, tmp_path):
    """Killed when its last checkpoint was written, before its summary was."""
    arguments = [*TINY, "target_acc=0.01", "target_acc5=0.01", "trainer.max_epochs=5", "hydra.run.dir=target"]
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


def test_a_run_goes_on_with_the_images_that_it_began_with(start, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(start / "three", run)
    last = read_checkpoint(run / "checkpoints" / "last.ckpt")
    last["hyper_parameters"]["mean"] = [0.5]
    write(run / "checkpoints" / "last.ckpt", **last)
    result = command("train", f"resume={run}", "trainer.max_epochs=4", cwd=start)
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert line.startswith("error: the images are not those that this run began with: mean differ from what ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optim.lr=1e-3"], "the run's own configuration, optim.lr=0.0003; leave optim.lr out"),  # the default
        (["optim.lr=3e-4", "data=digits"], None),
        (["model=vit"], "leave model.image_size, model.layers, model.mlp_head_units, model.patch_size out"),
        (["trainer=debug"], "leave trainer.limit_test_batches, trainer.limit_train_batches, "),
        (["trainer=default"], None),
    ],
)
def test_what_is_set_otherwise_when_a_run_goes_on_is_refused(start, arguments, message):
    folder = start / "own"
    if not folder.exists():
        write(folder / "checkpoints" / "last.ckpt", global_step=7)
        config = asdict(composed(*TINY, "optim.lr=3e-4", "trainer=cpu", "save_minutes=1"))
        config["model"].update(num_classes=10, channels=1)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    typed = [f"resume={folder}", *arguments]
    given, invocation = composed(*typed), Invocation("", typed)
    if message is None:
        run = runs.find_run(given, folder, invocation)
        assert (run.step, run.config.optim.lr, run.config.save_minutes) == (7, 3e-4, 1)
        assert run.config.trainer.accelerator == ("auto" if "trainer=default" in arguments else "cpu")
    else:
        with pytest.raises(InputError, match=re.escape(message)):
            runs.find_run(given, folder, invocation)


@pytest.mark.parametrize("damaged", [["last.ckpt"], ["last.ckpt", "last-previous.ckpt"]])
def test_a_run_goes_on_from_its_newest_sound_checkpoint_or_says_that_there_is_none(start, tmp_path, damaged):
    run = tmp_path / "run"
    shutil.copytree(start / "three", run)
    for name in damaged:
        path = run / "checkpoints" / name
        path.write_bytes(path.read_bytes()[:-100])
    result = command("train", f"resume={run}", "trainer.max_epochs=4", cwd=start)
    messages = result.stderr.splitlines()
    assert f"{run}/checkpoints/last.ckpt is damaged" in messages[0]
    if len(damaged) == 1:
        assert messages[0].endswith(f"; going on from {run}/checkpoints/last-previous.ckpt")
        assert result.returncode == 0
        assert len(rows_of(run)) == 4
        for name in ("last.ckpt", "last-previous.ckpt"):
            assert read_checkpoint(run / "checkpoints" / name)
        with pytest.raises(InputError, match="damaged"):
            read_checkpoint(run / "checkpoints" / "last-damaged.ckpt")
    else:
        assert result.returncode == 1
        assert messages[0].endswith("there is no other, so start the run anew in another directory")


def test_one_process_at_a_time_writes_a_run(start, tmp_path):
    run = tmp_path / "run"
    process, _ = started("train", *TINY, f"hydra.run.dir={run}", "save_minutes=0", cwd=start, out=tmp_path)
    wait_for_save(process, run)
    result = command("train", f"resume={run}", cwd=start)
    process.kill()
    assert result.returncode == 1
    assert result.stderr == f"error: {run} is being written by another process; wait for it or stop it\n"
