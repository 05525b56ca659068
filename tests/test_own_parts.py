"""What a user adds in one file of their own works everywhere: training, resuming, sweeps, evaluation, export."""

import csv
import json
import os
import signal
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command, started
from PIL import Image
from sklearn.datasets import load_digits

OWN = """
import numpy as np
import torch
from torch import nn
from torchmetrics.classification import MulticlassCohenKappa

from vit_lightning import register
from vit_lightning.data.cache import ImageSet
from vit_lightning.keys import key
from vit_lightning.model.vit import Attention
from vit_lightning.recipe.optim import parameter_groups


@register.block("parallel", ratio=key(2.0, "Hidden width, relative to D.", above=0))
class ParallelBlock(nn.Module):
    def __init__(self, config, drop_path, ratio):
        super().__init__()
        D = config.embed_dim
        self.norm, self.attn = nn.LayerNorm(D), Attention(D, config.heads)
        self.mlp = nn.Sequential(nn.Linear(D, int(ratio * D)), nn.GELU(), nn.Linear(int(ratio * D), D))

    def forward(self, x):
        return x + self.attn(self.norm(x)) + self.mlp(self.norm(x))


@register.source("my_set")
def my_set(config, image_size):
    file = np.load(config.root)
    parts = ("train", "test")
    return ImageSet(list("0123456789"), {p: file[f"y_{p}"] for p in parts}, {p: file[f"x_{p}"] for p in parts})


@register.augmentation("noise", std=0.1)
def noise(images, std):
    return images + std * torch.randn_like(images)


@register.optimizer("lion", beta=key(0.9, "Average of the gradients.", low=0, below=1))
class Lion(torch.optim.Optimizer):
    def __init__(self, net, config, beta):
        super().__init__(parameter_groups(net, config), dict(beta=beta))

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure else None
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                m = self.state[p].setdefault("m", torch.zeros_like(p)).lerp_(p.grad, 1 - group["beta"])
                p.sub_(m.sign() + group["weight_decay"] * p, alpha=group["lr"])
        return loss


@register.metric("kappa")
def kappa(classes):
    return MulticlassCohenKappa(classes)
"""
CHOSEN = [
    *("imports=mine.py", "data.source=my_set", "data.root=digits.npz", "data.split=standard", "data.batch_size=64"),
    *("model.block=parallel", "model.options.parallel.ratio=3", "augment=none", "augment.batch=[noise]"),
    *("optim.name=lion", "optim.lr=2e-3", "optim.options.lion.beta=0.95", "metrics=[f1,kappa]"),
    *("callbacks=early_stopping", "callbacks.early_stopping.patience=2", "logger=[tensorboard,csv]"),
    *("model.image_size=8", "model.patch_size=2", "model.layers=2", "model.embed_dim=32", "model.mlp_head_units=[]"),
    *("trainer.max_epochs=4", "dashboard=curves", "save_minutes=0"),
]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    (folder / "mine.py").write_text(OWN)
    digits = load_digits()
    images, labels = (digits.images * 15.9).astype(np.uint8), digits.target
    np.savez(folder / "digits.npz", x_train=images[:1400], y_train=labels[:1400], x_test=images[1400:],
             y_test=labels[1400:])  # fmt: skip
    Image.fromarray(images[1500]).save(folder / "digit.png")
    return folder


