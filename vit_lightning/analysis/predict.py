"""Classify pictures: ``python -m vit_lightning.predict checkpoint=… images=…``."""

import glob
import json
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vit_lightning.analysis.attention import attention_maps, attention_rollout, on_patches
from vit_lightning.analysis.embeddings import SIDE as THUMBNAIL
from vit_lightning.analysis.embeddings import classify_and_embed, write_embeddings
from vit_lightning.analysis.figures import draw_attention, name_run, shorten
from vit_lightning.data.folder import report_others
from vit_lightning.data.images import decode_image, is_picture, visible_files
from vit_lightning.devices import evaluation_device
from vit_lightning.files import save_figure, write_atomic, write_csv
from vit_lightning.keys import InputError, Invocation
from vit_lightning.recipe.augment import resize
from vit_lightning.recipe.classifier import ViTClassifier
from vit_lightning.recipe.weights import load_classifier
from vit_lightning.schemas import PredictConfig
from vit_lightning.terminal import print_files, print_table, warn_instead, with_bar

BATCH = 64
DRAWN = 24  # maximum number of images in the attention picture
SIDE = 256  # side of each image, in pixels


def predict(config: PredictConfig, run_dir: Path, invocation: Invocation | None = None) -> float:
    """Classify pictures, print a table, and write ``predictions.json`` and ``predictions.csv`` into ``run_dir``.

    Files that cannot be read are listed on stderr; the others are still classified, and the exit code is 1.

    Returns:
        The mean probability of the most likely classes, in [0, 1].

    Raises:
        InputError: if there is no such checkpoint, or no picture could be read.
    """
    classifier = load_classifier(config.checkpoint).to(evaluation_device(config.accelerator))
    paths, unreadable = find_images(config.images)
    size, channels = classifier.net.image_size, classifier.net.channels
    rows: list[dict[str, Any]] = []
    seen: list[torch.Tensor] = []  # the images to draw
    embedded: list[tuple[torch.Tensor, torch.Tensor]] = []  # embeddings and thumbnails
    starts = range(0, len(paths), BATCH)
    for start in with_bar(starts, "Predicting", len(starts)):
        files, arrays = [], []
        for path in paths[start : start + BATCH]:
            try:
                arrays.append(decode_image(path, size, channels))
                files.append(path)
            except InputError as error:
                unreadable.append(str(error))
        if files:
            images = torch.from_numpy(np.stack(arrays))
            probabilities, features = classify_and_embed(classifier, images, config.tta)
            rows += describe(probabilities, files, classifier.hparams["class_names"], config.top)
            if config.embeddings:
                embedded.append((features.cpu(), resize(images.float(), THUMBNAIL).round().byte()))
            seen += images[: DRAWN - len(seen)]
    for message in unreadable:
        print(f"error: {message}", file=sys.stderr)
    if not rows:
        raise InputError("no picture could be read; images= takes files, directories and globs of pictures")

    write_atomic(run_dir / "predictions.json", json.dumps(rows, indent=2) + "\n")
    numbers = range(1, len(rows[0]["predictions"]) + 1)
    header = ["file", *(f"{what}_{i}" for i in numbers for what in ("class", "probability"))]
    cells = ([row["file"], *chain(*(guess.values() for guess in row["predictions"]))] for row in rows)
    write_csv(run_dir / "predictions.csv", [header, *cells])
    written = ["predictions.json", "predictions.csv"]
    show(rows)
    if config.attention:
        with warn_instead("attention"):
            draw(classifier, torch.stack(seen), rows, run_dir / "attention.png", config.checkpoint)
            written.append("attention.png")
            if len(rows) > len(seen):
                print(f"attention.png shows the first {len(seen)} of {len(rows)} images")
    print_files(run_dir / name for name in written)
    if config.embeddings:
        columns = {"class": [row["predictions"][0]["class"] for row in rows], "files": [row["file"] for row in rows]}
        features, thumbnails = map(torch.cat, zip(*embedded, strict=True))
        write_embeddings(run_dir, features, columns, thumbnails.__getitem__)
    if unreadable:
        sys.exit(f"error: {len(unreadable)} of {len(unreadable) + len(rows)} files could not be read (see above)")
    return sum(row["predictions"][0]["probability"] for row in rows) / len(rows)


def find_images(patterns: list[str]) -> tuple[list[Path], list[str]]:
    """List the pictures that the files, directories and globs match, without repeats, and the unmatched patterns."""
    paths: dict[Path, None] = {}
    unmatched = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            files = visible_files(path)
            found = [file for file in files if is_picture(file)]
            report_others(f"images={pattern}", path, (file for file in files if not is_picture(file)))
        elif path.exists():
            found = [path]
        else:
            names = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
            found = sorted(Path(name) for name in names if Path(name).is_file())
        if not found:
            unmatched.append(f"images={pattern} matches no picture")
        paths.update(dict.fromkeys(found))
    return list(paths), unmatched


def describe(probabilities: torch.Tensor, files: list[Path], names: list[str], top: int) -> list[dict[str, Any]]:
    """List each image's file and most likely classes."""
    best = probabilities.topk(min(top, len(names)), dim=1)
    return [
        {
            "file": str(path),
            "predictions": [
                {"class": names[index], "probability": share} for index, share in zip(indices, shares, strict=True)
            ],
        }
        for path, indices, shares in zip(files, best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def draw(classifier: ViTClassifier, images: torch.Tensor, rows: list[dict[str, Any]], path: Path, name: str) -> None:
    """Draw the attention for the first images: the rollout, and the mean over heads in the last block."""
    maps = attention_maps(classifier.net, classifier.normalise(images))
    last, rollout = on_patches(classifier.net, maps[:, -1].mean(dim=1)), attention_rollout(maps)
    overlays = torch.stack([on_patches(classifier.net, rollout), last], dim=1).cpu().numpy()
    best = [row["predictions"][0] for row in rows[: len(images)]]
    files = [shorten(Path(row["file"]).name, 24) for row in rows[: len(images)]]
    titles = [f"{file}\n{guess['class']} {guess['probability']:.0%}" for file, guess in zip(files, best, strict=True)]
    pictures = [np.moveaxis(decode_image(Path(row["file"]), SIDE), 0, -1) / 255 for row in rows[: len(images)]]
    save_figure(name_run(draw_attention(pictures, overlays, ["rollout", "last block"], titles), name), path)


def show(rows: list[dict[str, Any]]) -> None:
    """Print the most likely classes of each image."""
    cells = []
    for row in rows:
        guesses = (f"{guess['class']} {guess['probability']:.1%}" for guess in row["predictions"])
        cells.append((row["file"], ", ".join(guesses)))
    print_table(f"{len(rows)} image{'s' * (len(rows) != 1)}", ("file", "most likely classes"), cells, left=2)
