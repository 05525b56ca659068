"""Images in shards: what is written, the order in which it is read, object stores, and damage."""

import functools
import http.server
import itertools
import json
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import litdata.streaming.downloader
import numpy as np
import pytest
import torch
from conftest import command, write_folder
from litdata import StreamingDataset, TokensLoader

from vit_lightning.config import DataConfig
from vit_lightning.data.module import BatchIndices, ImageData
from vit_lightning.data.shard import shard
from vit_lightning.data.stream import shuffle_by_shard
from vit_lightning.keys import InputError
from vit_lightning.recipe.weights import read_checkpoint
from vit_lightning.schemas import ShardConfig

SIDE = 40  # 4,800 bytes an image, and 208 in a shard of 1 MB


def write_npz(path: Path, train: int, test: int, side: int = SIDE) -> None:
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", train), ("test", test)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
        arrays[f"{part}_labels"] = np.arange(count) % 4
    np.savez(path, **arrays)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("source")
    write_npz(folder / "images.npz", 1000, 300)
    return DataConfig(
        source="npz", root=str(folder / "images.npz"), split="standard", cache_dir=str(folder / "cache"), batch_size=64
    )


@pytest.fixture(scope="module")
def shards(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    assert shard(ShardConfig(data=source, shard_mb=1), folder) == 1300
    return folder


def opened(root: Path | str, **options) -> ImageData:
    settings = {"source": "stream", "split": "standard", "batch_size": 64, **options}
    data = ImageData(DataConfig(root=str(root), **settings), 32, seed=1)
    data.setup()
    return data


def content(data: ImageData, split: str) -> list[tuple[bytes, int]]:
    images, labels = data.stored(split, torch.arange(len(data.indices[split])))
    return [(image.numpy().tobytes(), label.item()) for image, label in zip(images, labels, strict=True)]


def test_shards_have_the_splits_of_the_source(source, shards):
    whole = ImageData(source, 32)
    whole.setup()
    data = opened(shards)
    assert len(data.arrays.images["train"].shards) == 5
    for split in ("train", "val", "test"):
        ours, theirs = content(data, split), content(whole, split)
        assert sorted(ours) == sorted(theirs)
        assert (ours == theirs) == (split != "train")  # training images are shuffled
    assert (data.class_names, data.channels) == (whole.class_names, 3)
    assert torch.equal(data.mean, whole.mean)
    assert torch.equal(data.std, whole.std)


def test_every_shard_has_images_of_every_class(shards):
    data = opened(shards)
    images, labels = data.arrays.images["train"], data.arrays.labels["train"]
    for start, end in zip(images.starts[:-2], images.starts[1:-1], strict=True):
        assert torch.bincount(labels[start:end], minlength=4).min() > 30


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_litdata_reads_the_same_images(shards):
    images = opened(shards).arrays.images["train"]
    theirs = StreamingDataset(str(shards / "train"), item_loader=TokensLoader(3 * SIDE * SIDE))
    for index in (0, 207, 208, 600, 899):
        assert torch.equal(images[index].flatten(), theirs[index])
    assert len(theirs) == len(images) == 900


def test_images_are_indexed_as_a_tensor_is(shards):
    images = opened(shards).arrays.images["train"]
    every = images[torch.arange(900)]
    assert tuple(images.shape) == tuple(every.shape)
    assert images.nbytes == every.nbytes
    for indices in (torch.randperm(900)[:70], torch.tensor([[5, 899], [300, 5]]), torch.tensor(7), torch.arange(0)):
        assert torch.equal(images[indices], every[indices])


@pytest.mark.parametrize("window", [1, 3, 16])
def test_an_epoch_reads_few_shards_at_a_time(window):
    sizes = [10, 10, 7, 10, 3, 10, 10, 10]
    starts = np.cumsum([0, *sizes])
    indices = torch.arange(70)[torch.arange(70) % 9 > 0]
    order = shuffle_by_shard(indices, starts, window, torch.Generator().manual_seed(0))
    assert order.sort().values.tolist() == indices.tolist()
    shard_of = (np.searchsorted(starts, order.numpy(), side="right") - 1).tolist()
    first, last = ({each: place for place, each in pairs} for pairs in (
        reversed(list(enumerate(shard_of))), enumerate(shard_of)))  # fmt: skip
    for place in range(len(order)):
        assert sum(first[each] <= place <= last[each] for each in set(shard_of)) <= window
    changes = sum(a != b for a, b in itertools.pairwise(shard_of))
    assert changes == 7 if window == 1 else changes > 20  # images of a window are mixed


def test_few_shards_are_shuffled_as_one(shards):
    """Any image may come at any place: the mean place of each, over 400 epochs, is the middle, within 5 deviations."""
    starts = np.array([0, 6, 12, 20])
    places = torch.zeros(20)
    for seed in range(400):
        order = shuffle_by_shard(torch.arange(20), starts, 3, torch.Generator().manual_seed(seed))
        places[order] += torch.arange(20.0) / 400
    assert (places - 9.5).abs().max() < 5 * (20**2 / 12 / 400) ** 0.5


def test_each_epoch_has_every_image_once_over_all_processes(shards):
    data = opened(shards, options={"stream": {"window": 2}})
    images, indices = data.arrays.images["train"], data.indices["train"]
    alone = BatchIndices(indices, 64, True, 3)
    shares = [BatchIndices(indices, 64, True, 3, (rank, 2)) for rank in range(2)]
    for sampler in (alone, *shares):
        sampler.order = images.shuffled
    epochs = []
    for epoch in (0, 1):
        for sampler in (alone, *shares):
            sampler.set_epoch(epoch)
        together = [torch.cat(pieces) for pieces in zip(*shares, strict=True)]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(together, alone, strict=True))
        epochs.append(torch.cat(together).tolist())
        assert len(epochs[-1]) == len(set(epochs[-1])) == 900 // 64 * 64
    assert epochs[0] != epochs[1]


