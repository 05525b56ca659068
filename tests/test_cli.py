"""What the commands answer to habits of other projects, and to faults of the machine: one line each."""

import errno
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from vit_lightning import cli, evaluate
from vit_lightning.cli import job_dir
from vit_lightning.guard import fault_of

KEY = "{} is not a key; did you mean {}?"
KEYS = {  # what is typed, and the key that it means
    "model.depth": "model.layers",
    "model.num_heads": "model.heads",
    "model.drop_path_rate": "model.drop_path",
    "model.drop": "model.dropout",
    "model.optimizer.lr": "optim.lr",
    "datamodule.batch_size": "data.batch_size",
    "hidden_size": "model.embed_dim",
    "img_size": "model.image_size",
    "num_classes": "model.num_classes",
    "ckpt_path": "resume",
    "trainer.gpus": "trainer.devices",
    "trainer.epochs": "trainer.max_epochs",
    "traner.max_epochs": "trainer.max_epochs",
    "epochs": "trainer.max_epochs",
    "max_epochs": "trainer.max_epochs",
    "lr": "optim.lr",
    "learning_rate": "optim.lr",
    "batch_size": "data.batch_size",
    "num_workers": "data.workers",
    "patience": "callbacks=early_stopping callbacks.early_stopping.patience",
    "accumulate_grad_batches": "trainer.accumulate_grad_batches",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "mixup_alpha": "augment.mixup",
    "seed_everything": "seed",
    "torch_compile": "compile",
    "output_dir": "hydra.run.dir",
    "dataset": "data",
    "layer": "model.layers",
    "name": "data.name or optim.name",
}
LINES = [
    *(("train", f"{typed}=3", KEY.format(typed, meant)) for typed, meant in KEYS.items()),
    ("evaluate", "ckpt_path=x", KEY.format("ckpt_path", "checkpoint")),
    ("search", "n_trials=3", KEY.format("n_trials", "search.trials")),
    ("predict", "topk=3", KEY.format("topk", "top")),
    *(
        ("train", f"{typed}=3", f"{typed} is not a key; --help lists the keys")
        for typed in ("train", "tags", "unheard")
    ),
    ("train", "trainer.logger=wandb", "trainer.logger is not a key: use the group logger, as in logger=csv"),
    ("train", "--epochs 3", "--epochs is not an option; write trainer.max_epochs=3"),
    ("train", "--lr=1e-3", "--lr is not an option; write optim.lr=1e-3"),
    ("train", "--verbose", "--verbose is not an option; settings are written key=value, as in seed=1"),
    ("train", "--cfg", "--cfg needs an argument; write --cfg job"),
    ("train", "+experiment=quickstart", "experiment is a group; write experiment=quickstart"),
    (
        "train",
        "experiment=/path/mine.yaml",
        "experiment=/path/mine.yaml is not known: an option is a file in conf/experiment/; move yours to "
        "DIR/experiment/mine.yaml and write --config-dir DIR experiment=mine",
    ),
    ("train", "quickstart", "quickstart cannot be parsed as a setting; write experiment=quickstart"),
    ("train", "=3", "=3 has no key; settings are written key=value"),
    ("train", "~model.layers", "~model.layers: a key cannot be removed; set it, as in model.layers=value"),
    ("predict", "photos", "photos cannot be parsed as a setting; a path is written images=photos"),
    ("evaluate", "outputs/x", "outputs/x cannot be parsed as a setting; a path is written checkpoint=outputs/x"),
    (
        "evaluate",
        "data.root=photos",
        "data.root=photos needs data= as well; choose one of cifar10, cifar100, digits, huggingface, image_folder, "
        "npz, stream, torchvision",
    ),
    ("sweep", "dir=x", "write python -m vit_lightning.sweep summary dir=x"),
    (
        "train",
        "experiment=quickstart hydra.job.chdir=true",
        "hydra.job.chdir=true is not supported; paths are relative to where the command is typed",
    ),
]


@pytest.mark.parametrize(("name", "arguments", "line"), LINES)
def test_a_habit_of_another_project_gets_one_exact_line(monkeypatch, tmp_path, name, arguments, line):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *arguments.split()])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"vit_lightning.{name}").main()
    assert end.value.code == f"error: {line}"


