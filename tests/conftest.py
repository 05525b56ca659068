"""Commands, data sets and runs that several test files share."""

import multiprocessing
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # workers that all take every core wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# isort: split
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from PIL import Image

from vit_lightning import cli, register
from vit_lightning.config import Config, DataConfig
from vit_lightning.schemas import SCHEMAS

CONF = Path(__file__).parent.parent / "conf"
TRAINER = dict(  # of a Trainer that writes and prints nothing
    accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
)

FEW = [  # two epochs of a few batches
    "trainer.max_epochs=2",
    *(f"trainer.limit_{split}_batches={count}" for split, count in (("train", 4), ("val", 2), ("test", 2))),
    "trainer.log_every_n_steps=1",
]

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler"
)


def composed(*overrides: str, name: str = "train") -> Config:
    """The configuration that a command line gives; ``name`` is the command's primary file in ``conf/``."""
    cli.register_schemas()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return cli.to_config(compose(name, list(overrides)), SCHEMAS[name])


def write_folder(root: Path, classes: dict[str, tuple[int, int]], side: int = 8) -> None:
    """A class-per-folder tree of random PNGs: ``classes`` maps a name to its numbers of training and test images."""
    rng = np.random.default_rng(0)
    for name, counts in classes.items():
        for split, count in zip(("train", "test"), counts, strict=True):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index:03}.png")


@pytest.fixture
def registries(monkeypatch) -> None:
    """Forget at the end of a test what it registers."""
    for registry in vars(register).values():
        if isinstance(registry, register.Registry):
            for table in ("_owners", "_parts", "_settings"):
                monkeypatch.setattr(registry, table, dict(getattr(registry, table)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of 8 × 8 images: 9 training and 7 test images each."""
    write_folder(tmp_path / "images", {"bee": (9, 7), "ant": (9, 7), "cat": (9, 7)})
    return tmp_path / "images"


@pytest.fixture
def folder_config(folder: Path, tmp_path: Path) -> DataConfig:
    return DataConfig(source="image_folder", root=str(folder), cache_dir=str(tmp_path / "cache"), batch_size=5)


@pytest.fixture
def digits_config(tmp_path: Path) -> DataConfig:
    return DataConfig(source="digits", split="standard", cache_dir=str(tmp_path / "cache"))


# Importing torch and its kin takes a command some seconds. Here one process imports them once, and each command is a
# fork of it: a process as any other, with arguments, directory, streams and exit code of its own.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["torch._dynamo", "torchvision", "vit_lightning.recipe.weights", "vit_lightning.runs.dashboard"]
)


def command(name: str, *arguments: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """``python -m vit_lightning.<name>``, as a user types it."""
    with tempfile.TemporaryDirectory() as folder:
        process, streams = started(name, *arguments, cwd=cwd, out=Path(folder), env=env)
        process.join()
        return subprocess.CompletedProcess(arguments, process.exitcode, *(stream.read_text() for stream in streams))


def started(
    name: str, *arguments: str, cwd: Path, out: Path, env: dict[str, str] | None = None
) -> tuple[multiprocessing.process.BaseProcess, list[Path]]:
    """The process of a command that runs on by itself, and the files of its output and errors."""
    streams = [out / stream for stream in ("out", "err")]
    for stream in streams:
        stream.write_text("")
    process = SERVER.Process(target=_run, args=(name, arguments, cwd, env or dict(os.environ), streams))
    process.start()
    return process, streams


def _run(name: str, arguments: tuple[str, ...], cwd: Path, env: dict[str, str], streams: list[Path]) -> None:
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where pytest runs in the background
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [name, *arguments]
    runpy.run_module(f"vit_lightning.{name}", run_name="__main__", alter_sys=True)


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory) -> Path:
    """The directory of a short run on the digits; what is decoded for it lies beside it, in ``data/cache``."""
    start = tmp_path_factory.mktemp("digits")
    small = ["model.image_size=8", "model.patch_size=2", "model.layers=2", "model.mlp_head_units=[16]"]
    result = command(
        *("train", "experiment=quickstart", "trainer.max_epochs=6", *small, "hydra.run.dir=run"), cwd=start
    )
    assert result.returncode == 0, result.stderr
    return start / "run"