def test_only_a_window_of_shards_stays_mapped(shards):
    data = opened(shards, options={"stream": {"window": 2}})
    images = data.arrays.images["train"]
    for batch, labels in data.train_dataloader():
        assert batch.shape == (64, 3, SIDE, SIDE)
        assert len(labels) == 64
        assert len(images._mapped) <= 2


def batches(data: ImageData) -> list[torch.Tensor]:
    return [images for images, _ in data.train_dataloader()]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_object_store_gives_the_same_batches(shards, tmp_path, workers):
    here = batches(opened(shards))
    data = opened(f"local:{shards}", cache_dir=str(tmp_path / "cache"), workers=workers)
    assert not list(tmp_path.rglob("*.bin"))  # they come when they are needed
    there = batches(data)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(there, here, strict=True))
    assert data.arrays.digest == opened(shards).arrays.digest
    assert len(list(tmp_path.rglob("*.bin"))) == 5


class Store(http.server.SimpleHTTPRequestHandler):
    """What S3 answers to a request of a whole object."""

    def log_message(self, *arguments) -> None:
        pass


def test_s3_gives_the_same_batches(shards, tmp_path, monkeypatch):
    (tmp_path / "bucket").symlink_to(shards)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Store, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setattr(litdata.streaming.downloader, "_OBSTORE_AVAILABLE", False)  # it refuses plain HTTP
    there = batches(opened("s3://bucket/", cache_dir=str(tmp_path / "cache")))
    server.shutdown()
    server.server_close()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(there, batches(opened(shards)), strict=True))


def test_downloads_stay_below_a_limit_of_the_disk(shards, tmp_path):
    window = {"stream": {"window": 1}}
    here = batches(opened(shards, options=window))
    data = opened(f"local:{shards}", cache_dir=str(tmp_path / "cache"), cache_gb=2.5e-3, options=window)
    for _ in range(2):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(batches(data), here, strict=True))
        assert 0 < sum(path.stat().st_size for path in tmp_path.rglob("*.bin")) <= 2.5e6
    with pytest.raises(
        InputError, match=r"data\.cache_gb=0\.001 is less than two windows of shards take; use data\.cac"
    ):
        opened(f"local:{shards}", cache_dir=str(tmp_path / "cache"), cache_gb=1e-3, options=window)