def done(name: str, *arguments: str, start: Path) -> str:
    result = command(name, *arguments, cwd=start)
    assert result.returncode == 0, result.stderr
    return result.stdout


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.slow
def test_one_file_adds_a_part_of_each_kind_to_every_command(start, tmp_path):
    output = done("train", *CHOSEN, "hydra.run.dir=run", start=start)
    assert "1,260 training, 140 validation, 397 test images of 10 classes" in output
    [header] = [line.split() for line in output.splitlines() if line.lstrip().startswith("images")]
    assert header == ["images", "loss", "top-1", "f1", "kappa"]
    rows = rows_of(start / "run" / "metrics.csv")
    assert float(rows[-1]["val/acc"]) > 0.5
    assert all(row["train/kappa"] and row["val/f1"] for row in rows)
    assert rows_of(start / "run" / "csv" / "version_0" / "metrics.csv")
    config = torch.load(start / "run" / "checkpoints" / "best.ckpt", weights_only=True)["hyper_parameters"]
    assert config["imports"] == ["mine.py"]

    process, _ = started("train", *CHOSEN, "hydra.run.dir=killed", cwd=start, out=tmp_path)
    while not (start / "killed" / "checkpoints" / "best.ckpt").exists():
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    again = [item for item in CHOSEN if item.startswith(("imports", "callbacks", "logger"))]
    done("train", "resume=killed", *again, start=start)
    torch.testing.assert_close(weights_of(start / "killed"), weights_of(start / "run"), rtol=0, atol=0)

    table = done("train", "-m", *CHOSEN, "model.options.parallel.ratio=1,2", "trainer.max_epochs=1",
                 "hydra.sweep.dir=sweep", start=start)  # fmt: skip
    assert "model.options.parallel.ratio=2" in table
    assert len(list((start / "sweep").glob("*/summary.json"))) == 2

    done("evaluate", "checkpoint=run", "imports=mine.py", "hydra.run.dir=evaluated", start=start)
    accuracy = json.loads((start / "evaluated" / "evaluation.json").read_text())["acc"]
    assert accuracy == pytest.approx(json.loads((start / "run" / "summary.json").read_text())["metrics"]["test/acc"])
    prediction = done("predict", "checkpoint=run", "images=digit.png", "imports=mine.py", start=start)
    assert "digit.png" in prediction
    done("export", "checkpoint=run", "imports=mine.py", "seconds=0", "hydra.run.dir=exported", start=start)
    assert (start / "exported" / "model.onnx").exists()


@pytest.mark.slow
def test_a_search_takes_parts_of_ones_own(start):
    space = ["~space", "+space={model.options.parallel.ratio: {low: 1.0, high: 3.0}}"]
    done("search", *space, *CHOSEN, "search.study=own", "search.trials=2", "trainer.max_epochs=1", start=start)
    with sqlite3.connect(start / "outputs" / "search" / "own" / "study.db") as database:
        values = [value for (value,) in database.execute("SELECT param_value FROM trial_params")]
    assert len(values) == 2
    assert all(1 <= value <= 3 for value in values)


def test_help_and_messages_know_registered_parts(start):
    assert "block=prenorm|blog|parallel" in done("train", "imports=mine.py", "--help", start=start)
    result = command("train", "imports=mine.py", "model.block=paralell", cwd=start)
    assert result.stderr == "error: model.block=paralell is not known; choose one of prenorm, blog, parallel\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "imports=mistake.py: there is no such file"),
        ("import nothing_like_it", "imports=mistake.py cannot be imported (ModuleNotFoundError: "),
        ("1 +", "imports=mistake.py cannot be imported (SyntaxError: "),
        ("from vit_lightning import register\n@register.block('prenorm')\ndef f(): pass",
         "imports=mistake.py: model.block=prenorm is registered already; choose another name"),
    ],
)  # fmt: skip
def test_a_mistaken_import_is_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "mistake.py").write_text(content)
    result = command("train", "experiment=quickstart", "imports=mistake.py", cwd=tmp_path)
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert line.startswith(f"error: {message}")


def test_a_checkpoint_names_the_imports_that_it_needs_and_runs_none(start, tmp_path):
    few = ["trainer.max_epochs=1", "trainer.limit_train_batches=2", "test=false", "hydra.run.dir=short"]
    done("train", *CHOSEN, *few, start=start)
    (start / "mine.py").rename(start / "gone.py")
    try:
        for name, setting in (("evaluate", "checkpoint=short"), ("train", "resume=short")):
            result = command(name, setting, cwd=start)
            assert result.returncode == 1
            [line] = result.stderr.splitlines()
            assert line.endswith("it was made with your own parts: add imports=[mine.py]")
    finally:
        (start / "gone.py").rename(start / "mine.py")
