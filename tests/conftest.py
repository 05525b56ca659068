"""Data sets and runs that several test files share."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from PIL import Image

from vit_lightning import cli
from vit_lightning.config import Config, DataConfig

CONF = Path(__file__).parent.parent / "conf"
TRAINER = dict(  # of a Trainer that writes and prints nothing
    accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
)

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler"
)


def composed(*overrides: str, name: str = "config") -> Config:
    """The configuration that a command line gives; ``name`` is the command's primary file in ``conf/``."""
    cli.register_schemas()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return cli.to_config(compose(name, list(overrides)), cli.SCHEMAS[name])


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