def test_shards_that_were_written_anew_are_downloaded_anew(source, shards, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(shards, store)
    options = {"cache_dir": str(tmp_path / "cache")}
    before = opened(f"local:{store}", **options)
    batches(before)
    shutil.rmtree(store)
    store.mkdir()
    shard(ShardConfig(data=replace(source, split_seed=1), shard_mb=1), store)
    after = opened(f"local:{store}", **options)
    assert sorted(content(after, "train")) == sorted(content(opened(store), "train"))
    assert after.arrays.digest["train"] != before.arrays.digest["train"]


DAMAGE = {
    "missing": lambda root: shutil.rmtree(root),
    "empty": lambda root: [shutil.rmtree(root), root.mkdir()],
    "unfinished": lambda root: (root / "shards.json").unlink(),
    "a list": lambda root: (root / "shards.json").write_text("[]"),
    "no shard": lambda root: (root / "val" / "chunk-0-0.bin").unlink(),
    "short shard": lambda root: (root / "train" / "chunk-0-2.bin").write_bytes(b"x" * 1000),
    "no labels": lambda root: (root / "train" / "labels.npy").unlink(),
    "other labels": lambda root: np.save(root / "train" / "labels.npy", np.arange(3)),
    "broken labels": lambda root: (root / "test" / "labels.npy").write_bytes(b"\x93NUMPY"),
    "no index": lambda root: (root / "train" / "index.json").write_text('{"chunks": []}'),
    "other index": lambda root: shutil.copy(root / "val" / "index.json", root / "train" / "index.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_directory_that_is_not_complete_is_refused(shards, tmp_path, damage):
    root = tmp_path / "copy"
    shutil.copytree(shards, root)
    DAMAGE[damage](root)
    with pytest.raises(InputError) as error:
        opened(root)
    assert str(error.value).startswith(f"data.root={root} is not a complete directory of shards (")
    assert str(error.value).endswith("); write one with python -m vit_lightning.shard")


def test_a_store_that_cannot_be_read_is_reported(tmp_path):
    with pytest.raises(InputError, match=r"data\.root: local:/no/shards\.json cannot be downloaded \(FileNotFoundErr"):
        opened("local:/no", cache_dir=str(tmp_path))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_vanishes_is_reported(shards, tmp_path, workers):
    root = tmp_path / "copy"
    shutil.copytree(shards, root)
    data = opened(root, workers=workers)
    (root / "train" / "chunk-0-3.bin").unlink()
    with pytest.raises(InputError) as error:
        batches(data)
    assert str(error.value).startswith(f"data.root: a shard of {root / 'train'} cannot be read (")
    assert "Traceback" not in str(error.value)


def test_without_litdata_it_is_said_how_to_install_it(source, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "litdata"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "litdata", None)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=r"vit_lightning\.shard needs litdata: pip install litdata"):
        shard(ShardConfig(data=source), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(InputError, match=r"data\.root=s3://bucket/x/shards\.json needs litdata: pip install litdata"):
        opened("s3://bucket/x", cache_dir=str(tmp_path))


def test_a_directory_in_use_is_not_written_to(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"output=.* is not empty; choose another directory, or empty it"):
        shard(ShardConfig(data=source), tmp_path)


TINY = [
    *("model.image_size=8", "model.patch_size=4", "model.layers=1", "model.embed_dim=16", "model.mlp_head_units=[]"),
    *("trainer.accelerator=cpu", "data.batch_size=60", "dashboard=curves", "trainer.log_every_n_steps=1"),
]


def done(name: str, *arguments: str, cwd: Path) -> None:
    result = command(name, *arguments, cwd=cwd)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_commands_write_train_and_evaluate(tmp_path):
    """A network has the same accuracy on shards as on the folder that they were made of, whose files are named."""
    write_folder(tmp_path / "images", {"ant": (40, 20), "bee": (40, 20)})
    done("shard", "data.root=images", "output=out/shards", cwd=tmp_path)
    done("train", "data=stream", "data.root=out/shards", *TINY, "trainer.max_epochs=2", "hydra.run.dir=run",
         cwd=tmp_path)  # fmt: skip
    done("evaluate", "checkpoint=run", "hydra.run.dir=shards", cwd=tmp_path)
    folder = ["data=image_folder", "data.root=images", "hydra.run.dir=folder"]
    done("evaluate", "checkpoint=run", *folder, cwd=tmp_path)
    ours, theirs = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("shards", "folder"))
    assert {key: ours[key] for key in ("acc", "loss", "images")} == {
        key: theirs[key] for key in ("acc", "loss", "images")
    }
    rows = [(tmp_path / name / "predictions.csv").read_text() for name in ("shards", "folder")]
    assert rows[0] == rows[1]
    result = command("shard", "data.root=images", "output=out/shards", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr == "error: output=out/shards is not empty; choose another directory, or empty it\n"


RUNS = {
    "one": [],
    "worker": ["data.workers=1"],
    "ddp": ["trainer.strategy=ddp", "trainer.devices=2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_killed_within_an_epoch_ends_as_if_it_had_not_been(shards, tmp_path, name):
    run = ["data=stream", f"data.root={shards}", "data.options.stream.window=2", *TINY, *RUNS[name]]
    run += ["trainer.max_epochs=2", "save_minutes=0"]
    done("train", *run, "hydra.run.dir=whole", cwd=tmp_path)
    (tmp_path / "killed.py").write_text(
        "import os, runpy, signal\n"
        "from vit_lightning.runs.checkpoints import Saver\n"
        "save = Saver._save\n"
        "def save_and_die(self, trainer, module, best=False):\n"
        "    save(self, trainer, module, best)\n"
        "    if trainer.global_step == 20 and not os.environ.get('LOCAL_RANK', '0').strip('0'):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "Saver._save = save_and_die\n"
        "runpy.run_module('vit_lightning.train', run_name='__main__', alter_sys=True)\n"
    )
    killed = subprocess.run([sys.executable, "killed.py", *run, "hydra.run.dir=killed"], cwd=tmp_path, check=False)
    assert killed.returncode != 0
    position = read_checkpoint(tmp_path / "killed" / "checkpoints" / "last.ckpt")["global_step"]
    assert position % 15  # within the second epoch
    done("train", "resume=killed", cwd=tmp_path)
    ours, theirs = (read_checkpoint(tmp_path / folder / "checkpoints" / "last.ckpt") for folder in ("killed", "whole"))
    for part in ("state_dict", "optimizer_states"):
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)
    assert ours["global_step"] == theirs["global_step"] == 30
