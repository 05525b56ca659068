"""Write the images of a source as shards: ``python -m vit_lightning.shard data.root=photos output=shards``."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vit_lightning.data.cache import PARTS
from vit_lightning.data.module import ImageData, shuffled
from vit_lightning.data.stream import ABOUT
from vit_lightning.devices import derived_seed
from vit_lightning.files import write_atomic
from vit_lightning.keys import InputError, Invocation
from vit_lightning.schemas import ShardConfig
from vit_lightning.terminal import print_table, relative, with_bar

SIDE = 224  # side in pixels at which pictures of differing sizes are kept
BATCH = 256  # number of images read at a time


def shard(config: ShardConfig, run_dir: Path, invocation: Invocation | None = None) -> float:
    """Write the training, validation and test images of a source to ``run_dir``, one litdata data set each.

    The source is read and split as in training, through ``data.cache_dir``, which needs room for all images. Training
    images are shuffled, so that a shard has images of all classes. Class names, mean and standard deviation are the
    source's.

    Returns:
        The number of images.

    Raises:
        InputError: if ``run_dir`` is not empty, the source cannot be read, or litdata is not installed.
    """
    if any(run_dir.iterdir()):
        raise InputError(f"output={relative(run_dir)} is not empty; choose another directory, or empty it")
    data = ImageData(replace(config.data, batch_size=1), SIDE)  # no batch is drawn, so any number of images is enough
    data.setup()
    assert data.arrays is not None
    digest, paths, rows = {}, {}, []
    try:
        for part in (part for part in PARTS if len(data.indices[part])):
            positions = torch.arange(len(data.indices[part]))
            if part == "train":
                seed = derived_seed(config.data.split_seed, 0, "shards")
                positions = shuffled(positions, torch.Generator().manual_seed(seed))
            digest[part] = write_part(run_dir / part, data, part, positions, config.shard_mb * 1_000_000)
            files = data.files(part)
            if files is not None:
                paths[part] = [files[position] for position in positions.tolist()]
            shards = len(list((run_dir / part).glob("*.bin")))
            rows.append((part, f"{len(positions):,}", f"{shards:,}"))
    except BaseException:
        for part in PARTS:
            shutil.rmtree(run_dir / part, ignore_errors=True)
        raise
    about = {
        "class_names": data.class_names,
        "shape": list(next(iter(data.arrays.images.values())).shape[1:]),
        "mean": data.arrays.mean,
        "std": data.arrays.std,
        "digest": digest,
    }
    write_atomic(run_dir / "paths.json", json.dumps(paths))
    write_atomic(run_dir / ABOUT, json.dumps(about, indent=1))
    print_table(f"shards in {relative(run_dir)}", ("", "images", "shards"), rows)
    print(f"train on them with data=stream data.root={relative(run_dir)}")
    return sum(len(data.indices[part]) for part in digest)


def write_part(folder: Path, data: ImageData, split: str, positions: Tensor, shard_bytes: int) -> str:
    """Write the images and labels at the given positions of a split, in this order.

    Returns:
        A SHA-256 of the class names, the labels, the pixels and their division into shards.
    """
    try:
        from litdata.streaming.item_loader import TokensLoader
        from litdata.streaming.writer import BinaryWriter
    except ImportError as error:
        raise InputError("python -m vit_lightning.shard needs litdata: pip install litdata") from error
    folder.mkdir()
    pixels, labels = hashlib.sha256(), []
    writer = BinaryWriter(str(folder), chunk_bytes=shard_bytes, item_loader=TokensLoader())
    for start in with_bar(range(0, len(positions), BATCH), f"Writing {split} images", -(-len(positions) // BATCH)):
        images, numbers = data.stored(split, positions[start : start + BATCH])
        labels.append(numbers)
        pixels.update(images.numpy().tobytes())
        for number, image in enumerate(images.flatten(1), start):
            writer[number] = image
    writer.done()
    writer.merge()
    every = torch.cat(labels).numpy()
    np.save(folder / "labels.npy", every)
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    shards = [each["chunk_size"] for each in index["chunks"]]  # an epoch's order depends on these sizes
    about = json.dumps([data.class_names, every.tolist(), shards, pixels.hexdigest()])
    return hashlib.sha256(about.encode()).hexdigest()