def test_options_may_follow_a_group_that_is_left_out(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", "callbacks=early_stopping", "~callbacks", "--cfg", "job"])
    importlib.import_module("vit_lightning.train").main()
    assert "callbacks: {}" in capsys.readouterr().out


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("module", ["vit_lightning.train --help", "vit_lightning.sweep --help", "vit_lightning keys"])
def test_output_that_cannot_be_written_is_one_line(tmp_path, module, unbuffered):
    """The name of the error tells a full disk from a reader that has ended."""
    program = [sys.executable, "-m", *module.split()]
    environment = {**ENVIRONMENT, "PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr == "error: standard output cannot be written (No space left on device)\n"
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(program, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path)
    os.close(writer)
    assert result.returncode == 1
    assert result.stderr == "error: standard output cannot be written (Broken pipe)\n"


def test_a_closed_output_ends_nothing(tmp_path):
    command = f"{sys.executable} -m vit_lightning.train model.heads=5 >&-"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path)
    assert result.stderr.count("\n") == 1
    assert "try model.embed_dim=65" in result.stderr


def test_a_terminal_without_unicode_shows_escaped_names(tmp_path):
    ascii_only = {**ENVIRONMENT, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    program = [sys.executable, "-m", "vit_lightning.train"]
    result = subprocess.run([*program, "checkpoint=bär"], capture_output=True, text=True, env=ascii_only, cwd=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "b\\udcc3\\udca4r" in result.stderr
    result = subprocess.run([*program, "--help"], capture_output=True, env=ascii_only, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, b"")


def test_a_name_that_a_library_cannot_write_is_one_line():
    with pytest.raises(UnicodeEncodeError) as error:
        os.fsdecode(b"outputs/caf\xe9").encode()
    assert fault_of(error.value).startswith("a name with \udce9 cannot be written as UTF-8; rename it or set LC_ALL=")


def test_jobs_that_cannot_even_write_why_they_failed_fail_the_sweep(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cli, "write_atomic", full)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate", "-m", "checkpoint=none,gone", "hydra.sweep.dir=sweep"])
    with pytest.raises(SystemExit) as end:
        evaluate.main()
    header, *failed = str(end.value).splitlines()
    assert header == "error: 2 of the sweep's jobs failed:"
    for line, name in zip(failed, ("none", "gone"), strict=True):
        assert re.match(rf"  sweep/\S+: error: checkpoint={name} does not exist", line)


@pytest.mark.parametrize("arguments", ["train --help", "evaluate", "sweep summary dir=x"])
def test_a_deleted_working_directory_is_one_line(tmp_path, arguments):
    (tmp_path / "gone").mkdir()
    command = f"cd gone && rmdir ../gone && {sys.executable} -m vit_lightning.{arguments}"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("error: the working directory is gone (No such file")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("libraries", ["hydra", "torch"])
def test_a_signal_while_libraries_load_is_one_word(tmp_path, number, libraries):
    """An exception within the import of a C++ library would abort the process."""
    module = "benchmarks" if libraries == "torch" else "hydra"
    slow = tmp_path / module
    slow.mkdir()
    (slow / "__init__.py").write_text("import time; print('loading', flush=True); time.sleep(60)")
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}:{ENVIRONMENT['PYTHONPATH']}"}
    arguments = ["-m", "vit_lightning.train"] if libraries == "hydra" else ["-c", OWN_TASK]
    with subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        cwd=tmp_path, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "loading\n"
        process.send_signal(number)
        _, errors = process.communicate()
    assert process.returncode == 128 + number
    assert errors == {signal.SIGINT: "interrupted\n", signal.SIGTERM: "terminated\n"}[number]


OWN_TASK = """
import sys
from vit_lightning.guard import run
sys.argv[1:] = ["experiment=quickstart"]
run("vit_lightning.cli:run_command", "train", "benchmarks:task", "")
"""

MISSING = {
    "train": ["checkpoint=no", "resume=no", "data=image_folder data.root=no"],
    "search": ["checkpoint=no", "data=image_folder data.root=no"],
    "benchmark": ["data=image_folder data.root=no"],
    "evaluate": ["checkpoint=no", "data=image_folder data.root=no"],
    "predict": ["checkpoint=no images=.", "images=no", "images=no/*.png"],
    "export": ["checkpoint=no"],
}


@pytest.mark.parametrize(("name", "arguments"), [(name, each) for name, cases in MISSING.items() for each in cases])
def test_a_path_that_does_not_exist_is_reported_without_torch(tmp_path, name, arguments):
    program = (
        f"import sys, time; sys.argv[1:] = {arguments.split()}\n"
        f"from vit_lightning.{name} import main\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code)\n"
        "assert 'torch' not in sys.modules"
    )
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path
    )
    assert time.monotonic() - start < 10  # under a second on a machine that does nothing else
    assert result.returncode == 0, result.stderr
    assert re.match(r"error: [\w.]+=no\S* (does not exist|is not a directory); ", result.stdout)


@pytest.mark.parametrize("varied", ["data.root-../../../sets/one", "/etc", "a" * 300, "ü" * 150, "a\nb", "a\\b"])
def test_the_directory_of_a_job_stays_in_that_of_the_sweep(tmp_path, varied):
    name = job_dir(varied)
    (tmp_path / name).mkdir()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert name == job_dir(varied) != job_dir(f"{varied}x")


def test_jobs_of_names_that_file_systems_take_keep_them():
    assert job_dir("model.layers-2+seed-0") == "model.layers-2+seed-0"
    assert job_dir("a/b") != job_dir("a_b")
    config = OmegaConf.create({"subdir": "${job_dir:${varied}}", "varied": "checkpoint-a/b,c}"})
    assert "/" not in config.subdir
    assert OmegaConf.create({"subdir": "${job_dir:${varied}}", "varied": ""}).subdir == "job"
